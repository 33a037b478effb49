"""Drafts, wishes for new ones and mask rows, put into a step as far as its rows and the pages go.

They take pages only above what decodes and admissions may need soon, and nobody is preempted for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

from scheduler.draft_plan import DraftPlan
from scheduler.kv_memory import KVMemory
from scheduler.sequence import Sequence
from scheduler.types import LEARN_MOST, Limits, SpeculationSettings


class Placing:
    """Places what was decided."""

    def __init__(self, limits: Limits, memory: KVMemory, settings: SpeculationSettings) -> None:
        self._limits, self._memory, self._settings = limits, memory, settings

    def place(self, draft: DraftPlan, lengths: Mapping[int, int], wishes: Many[int], most_masks: int) -> None:
        """lengths: {index of a decode: drafts to verify}; wishes: new ones of each decode; most_masks: rows in all."""
        for index, wish in enumerate(wishes):
            length = lengths.get(index, 0)
            if length or wish:
                seq = draft.owners[index]
                most = seq.decoding.most_drafts
                room = self._room(draft, seq, min(length + wish, most), draft.num_decodes)
                length = min(length, room)
                wish = min(wish, room - length)
                draft.place_drafts(index, length, wish)
                if wish:
                    _note_unseen(draft, seq)
                self._place_masks(draft, index, most_masks)

    def place_first(self, draft: DraftPlan, index: int, wish: int, most_masks: int) -> bool:
        """Ask for the first drafts of a prompt that ends in this step; False if there is no room for any."""
        seq = draft.owners[index]
        wish = self._room(draft, seq, wish, draft.num_decodes)
        if wish < 1:
            return False
        draft.spans[index] = draft.spans[index]._replace(num_drafts=wish)
        draft.num_asked += 1
        _note_unseen(draft, seq)
        self._place_masks(draft, index, most_masks)
        return True

    def _place_masks(self, draft: DraftPlan, index: int, most: int) -> None:
        """Masks reach to the end of their block: each answers for its own position, the first one for that of the token
        which the step itself decides. So one row alone is of no use."""
        seq, span = draft.owners[index], draft.spans[index]
        state = seq.drafting
        assert state is not None, "a span is placed whose drafts nobody decided"
        state.is_masked = False
        if span.parents or not state.wants_masks or not span.num_drafts:
            return
        start, block = span.start + len(span.tokens), self._settings.mask_block
        pages_end = len(seq.pages) * self._memory.page_size
        end = min((start // block + 1) * block, self._limits.max_model_len, pages_end, start + span.num_drafts)
        state.is_masked = end - start > 1 and draft.num_masks + end - start <= most
        if state.is_masked:
            draft.place_masks(index, end - start)

    def _room(self, draft: DraftPlan, seq: Sequence, wanted: int, num_decodes: int) -> int:
        """Drafts, up to `wanted`, whose KV has pages behind the sequence's tokens, after taking some that are spare."""
        memory = self._memory
        size = memory.page_size
        known = len(seq.tokens)
        missing = memory.num_pages_for(known + wanted) - len(seq.pages)
        if missing > 0:
            reserve = self._limits.watermark_pages + 1 + num_decodes // size
            spare = min(missing, memory.pool.num_available - reserve)
            for _ in range(spare):
                draft.add_page(seq.seq_id, memory.grow(seq))
        return max(0, min(wanted, len(seq.pages) * size - known))


def _note_unseen(draft: DraftPlan, seq: Sequence) -> None:
    """A sequence is asked: its drafters take in what they have not seen of its text."""
    state, length = seq.drafting, len(seq.tokens)
    assert state is not None, "a sequence is asked whose drafts nobody decided"
    taken = max(0, min(LEARN_MOST - draft.num_unseen, length - state.num_seen))
    draft.num_unseen += taken
    state.num_seen += taken
