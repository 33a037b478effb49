"""Which sequences are asked for drafts at the end of a step, and how deep a model drafter may go.

Proposing costs time whether or not the drafts are used, so it must be earned. Per request there is the time that its
recent answers saved: those whose savings exceed what asking them costs are asked, if together they also save what is
paid once a step. The others are asked in turn for at most `_SPARE` of the step's time, and one of them at the latest
after 8 x `probe_every` steps in which nobody was, so that a text that becomes predictable, or a machine that becomes
idle, is noticed. Where nobody is asked no drafter works: k = 0 is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from math import inf

from scheduler.draft_cost import DraftCost
from scheduler.draft_plan import DraftPlan
from scheduler.draft_state import MOST_PATIENCE, DraftState
from scheduler.goodput import Outlook
from scheduler.types import LEARN_MOST, SpeculationSettings

_PROBE_SHARE = 64
"""One decode in so many may verify a draft that does not pay, to keep its estimate alive."""
_SPARE, _SPARE_EARLY = 0.02, 0.05
"""Share of a step's time for proposals that have not paid lately, by the octaves of streams: what drafts can save falls
with them (1 stream 2 %, 8 a half). While there were few proposals at all, the same share for all."""
_EARLY_STEPS = 64
_MASK_RATE = 0.05
_MOST_SPARED = 2
"""Sequences whose price may be set aside for later steps."""
_DEPTHS = (0, 1, 2, 3, 5, 8)
_HYSTERESIS = 1.02
_DEPTH_EVERY = 4


class Asking:
    """Chooses `Span.num_drafts` and `StepPlan.draft_depth`. Asked sequences change their `num_quiet`."""

    def __init__(self, settings: SpeculationSettings, is_selective: bool) -> None:
        self.cost = DraftCost()
        self.row_s = 0.0
        """What verifying one draft more costs: those who are asked to learn how they fare have one verified."""
        self.extra = (0.0, 0.0)
        """What drafting costs in a step beside the drafters: once, and for each sequence."""
        self.mean_masks = 0.5 * settings.mask_block
        """Mask rows of a sequence that asks them."""
        self._settings = settings
        self._is_selective = is_selective
        self._depth = min(1, settings.max_drafts) if settings.has_sequential else 0
        self._credit_s = 0.0
        self._num_steps = 0
        self._num_silent = 0
        self._num_shallow = 0
        self._surplus_s = -inf

    def choose(self, states: Sequence[DraftState], most: int, step_s: float, num_steps: int = 1) -> list[int]:
        """Drafts to ask of each sequence, given the time of the step; `most` is the policy's own limit.

        num_steps  steps like this one since the last call, this one included
        """
        if not self._is_selective:
            for state in states:
                state.wants_masks = state.may_mask
            return [min(most, state.limit) for state in states]
        price_s, mask_s = self._price_s(states), self._mask_s
        is_paid = False
        wishes, unpaid = [], []
        for index, state in enumerate(states):
            limit = state.limit
            state.wants_masks = state.may_mask and (state.is_forced or state.lasts * state.mask_gain_s > mask_s)
            if limit and not state.is_forced and state.worth_s(mask_s) <= price_s:
                state.num_quiet += num_steps
                unpaid.append(index)
                limit = 0
            wishes.append(limit)
            is_paid = is_paid or limit > 0
        self._earn(num_steps * step_s, len(states))
        self._num_silent += num_steps
        for index in self._spare(states, unpaid, is_paid):
            states[index].wants_masks = states[index].may_mask
            # An offer of which nothing is verified teaches nothing.
            states[index].num_unverified += states[index].num_quiet
            states[index].num_quiet = 0
            wishes[index] = states[index].limit
        if any(wishes):
            self._num_silent = 0
            self._spare_masks(states, wishes)
        return wishes

    def _spare_masks(self, states: Sequence[DraftState], wishes: Sequence[int]) -> None:
        """Of those that are asked, but no mask rows, try one that waited long."""
        for state, wish in zip(states, wishes, strict=True):
            if not wish or state.wants_masks or not state.may_mask:
                continue
            state.num_unmasked += 1
            if state.num_unmasked >= self._settings.probe_every and self._credit_s >= self._mask_s:
                self._credit_s -= self._mask_s
                state.num_unmasked, state.wants_masks = 0, True

    def _prices_s(self, depth: int) -> tuple[float, float]:
        """What asking costs: once a step, and for each sequence."""
        once_s, each_s = self.cost.parts(depth)
        return once_s + self.extra[0], each_s + self.extra[1]

    def _price_s(self, states: Sequence[DraftState]) -> float:
        """The gain above which a sequence is asked: what one costs, if those who pay it also pay what is paid once."""
        once_s, each_s = self._prices_s(self._depth)
        surplus_s, mask_s = -once_s, self._mask_s
        for state in states:
            if state.is_forced:
                surplus_s = inf
            elif state.limit and (worth_s := state.worth_s(mask_s)) > each_s:
                surplus_s += worth_s - each_s
        self._surplus_s = surplus_s
        return each_s if surplus_s > 0.0 else inf

    def pays(self, state: DraftState, is_paid: bool) -> bool:
        """Whether to ask one sequence more. is_paid: others of the step are asked.

        Where nobody is, it need not pay alone what is paid once: those who would not pay it without this one will, in
        the next step.
        """
        once_s, each_s = self._prices_s(self._depth)
        is_free = state.is_forced or not self._is_selective
        state.wants_masks = state.may_mask and (is_free or state.lasts * state.mask_gain_s > self._mask_s)
        surplus_s = state.worth_s(self._mask_s) - each_s
        return surplus_s > (0.0 if is_paid else max(0.0, min(once_s, -self._surplus_s)))

    def _spare(self, states: Sequence[DraftState], unpaid: list[int], is_paid: bool) -> list[int]:
        """Of those that have not paid lately, the ones to ask nevertheless: the longest unasked first."""
        count = self._spend(len(unpaid), is_paid)
        # However dear it seems: a price that cannot be learned again is a trap.
        if not count and unpaid and self._num_silent >= MOST_PATIENCE * self._settings.probe_every:
            count = 1
        if not count:
            return []
        longest = nlargest(count, unpaid, key=lambda index: states[index].num_quiet / states[index].patience)
        # What has to be taken in is known now only: later time pays for it.
        num_unseen = sum(states[index].num_quiet for index in longest)
        self._credit_s -= min(LEARN_MOST, num_unseen) * self.cost.unseen_s
        return longest

    def probe(self, states: Sequence[DraftState], lengths: list[int], room: int) -> None:
        """Let a few of those whose `lengths` are 0 verify one draft: without trials an estimate could never recover."""
        probes = min(room, max(1, len(states) // _PROBE_SHARE))
        for index, state in enumerate(states):
            if lengths[index]:
                state.num_unverified = 0
                continue
            state.num_unverified += 1
            if probes > 0 and state.num_unverified >= self._settings.probe_every:
                state.num_unverified = 0
                lengths[index] = 1
                probes -= 1

    def may_try(self, state: DraftState, is_paid: bool, num_tokens: int) -> bool:
        """Whether to ask for a request's first drafts although its like did not pay lately. is_paid: as in `pays`;
        num_tokens: of its prompt, to be taken in."""
        may = state.num_gains == 0 and self._spend(1, is_paid) > 0
        self._credit_s -= may * min(LEARN_MOST, num_tokens) * self.cost.unseen_s
        state.wants_masks = may and state.may_mask
        return may

    def _earn(self, step_s: float, num_seqs: int) -> None:
        is_early = self.cost.num_observed < _EARLY_STEPS
        allowance_s = step_s * (_SPARE_EARLY if is_early else _SPARE / max(1, num_seqs.bit_length()))
        once_s, each_s = self._spare_prices_s()
        self._credit_s = min(self._credit_s + allowance_s, max(allowance_s, once_s + _MOST_SPARED * each_s))

    def _spend(self, most: int, is_paid: bool) -> int:
        """Sequences, up to `most`, that may be asked for the time that is set aside."""
        once_s, each_s = self._spare_prices_s()
        once_s = 0.0 if is_paid else once_s
        if not most or self._credit_s < once_s + each_s:
            return 0
        count = min(most, int((self._credit_s - once_s) / each_s)) if each_s > 0.0 else most
        self._credit_s -= once_s + count * each_s
        return count

    def predict(self, draft: DraftPlan) -> float:
        """Seconds that proposing takes in a step."""
        return self.cost.predict(draft.num_asked, draft.draft_depth, draft.num_masks, draft.num_unseen)

    def learn(self, draft: DraftPlan, seconds: float) -> None:
        """Learn from a step that asked, and how many mask rows a sequence has."""
        if draft.num_masked:
            self.mean_masks += _MASK_RATE * (draft.num_masks / draft.num_masked - self.mean_masks)
        self.cost.observe(draft.num_asked, draft.draft_depth, seconds, draft.num_masks, draft.num_unseen)

    def _spare_prices_s(self) -> tuple[float, float]:
        """Without model drafters: what is paid once, and what each sequence costs with mask rows and a verified row."""
        once_s, each_s = self._prices_s(0)
        return once_s, each_s + self.row_s + self._mask_s

    @property
    def _mask_s(self) -> float:
        """What the mask rows of one sequence cost: in the step, and to be read behind it."""
        any_s, each_s = self.cost.mask_parts
        return self.mean_masks * (self.row_s + each_s) + any_s

    def choose_depth(self, rates: Sequence[float], outlook: Outlook, prefill: int, cutoff: float) -> int:
        """Sequential draft steps at the end of this step, for sequences with these acceptance rates.

        Reconsidered every fourth step, and changed for 2 % more goodput; 0 is left for a step now and then.
        """
        if not self._settings.has_sequential or not rates:
            return 0
        if not self._is_selective:
            return self._settings.max_drafts
        self._num_steps += 1
        if self._num_steps % _DEPTH_EVERY == 0:
            goodputs = {depth: self._goodput(depth, rates, outlook, prefill, cutoff) for depth in self._depths()}
            best = max(goodputs, key=lambda depth: goodputs[depth])
            if goodputs[best] > _HYSTERESIS * goodputs[self._depth]:
                self._depth = best
        if self._depth:
            self._num_shallow = 0
            return self._depth
        self._num_shallow += 1
        if self._num_shallow >= self._settings.probe_every:
            self._num_shallow = 0
            return 1
        return 0

    def _depths(self) -> list[int]:
        return sorted({self._depth, *(depth for depth in _DEPTHS if depth <= self._settings.max_drafts)})

    def _goodput(self, depth: int, rates: Sequence[float], outlook: Outlook, prefill: int, cutoff: float) -> float:
        """As if every step were alike: draft `depth` tokens, verify those above the cut-off."""
        count, value = 0, outlook.value
        for rate in rates:
            survival = rate
            for _ in range(depth):
                if survival < cutoff:
                    break
                count += 1
                value += survival
                survival *= rate
        seconds = outlook.seconds(min(count, outlook.room), prefill) + self.cost.predict(len(rates), depth)
        return (value + outlook.price * prefill) / seconds if seconds > 0.0 else 0.0
