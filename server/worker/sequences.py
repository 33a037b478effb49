"""What the worker remembers of each sequence between steps, and how a plan's differences change it.

Nothing here decides anything: the scheduler owns the sequences (R6). A plan may be applied twice, whole or with fewer
spans, and the second time changes nothing; that is what makes a failed step repeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scheduler.types import UNKNOWN, Admission, Read, Request, Span, StepPlan
from server.worker.grammar import GrammarMatcher
from server.worker.kv_pool import pages_for
from server.worker.recipe import Recipe


class Counts(NamedTuple):
    """Distinct tokens, int64, and how often each stands in the output, float32."""

    ids: NDArray[np.int64]
    counts: NDArray[np.float32]


class TokenCounts:
    """How often each token stands in one sequence's output, kept sparse and up to date token by token.

    Tokens of the prompt are among them, with count 0, where the recipe asks.
    """

    def __init__(self, prompt: Sequence[int], with_prompt: bool) -> None:
        known = np.unique(np.asarray(prompt, dtype=np.int64)) if with_prompt else np.empty(0, dtype=np.int64)
        self._ids = np.zeros(max(64, 2 * known.size), dtype=np.int64)
        self._counts = np.zeros(self._ids.size, dtype=np.float32)
        self._ids[: known.size] = known
        self._place = {token: place for place, token in enumerate(known.tolist())}
        self._num_counted = len(prompt)

    def after(self, drafts: Sequence[int] = ()) -> Counts:
        """The counts with `drafts` behind what is counted; they are not remembered. Valid until the next `catch_up`."""
        num_known = len(self._place)
        ids, counts = self._ids[:num_known], self._counts[:num_known]
        if not drafts:
            return Counts(ids, counts)
        counts, new = counts.copy(), dict[int, int]()
        for token in drafts:
            place = self._place.get(token)
            if place is None:
                new[token] = new.get(token, 0) + 1
            else:
                counts[place] += 1
        if new:
            ids = np.concatenate((ids, np.fromiter(new, np.int64, len(new))))
            counts = np.concatenate((counts, np.fromiter(new.values(), np.float32, len(new))))
        return Counts(ids, counts)

    def beyond(self, history: Sequence[int], drafts: Sequence[int]) -> Counts:
        """The counts with `drafts` behind `history`, which may be ahead of what is counted."""
        return self.after((*history[self._num_counted :], *drafts))

    def catch_up(self, history: Sequence[int]) -> None:
        """Count the output tokens of `history` (prompt + output) that are not counted yet."""
        for token in history[self._num_counted :]:
            place = self._place.setdefault(token, len(self._place))
            if place == self._ids.size:
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token
            self._counts[place] += 1
        self._num_counted = max(self._num_counted, len(history))


@dataclass(slots=True)
class SequenceState:
    """One sequence as the worker knows it.

    slot        its row of the page table
    history     prompt and output tokens; a span's tokens are put in at its start, drafts only once they are accepted,
                a block's only once a span brings them as clean ones: before its own block
    num_pages   entries of its page-table row in use; pages_step is the last step that added some
    failure     set when its grammar cannot be used: it ends with this message when its row is read
    draft_q     float32 [drafts, V]: what a drafter that samples drew its last offer from; it sets this. None = its
                drafts were not drawn
    draft_q_at  the same by start of the span that verifies them: the next one's, and the last one's in case its step
                is run again
    """

    request: Request
    recipe: Recipe
    slot: int
    history: list[int]
    admitted_step: int
    num_pages: int = 0
    pages_step: int | None = None
    counts: TokenCounts | None = None
    matcher: GrammarMatcher | None = None
    failure: str | None = None
    draft_q: Tensor | None = None
    draft_q_at: dict[int, Tensor] = field(default_factory=dict)
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.prompt)

    def put(self, span: Span) -> None:
        """Enter a span's tokens into the history. The same span twice is the same as once.

        A token that is not known yet takes its place as `UNKNOWN`: the step before it will `settle` it. Until then
        there is no other behind it, and a step that is run again takes it back.
        """
        self.forget_unknown()
        if span.denoise is not None:
            self._put_clean(span, span.denoise.lo)
            return
        if span.start > len(self.history):
            raise ValueError(
                f"span of sequence {span.seq_id} starts at {span.start}, but only {len(self.history)} tokens are known"
            )
        if len(span.tokens) > 1 and span.read is Read.VERIFY:
            # What an earlier run of this step accepted goes, too.
            self.history[span.start :] = span.tokens[:1]
        else:
            self.history[span.start : span.start + len(span.tokens)] = span.tokens

    def settle(self, position: int, token: int) -> None:
        """Tell the token that is `UNKNOWN`, if it is the one at `position`."""
        if position == len(self.history) - 1 and self.history[position] == UNKNOWN:
            self.history[position] = token

    def forget_unknown(self) -> None:
        if self.history and self.history[-1] == UNKNOWN:
            self.history.pop()

    def _put_clean(self, span: Span, lo: int) -> None:
        """Enter the tokens before the block; the history ends there, whatever the block holds.

        A span that brings only some rows is of a canvas, and what is before that is the prompt.
        """
        if not span.positions and span.start < lo and span.start <= len(self.history):
            clean = span.tokens[: lo - span.start]
            self.history[span.start : span.start + len(clean)] = clean
        del self.history[lo:]
        if len(self.history) < lo:
            raise ValueError(
                f"span of sequence {span.seq_id} denoises from {lo} on, but only {len(self.history)} tokens are known"
            )

    def keep_draft_q(self) -> None:
        """File `draft_q` under the span that will verify it. `history` ends in that span's first token."""
        start = len(self.history) - 1
        if self.draft_q is None:
            # The step may have run before and offered others.
            self.draft_q_at.pop(start, None)
            return
        # By place, not by age: a step that runs again files its offer again and needs what it was verified with.
        last = max((at for at in self.draft_q_at if at < start), default=None)
        kept = {} if last is None else {last: self.draft_q_at[last]}
        self.draft_q_at = {**kept, start: self.draft_q}
        self.draft_q = None


class SequenceTable:
    """All sequences the worker knows and their page tables: int32 [slots, max_pages], a row per sequence."""

    def __init__(self, num_slots: int, max_pages: int, num_pages: int, page_size: int) -> None:
        """num_slots: to begin with; the table grows if a plan admits more. max_pages: of one sequence."""
        self.page_size = page_size
        self.page_table: NDArray[np.int32] = np.zeros((num_slots, max_pages), dtype=np.int32)
        self._num_pages = num_pages
        self._states: dict[int, SequenceState] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, seq_id: int) -> SequenceState:
        try:
            return self._states[seq_id]
        except KeyError:
            raise ValueError(f"a span names sequence {seq_id}, which was never admitted or is released") from None

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._states

    def apply(self, plan: StepPlan, make_state: Callable[[Admission, int, int], SequenceState]) -> None:
        """Apply a plan's releases, admissions and pages, in this order.

        make_state(admission, slot, step)  builds the state of a new sequence
        """
        for seq_id in plan.released:
            state = self._states.pop(seq_id, None)
            if state is not None:
                self._free_slots.append(state.slot)
        for admission in plan.admitted:
            self._admit(admission, plan.step, make_state)
        for seq_id, pages in plan.new_pages:
            state = self[seq_id]
            # A step that is run again may have been followed by one that took pages, too.
            if state.pages_step is None or state.pages_step < plan.step:
                self._append_pages(state, seq_id, pages)
                state.pages_step = plan.step

    def _admit(
        self, admission: Admission, step: int, make_state: Callable[[Admission, int, int], SequenceState]
    ) -> None:
        known = self._states.get(admission.seq_id)
        if known is not None:
            if known.admitted_step != step:
                raise ValueError(
                    f"sequence {admission.seq_id}, admitted in step {known.admitted_step}, is admitted again"
                )
            return
        if not self._free_slots:
            old = self.page_table
            self.page_table = np.concatenate((old, np.zeros_like(old)))
            self._free_slots = list(range(2 * len(old) - 1, len(old) - 1, -1))
        state = make_state(admission, self._free_slots[-1], step)
        self._free_slots.pop()
        self._states[admission.seq_id] = state

    def _append_pages(self, state: SequenceState, seq_id: int, pages: tuple[int, ...]) -> None:
        end = state.num_pages + len(pages)
        if end > self.page_table.shape[1]:
            raise ValueError(
                f"sequence {seq_id} would have {end} pages; the longest sequence has {self.page_table.shape[1]}"
            )
        if pages and not 0 <= min(pages) <= max(pages) < self._num_pages:
            raise ValueError(f"sequence {seq_id} is given pages {pages}; the pool has pages 0 to {self._num_pages - 1}")
        self.page_table[state.slot, state.num_pages : end] = pages
        state.num_pages = end


def make_sequences(max_seqs: int, model_len: int, num_pages: int, page_size: int) -> SequenceTable:
    """An empty table for sequences of up to model_len tokens over a pool of num_pages pages."""
    # One page more than the longest sequence: drafts, or a block of a diffusion model, may end past it.
    return SequenceTable(max_seqs, pages_for(model_len, page_size) + 1, num_pages, page_size)
