"""Sparse attention: which of the keys it may see a row reads. The words that all back ends share; no computation.

A row is sparse by its own right: what it reads is a function of its query, of the keys [0, visible) and of their
metadata, and of nothing else (README, rule 12). So it may stand alone, in a chunk of its own sequence's rows or among
drafts and reads the same keys. Three parts are always read and count towards the budget: the first `FIRST_KEYS` keys,
the last `LAST_KEYS`, and what a method scores best of the others. A row that sees no more keys than its budget is
computed as if it were dense, bit for bit.

Legend of shapes in ops.py, and N sparse rows of the step, C label channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

FIRST_KEYS = 4
LAST_KEYS = 64
"""Always read, within the budget: attention sinks, and what was just said."""
SUB_PAGE = 8
"""Keys that have bounds of their own, of a page that is so many times as long."""
DENSE_LAYERS = 2
"""The first layers attend to everything for every row; their scores are spread too evenly for any method."""


class Method(IntEnum):
    """How a row chooses.

    QUEST            whole pages, by an upper bound of q.k from the elementwise extremes of each sub-page's keys
    DOUBLE_SPARSITY  single keys, by q.k over a few channels that were found to matter (the keys' labels)
    TIDAL            single keys, by the q.k that one layer has computed for all of them; the layers after it follow
    DOUBLE_SPARSITY_PAGES   whole pages, each by its key that DOUBLE_SPARSITY scores best
    """

    QUEST = 0
    DOUBLE_SPARSITY = 1
    TIDAL = 2
    DOUBLE_SPARSITY_PAGES = 3

    @property
    def is_of_pages(self) -> bool:
        """Whether what it chooses are pages. It reads budget // page size of them: the first, those with one of the
        last LAST_KEYS keys, and the best of the others, which are full."""
        return self in (Method.QUEST, Method.DOUBLE_SPARSITY_PAGES)


class Role(IntEnum):
    """What a layer does for the rows of one method.

    DENSE   they read all keys
    CHOOSE  they read what the layer's metadata says is best
    LIST    they read all keys, and those with the highest q.k become their list (`SparseRows.lists`)
    FOLLOW  they read the keys of their list
    """

    DENSE = 0
    CHOOSE = 1
    LIST = 2
    FOLLOW = 3


Roles = tuple[Role, Role, Role, Role]
"""Of one layer, by `Method`."""


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """What one layer's KV memory has for sparse rows, beside its pages and under their ids (`Ops.allocate_sparse`).

    roles     by `Method`
    bounds    of complete sub-pages, for QUEST: written whenever a row is written to the last slot of one, from all its
              keys. Only complete pages are scored, each by its best sub-page
    labels    of every key, for DOUBLE_SPARSITY and DOUBLE_SPARSITY_PAGES
    channels  int32 [K, C]: the elements of a rotated key that are its label
    label_scales  of labels that are codes of 4 bits (label_codes.py); None = they are elements as they are
    bounds, labels and their scales are opaque, as KV pages are.
    """

    roles: Roles
    bounds: Tensor | None = None
    labels: Tensor | None = None
    channels: Tensor | None = None
    label_scales: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        kept = (self.bounds, self.labels, self.label_scales)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)


@dataclass(frozen=True, eq=False)
class SparseRows:
    """The sparse rows of a step. They are causal: without tree masks, in layers without a window.

    index    int32 [T]: the row's place in the following, -1 for a row that reads all keys
    methods  int32 [N], of `Method`
    budgets  int32 [N]: most keys read in a layer that is not dense, at least `least_budget`
    lists    int32 [N, K, most], where a TIDAL row is among them: KV indices, ascending. LIST layers write them, the
             layers that FOLLOW in the same step read them
    """

    index: Tensor
    methods: Tensor
    budgets: Tensor
    lists: Tensor | None = None


def sub_page(page_size: int) -> int:
    """Keys that have bounds of their own: where a page is large, its elementwise extremes are of keys so far apart that
    they bound nothing, and one key that matters does not stand out (attention.md 4.3)."""
    return page_size if page_size % SUB_PAGE else SUB_PAGE


def default_channels(head_dim: int, int4_labels: bool) -> int:
    """Channels of a label where nobody says: a quarter of a key's, because an eighth loses single keys. Codes of 4 bits
    cost a quarter of what elements of bfloat16 do: of them half of the channels, in half the bytes."""
    return max(4, head_dim // (2 if int4_labels else 4))


def least_budget(method: Method, page_size: int) -> int:
    """Fewest keys that a row may be told to read: what is always read, and room for one choice."""
    if not method.is_of_pages:
        return FIRST_KEYS + LAST_KEYS + 1
    # So many pages have one of LAST_KEYS successive keys, at most; the first page and one that is chosen are two more.
    return page_size * ((LAST_KEYS - 2 + page_size) // page_size + 3)


def roles_of_layers(num_layers: int, selection_layer: int, reselection_layers: Sequence[int]) -> list[Roles]:
    """Each layer's roles: its methods' in the order of `Method`.

    selection_layer     of TIDAL, at least DENSE_LAYERS: it makes the list, the layers before it are dense
    reselection_layers  make it anew
    """
    roles = []
    for layer in range(num_layers):
        chooses = Role.DENSE if layer < DENSE_LAYERS else Role.CHOOSE
        if layer < selection_layer:
            tidal = Role.DENSE
        else:
            tidal = Role.LIST if layer == selection_layer or layer in reselection_layers else Role.FOLLOW
        roles.append((chooses, chooses, tidal, chooses))
    return roles
