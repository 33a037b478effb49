"""Page tables of sequences: prefix hits, reservation, growth, publication, release. `pages.py` and `prefix.py` joined.

All changes to `Sequence.pages` happen here. A sequence writes only pages it owns alone: what it shares is full and
committed, and it writes past its committed tokens (R2, R3).
"""

from __future__ import annotations

from scheduler.pages import PagePool
from scheduler.prefix import PageName, PrefixIndex
from scheduler.prompt_attention import chosen_by
from scheduler.sequence import Sequence


class KVMemory:
    """The pool of one model and its prefix index.

    root   see PrefixIndex; None = random
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool, root: bytes | None = None) -> None:
        self.page_size = page_size
        self.is_caching = enable_prefix_caching
        self.index = PrefixIndex(page_size, root)
        self.pool = PagePool(num_pages, self.index.evict)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def takes_hits(self, seq: Sequence) -> bool:
        """False for a request whose prompt is to be judged: it needs every row."""
        return self.is_caching and not seq.decoding.judges_prompt

    def num_shareable(self, seq: Sequence, num_tokens: int) -> int:
        """Full pages of the first `num_tokens` tokens whose KV is what any other request under their names computes.

        Behind a sparse row's first sparse layer, keys and values are approximations: such pages of output are the
        request's own until they are corrected, and those of a block-sparse prompt have names that tell (`name_pages`);
        all output behind such a prompt is the request's own.
        """
        num_prompt, num_tokens = len(seq.request.prompt), min(num_tokens, seq.dense_end)
        if (chosen := chosen_by(seq.request.prompt_attention, num_prompt)) is not None:
            num_tokens = chosen.num_shareable(num_tokens, num_prompt)
        return num_tokens // self.page_size

    def num_missing(self, seq: Sequence) -> int:
        """Pages that a running sequence lacks for its next span."""
        return max(0, self.num_pages_for(seq.decoding.reach) - len(seq.pages))

    def name_pages(self, seq: Sequence, names: list[PageName], tokens: list[int]) -> None:
        """Append to `names` what is missing for all full pages of `tokens`, the first tokens of `seq`, that have names:
        of a block-sparse prompt those of whole regions."""
        request = seq.request
        chosen = chosen_by(request.prompt_attention, len(request.prompt))
        plain = tokens if chosen is None else tokens[: chosen.dense]
        self.index.extend_names(names, plain, request.cache_salt, seq.decoding.mask_block)
        if chosen is not None:
            prompt = tokens[: len(request.prompt)]
            self.index.extend_by_regions(names, prompt, chosen.name, chosen.method.region)

    def find_prefix(self, seq: Sequence) -> list[int] | None:
        """Indexed pages that `seq` can start from, as far as its way of decoding can use any.

        None if the next page is being computed right now by a sequence that comes before `seq`: it should wait (n > 1
        samples of one prompt share pages that way).
        """
        if not self.takes_hits(seq):
            return []
        if seq.deferred_on is not None and self._is_computed_elsewhere(seq, seq.deferred_on):
            return None
        usable = self.num_shareable(seq, seq.decoding.most_cached)
        self.name_pages(seq, seq.page_names, seq.tokens)
        hits = self.index.lookup(seq.page_names[:usable])
        hits = hits[: self.num_shareable(seq, len(hits) * self.page_size)]
        seq.deferred_on = None
        if len(hits) < usable and self._is_computed_elsewhere(seq, seq.page_names[len(hits)]):
            seq.deferred_on = seq.page_names[len(hits)]
            return None
        return hits

    def _is_computed_elsewhere(self, seq: Sequence, name: bytes) -> bool:
        """Only by one that comes before it: waiting for a later one could invert priorities."""
        owner = self.index.pending_owner(name)
        return owner is not None and owner < seq.order

    def fits(self, seq: Sequence, hits: list[int], watermark_pages: int) -> bool:
        """Whether `seq` has room up to its reach above the watermark (idle hits leave the available pages, too)."""
        missing = self.num_pages_for(seq.decoding.reach) - len(hits)
        return self.pool.num_available - self.pool.num_idle_among(hits) - missing >= watermark_pages

    def reserve(self, seq: Sequence, hits: list[int]) -> None:
        """Give an admitted sequence its hits and pages up to its reach, and announce what it is going to compute."""
        self.pool.share(hits)
        seq.pages = hits + self.pool.take(self.num_pages_for(seq.decoding.reach) - len(hits))
        seq.num_committed = len(hits) * self.page_size
        seq.num_entered = len(hits)
        if self.is_caching:
            self.name_pages(seq, seq.page_names, seq.tokens)
            seq.num_announced = self.num_shareable(seq, len(seq.tokens))
            self.index.announce(seq.page_names[len(hits) : seq.num_announced], seq.order)

    def grow(self, seq: Sequence) -> int:
        """One more page; returns its id."""
        (page,) = self.pool.take(1)
        seq.pages.append(page)
        return page

    def publish(self, seq: Sequence) -> None:
        """Enter the pages that are full of committed tokens now (R3)."""
        full = self.num_shareable(seq, seq.num_committed)
        first = seq.num_entered
        if not self.is_caching or full <= first:
            return
        names = seq.page_names
        if len(names) < full:
            self.name_pages(seq, names, seq.tokens[: full * self.page_size])
        for number in range(first, full):
            if self.index.enter(names[number], seq.pages[number]):
                self.pool.keep(seq.pages[number])
        self.index.withdraw(names[first : min(full, seq.num_announced)], seq.order)
        seq.num_entered = full

    def drop(self, seq: Sequence) -> None:
        """Take all pages from a sequence that ended or was preempted."""
        if seq.num_announced > seq.num_entered:
            self.index.withdraw(seq.page_names[seq.num_entered : seq.num_announced], seq.order)
        self.pool.release(seq.pages)
        seq.pages = []
        seq.num_committed = seq.num_entered = seq.num_announced = 0
