"""Who owns which page of the KV pool: reference counts and the free list. Knows no tokens and no hashes.

A page is free (empty), idle (no owner, but its content may still be wanted: an evictable prefix) or owned. Empty
pages are handed out first, then idle ones, least recently used first. R2: free + idle + owned == total after every
call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """Reference-counted pages 0 .. num_pages - 1.

    on_evict   called with a page id when an idle page is taken for new content, before it is handed out
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; the KV pool needs at least 1 page")
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._num_owners = [0] * num_pages
        self._is_kept = bytearray(num_pages)
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `take` can give now: free and idle."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_owned(self) -> int:
        return self.num_pages - len(self._free) - len(self._idle)

    def num_owners(self, page: int) -> int:
        return self._num_owners[page]

    def take(self, count: int) -> list[int]:
        """Give `count` pages their first owner. Raises RuntimeError, changing nothing, if there are too few."""
        if count > self.num_available:
            raise RuntimeError(f"{count} pages wanted, {self.num_available} available")
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._is_kept[page] = 0
                self._on_evict(page)
            self._num_owners[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to pages that are owned or idle. Raises RuntimeError for a free page: its content is gone."""
        for page in pages:
            if self._num_owners[page] == 0:
                if page not in self._idle:
                    raise RuntimeError(f"page {page} is free and cannot be shared")
                del self._idle[page]
            self._num_owners[page] += 1

    def num_idle_among(self, pages: Iterable[int]) -> int:
        """How many of `pages` have no owner: sharing them makes that many fewer available."""
        return sum(1 for page in pages if self._num_owners[page] == 0)

    def keep(self, page: int) -> None:
        """When its last owner leaves, the page becomes idle rather than free: its content is indexed."""
        if self._num_owners[page] == 0:
            raise RuntimeError(f"page {page} has no owner and cannot be kept")
        self._is_kept[page] = 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one owner of each page of one sequence, in KV order.

        The last page goes first, so that the longest prefix (the least likely to be shared) is evicted first.
        Raises RuntimeError on a double free.
        """
        for page in reversed(pages):
            owners = self._num_owners[page]
            if owners == 0:
                raise RuntimeError(f"page {page} is released but has no owner (double free)")
            self._num_owners[page] = owners - 1
            if owners == 1:
                if self._is_kept[page]:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless `tables` (the page tables of all sequences) explain every owner. O(pages)."""
        counted = [0] * self.num_pages
        for table in tables:
            assert len(set(table)) == len(table), f"a page table holds a page twice: {table}"
            for page in table:
                counted[page] += 1
        assert counted == self._num_owners, "owner counts differ from the page tables (R2)"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice (R2)"
        assert not free & self._idle.keys(), "a page is free and idle at once (R2)"
        unowned = {page for page, owners in enumerate(counted) if owners == 0}
        assert free | self._idle.keys() == unowned, "free + idle + owned != total (R2)"
        assert all(self._is_kept[page] for page in self._idle), "an idle page is not indexed (R2)"
        assert not any(self._is_kept[page] for page in free), "a free page is marked as indexed (R2)"
