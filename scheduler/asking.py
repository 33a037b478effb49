"""Which sequences are asked for drafts at the end of a step, and how deep a model drafter may go.

Proposing costs time whether or not the drafts are used, so it must be earned. Per request there is the time that its
recent answers saved: those whose savings exceed what asking them costs are asked, if together they also save what is
paid once a step. The others are asked in turn for at most `_SPARE` of the step's time, and one of them at the latest
after 8 x `probe_every` steps in which nobody was, so that a text that becomes predictable, or a machine that becomes
idle, is noticed. Where nobody is asked no drafter works: k = 0 is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import nlargest
from math import inf
from typing import NamedTuple

from scheduler.draft_cost import DraftCost
from scheduler.draft_plan import DraftPlan
from scheduler.draft_state import MOST_PATIENCE, DraftState
from scheduler.goodput import Outlook
from scheduler.types import SpeculationSettings

_PROBE_SHARE = 64
"""One decode in so many may verify a draft that does not pay, to keep its estimate alive."""
_SPARE, _SPARE_EARLY = 0.02, 0.05
"""Share of a step's time for proposals that have not paid lately, by the octaves of streams: what drafts can save falls
with them (1 stream 2 %, 8 a half). While there were few proposals at all, the same share for all."""
_EARLY_STEPS = 64
_PERSISTENCE = 16
"""Looks that a crowd whose drafts paid is asked for, though they seem not to any more,"""
_LENIENCE = 0.3
"""and of its own price what a sequence must be worth to be asked with them."""
_MASK_RATE = 0.05
_FIRST_OFFERS, _OFFERS_RATE = 0.25, 0.02
_MOST_UNSEEN = 128
"""A price is set for taking in so many tokens at most."""
_MOST_SPARED = 2
"""Sequences whose price may be set aside for later steps."""
_DEPTHS = (0, 1, 2, 3, 5, 8)
_HYSTERESIS = 1.02
_DEPTH_EVERY = 4


class Prices(NamedTuple):
    """Seconds that asking takes: once a step, for each sequence, and more for each with mask rows."""

    once_s: float
    each_s: float
    mask_s: float


class Asking:
    """Chooses `Span.num_drafts` and `StepPlan.draft_depth`. Asked sequences change their `num_quiet`."""

    def __init__(self, settings: SpeculationSettings, is_selective: bool) -> None:
        self.cost = DraftCost()
        self.row_s = 0.0
        """What verifying one draft more costs: those who are asked to learn how they fare have one verified."""
        self.extra = (0.0, 0.0)
        """What drafting costs in a step beside the drafters: once, and for each sequence."""
        self.verifying_s = 0.0
        """What verifying adds to a step once, however many drafts there are."""
        self.mean_offers = _FIRST_OFFERS
        """Share of the answers of which some drafts are worth verifying."""
        self.mean_masks = 0.5 * settings.mask_block
        """Mask rows of a sequence that asks them."""
        self._settings = settings
        self._is_selective = is_selective
        self._depth = min(1, settings.max_drafts) if settings.has_sequential else 0
        self._credit_s = 0.0
        self._num_steps = 0
        self._num_silent = 0
        self._num_masking = 1
        self._num_left = 0
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
        mask_s = self._price_masks(states)
        price_s = self._price_s(states, mask_s)
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
            self._spare_masks(states, wishes, mask_s)
        return wishes

    def price_rows(self, seconds: Callable[[int, int], float], count: int = 0, prefill: int = 0) -> None:
        """Learn what drafts cost in a step that takes `seconds` with (drafts, prompt rows) and has so many."""
        self.row_s = seconds(count + 2, prefill) - seconds(count + 1, prefill)
        self.verifying_s = max(0.0, seconds(1, prefill) - seconds(0, prefill) - self.row_s)

    def _spare_masks(self, states: Sequence[DraftState], wishes: Sequence[int], mask_s: float) -> None:
        """Of those that are asked, but no mask rows, try one that waited long."""
        for state, wish in zip(states, wishes, strict=True):
            if not wish or state.wants_masks or not state.may_mask:
                continue
            state.num_unmasked += 1
            if state.num_unmasked >= self._settings.probe_every and self._credit_s >= mask_s:
                self._credit_s -= mask_s
                state.num_unmasked, state.wants_masks = 0, True

    def _prices_s(self, depth: int) -> tuple[float, float]:
        """What asking costs: once a step, and for each sequence."""
        once_s, each_s = self.cost.parts(depth)
        return once_s + self.extra[0], each_s + self.extra[1]

    def _price_s(self, states: Sequence[DraftState], mask_s: float) -> float:
        """The gain above which a sequence is asked: a part of what one costs, if those who pay all of it also pay what
        is paid once, or did so lately."""
        once_s, each_s = self._prices_s(self._depth)
        surplus_s = -once_s
        for state in states:
            if state.is_forced:
                surplus_s = inf
            elif state.limit and (worth_s := state.worth_s(mask_s)) > each_s:
                surplus_s += worth_s - each_s
        self._surplus_s = surplus_s
        # What a crowd costs and saves is known only while it drafts: single answers are dearer, and few.
        self._num_left = _PERSISTENCE if surplus_s > 0.0 else self._num_left - 1
        return _LENIENCE * each_s if self._num_left > 0 else inf

    def prices(self) -> Prices:
        """For the sequences that are to be asked beside those of the last look."""
        return Prices(*self._prices_s(self._depth), self._mask_s(self._num_masking))

    def pays(self, state: DraftState, is_paid: bool, prices: Prices) -> bool:
        """Whether to ask one sequence more. is_paid: others of the step are asked.

        Where nobody is, it need not pay alone what is paid once: those who would not pay it without this one will, in
        the next step.
        """
        once_s, each_s, mask_s = prices
        is_free = state.is_forced or not self._is_selective
        state.wants_masks = state.may_mask and (is_free or state.lasts * state.mask_gain_s > mask_s)
        surplus_s = state.worth_s(mask_s) - each_s
        return surplus_s > (0.0 if is_paid else max(0.0, min(once_s, -self._surplus_s)))

    def _spare(self, states: Sequence[DraftState], unpaid: list[int], is_paid: bool) -> list[int]:
        """Of those that have not paid lately, the ones to ask nevertheless: the longest unasked first."""
        _, each_s = self._spare_prices_s()
        count = min(len(unpaid), int(self._credit_s / each_s)) if each_s > 0.0 else len(unpaid)
        # However dear it seems: a price that cannot be learned again is a trap.
        is_overdue = not is_paid and self._num_silent >= MOST_PATIENCE * self._settings.probe_every
        if not count and not (is_overdue and unpaid):
            return []
        longest = nlargest(max(1, count), unpaid, key=lambda at: states[at].num_quiet / states[at].patience)
        chosen = list[int]()
        for index in longest:
            if not self._spend(states[index], is_paid or bool(chosen)):
                break
            chosen.append(index)
        return chosen or longest[:is_overdue]

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

    def may_try(self, state: DraftState, is_paid: bool) -> bool:
        """Whether to ask for a request's first drafts although its like did not pay lately. is_paid: as in `pays`."""
        may = state.num_gains == 0 and self._spend(state, is_paid)
        state.wants_masks = may and state.may_mask
        return may

    def _earn(self, step_s: float, num_seqs: int) -> None:
        is_early = self.cost.num_observed < _EARLY_STEPS
        allowance_s = step_s * (_SPARE_EARLY if is_early else _SPARE / max(1, num_seqs.bit_length()))
        once_s, each_s = self._spare_prices_s()
        most_s = once_s + _MOST_SPARED * (each_s + _MOST_UNSEEN * self.cost.unseen_s)
        self._credit_s = min(self._credit_s + allowance_s, max(allowance_s, most_s))

    def observe_offer(self, is_some: bool) -> None:
        """Learn from an answer whether any of it is worth verifying."""
        self.mean_offers += _OFFERS_RATE * (is_some - self.mean_offers)

    def share_s(self, num_seqs: int) -> float:
        """What one offer bears of what verifying costs once a step, where all of so many sequences are asked."""
        return self.verifying_s / max(1.0, self.mean_offers * num_seqs)

    def _spend(self, state: DraftState, is_paid: bool) -> bool:
        """Whether the time that is set aside is enough to ask a sequence, and take it if it is."""
        once_s, each_s = self._spare_prices_s()
        price_s = each_s + (0.0 if is_paid else once_s) + min(_MOST_UNSEEN, state.num_quiet) * self.cost.unseen_s
        if self._credit_s < price_s:
            return False
        self._credit_s -= price_s
        return True

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
        return once_s, each_s + self.row_s + self._mask_s(1)

    def _mask_s(self, num_seqs: int) -> float:
        """What the mask rows of one of so many sequences cost: in the step, and to be read behind it."""
        any_s, each_s = self.cost.mask_parts
        return self.mean_masks * (self.row_s + each_s) + any_s / num_seqs

    def _price_masks(self, states: Sequence[DraftState]) -> float:
        """What they cost each of those that want them, if all do that would if the reading cost nothing once."""
        if not self._settings.mask_block:
            return self._mask_s(1)
        own_s = self._mask_s(1) - self.cost.mask_parts[0]
        self._num_masking = max(1, sum(state.may_mask and state.lasts * state.mask_gain_s > own_s for state in states))
        return self._mask_s(self._num_masking)

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
