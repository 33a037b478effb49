"""The prefix index: which page holds the KV of which token prefix.

A full page is named by a chained SHA-256: H(name of the page before, its tokens); the first page's predecessor is
H(random root of this process, typed length-prefixed salt, mask block). Equal names therefore mean equal tokens from
position 0 on, an equal salt and an equal mask (a causal and a block-causal row of one token have different KV); pages
of block-sparse prompts are named by whole regions. 64-bit or unsalted hashes are not enough here: a crafted collision
would hand out another user's KV.

Only pages whose KV is committed are entered (R3). A page that is being computed right now is announced as pending, so
that a sibling with the same prompt can wait for it instead of computing it again. Source: vLLM v1's hash chain;
SGLang's in-batch rule. Departure: pages are entered after the step that computed them, never while it is in flight.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Sequence

PageName = bytes
Owner = tuple[int, int]
"""A sequence's place in the order of service, which no other sequence has."""


class PrefixIndex:
    """Page names to pages and back, for one process.

    page_size  tokens a page holds
    root       32 secret bytes; given only by tests that need the same names twice
    """

    def __init__(self, page_size: int, root: bytes | None = None) -> None:
        self.page_size = page_size
        self._root = secrets.token_bytes(32) if root is None else root
        self._page_of: dict[PageName, int] = {}
        self._name_of: dict[int, PageName] = {}
        self._pending: dict[PageName, Owner] = {}

    def root_name(self, salt: str, mask_block: int = 1) -> PageName:
        """The predecessor of a first page. The salt is typed and length-prefixed: no other field can imitate it."""
        text = salt.encode("utf-8", "surrogatepass")
        typed = b"salt" + len(text).to_bytes(8, "little") + text + b"mask" + mask_block.to_bytes(8, "little")
        return hashlib.sha256(self._root + typed).digest()

    def name(self, parent: PageName, tokens: Sequence[int]) -> PageName:
        """Name of a full page of `tokens` that follows the page named `parent`."""
        return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()

    def extend_names(self, names: list[PageName], tokens: Sequence[int], salt: str, mask_block: int = 1) -> None:
        """Append to `names` what is missing for all full pages of `tokens`. Each page is hashed once in its life."""
        size = self.page_size
        parent = names[-1] if names else self.root_name(salt, mask_block)
        for index in range(len(names), len(tokens) // size):
            parent = self.name(parent, tokens[index * size : (index + 1) * size])
            names.append(parent)

    def extend_by_regions(self, names: list[PageName], tokens: Sequence[int], settings: bytes, region: int) -> None:
        """The same for whole regions of `region` tokens, behind at least the name of the page before them.

        The KV of each page hangs on all tokens of its region and on the settings, and so do all of its names.
        """
        per_region = region // self.page_size
        typed = b"region" + len(settings).to_bytes(8, "little") + settings
        for first in range(len(names), len(tokens) // region * per_region, per_region):
            start = first * self.page_size
            whole = self.name(names[-1] + typed, tokens[start : start + region])
            names += [self.name(whole, (place,)) for place in range(per_region)]

    def lookup(self, names: Sequence[PageName]) -> list[int]:
        """Pages of the longest indexed prefix of `names`."""
        pages = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def enter(self, name: PageName, page: int) -> bool:
        """Index a committed page. False if that content is indexed already (two sequences computed it at once)."""
        if name in self._page_of:
            return False
        self._page_of[name] = page
        self._name_of[page] = name
        return True

    def evict(self, page: int) -> None:
        """Forget an idle page that is about to be overwritten."""
        del self._page_of[self._name_of.pop(page)]

    def name_of(self, page: int) -> PageName | None:
        return self._name_of.get(page)

    def announce(self, names: Sequence[PageName], owner: Owner) -> None:
        """Sequence `owner` is going to compute these pages. The first to announce a page stays its owner."""
        for name in names:
            self._pending.setdefault(name, owner)

    def withdraw(self, names: Sequence[PageName], owner: Owner) -> None:
        """The pages are computed, or `owner` no longer computes them."""
        for name in names:
            if self._pending.get(name) == owner:
                del self._pending[name]

    def pending_owner(self, name: PageName) -> Owner | None:
        """The sequence that computes this page right now, if one does."""
        return self._pending.get(name)

    def pending_names(self) -> frozenset[PageName]:
        return frozenset(self._pending)

    def indexed_pages(self) -> frozenset[int]:
        return frozenset(self._name_of)

    def check(self) -> None:
        """Raise AssertionError unless both directions agree."""
        assert {page: name for name, page in self._page_of.items()} == self._name_of, "the prefix index is torn"
