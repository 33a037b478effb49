"""How the rows of a request's prompt attend: part of the vocabulary, which `scheduler.types` hands on.

Rows before position `dense` read all they see. From there on rows are taken by whole regions at fixed positions, and
what a row reads is decided by its region's queries and the keys before the region's end: so by the prompt, not by how
it was cut, since chunks are cut between regions alone. The prompt's last region ends where the prompt ends. Rows of the
output are another matter (`attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from scheduler.limits import Limits

TILE = 128
"""Query rows that share a list, and keys that are kept or left out together (`kernels/sparse_prefill.py`)."""


class PromptMethod(StrEnum):
    """How a tile of a prompt's rows chooses the key tiles it reads."""

    XATTENTION = "xattention"
    PBS = "pbs"

    @property
    def tile(self) -> int:
        return TILE

    @property
    def region(self) -> int:
        """Rows of a region. PBS-Attn ranks keys by the last 128 rows of one: 128 / region of the scores of dense
        attention, against what has to fit into a step."""
        return TILE if self is PromptMethod.XATTENTION else 4 * TILE


@dataclass(frozen=True, slots=True)
class PromptAttention:
    """Block-sparse attention of a prompt; None in its place = every row reads all it sees.

    threshold  share of the estimated attention that the kept tiles hold at least; 1 = all tiles are kept
    dense      rows before this position read everything, a multiple of the region: a prompt that ends there is dense
    """

    method: PromptMethod
    threshold: float = 0.9
    dense: int = 4096

    @property
    def name(self) -> bytes:
        """Equal for equal settings: part of the names of pages that were computed so."""
        return f"{self.method} {self.threshold!r} {self.dense}".encode()

    def misfit(self, methods: Sequence[PromptMethod]) -> tuple[str, str] | None:
        """(field, what is wrong with it) if no method that is offered can do this; None = one can."""
        if self.method not in methods:
            known = ", ".join(methods)
            have = f"this server has dense and {known}" if methods else "this server reads prompts densely"
            return "prefill", f"is {self.method}, but {have} (sparse-attention)"
        if not 0.0 < self.threshold <= 1.0:
            return "prefill_threshold", f"is {self.threshold}; it must lie above 0 and at most at 1"
        if self.dense < 1 or self.dense % self.method.region:
            return "prefill", f"is dense up to position {self.dense}; it must be a multiple of {self.method.region}"
        return None

    def most_rows(self, start: int, rows: int, num_prompt: int) -> int:
        """Rows from `start` on, `rows` at most, that end where a chunk may end: 0 if none do."""
        end, region = start + rows, self.method.region
        if end <= self.dense or end >= num_prompt:
            return rows
        return max(0, end // region * region - start)

    def num_shareable(self, num_tokens: int, num_prompt: int) -> int:
        """Of so many first tokens those whose KV any request with these settings and this text would compute.

        The prompt's last region, if it is not whole, hangs on where the prompt ends, and so does all behind it.
        """
        num_tokens, region = min(num_tokens, num_prompt), self.method.region
        return num_tokens if num_tokens <= self.dense else num_tokens // region * region


def chosen_by(asked: PromptAttention | None, num_prompt: int) -> PromptAttention | None:
    """`asked`, if some rows of a prompt of so many tokens do not read all they see."""
    return asked if asked is not None and num_prompt > asked.dense else None


def check_methods(methods: Sequence[PromptMethod], limits: Limits) -> None:
    """Raises ValueError for methods that requests could choose and then wait for ever."""
    for method in methods:
        if TILE % limits.page_size:
            raise ValueError(
                f"page_size is {limits.page_size}, but {method} keeps tiles of {TILE} keys, of whole pages: it must "
                f"divide {TILE} (block-size, or leave {method} out of sparse-attention)"
            )
        rows = limits.max_seqs - 1 + method.region
        if rows > limits.max_batched_tokens:
            raise ValueError(
                f"{method} computes {method.region} rows of a prompt in one step, beside a token of every other "
                f"sequence ({limits.max_seqs - 1}), but max_batched_tokens is {limits.max_batched_tokens}; raise it to "
                f"{rows} (max-num-batched-tokens), lower max-num-seqs or leave {method} out of sparse-attention"
            )
