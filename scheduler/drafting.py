"""The step policy with drafts: which are verified, which are asked for, and what their fate teaches.

Wraps the budget policy. Each step: the offers that wait are rated (`acceptance.py`), as many are verified as finish the
most tokens per second (`goodput.py`), and new ones are asked for where they will probably pay (`asking.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

from scheduler.acceptance import Acceptance
from scheduler.asking import Asking
from scheduler.attention import leaves_keys_out
from scheduler.budget import MIN_CHUNK, BudgetPolicy, DraftReport, StepPolicy
from scheduler.decoding.drafts import accepted_path, chain_length, is_well_formed
from scheduler.draft_plan import Backlog, DraftPlan
from scheduler.draft_state import DraftState, FirstGains, make_state
from scheduler.goodput import Allocation, Outlook, make_policy, saved_seconds
from scheduler.host_cost import HostCost
from scheduler.kv_memory import KVMemory
from scheduler.lookout import Lookout
from scheduler.placing import Placing
from scheduler.prompt_price import PromptPrice
from scheduler.sequence import Sequence
from scheduler.types import DraftTally, Limits, Outcome, SpeculationSettings, StepResult

_DRAFT_LEEWAY = 2.0
"""Without an explicit target a step may take so much longer for drafts than for prompts: drafts pay in tokens."""
_LEEWAY_BESIDE = 1.25
"""Beside streams of another model, over what our own need without drafts: an equal part of a target may be less."""


class _Offer(NamedTuple):
    """The drafts that wait for the decode in `row`: estimates of those that may be verified."""

    row: int
    state: DraftState
    survivals: list[float]


def make_step_policy(
    budget: BudgetPolicy, limits: Limits, memory: KVMemory, speculation: SpeculationSettings | None
) -> StepPolicy:
    """Without settings no drafter is ever asked. Raises ValueError for settings that contradict themselves."""
    return budget if speculation is None else DraftingPolicy(budget, limits, memory, speculation)


class DraftingPolicy:
    """A `StepPolicy`. One per scheduler; the state of each request is `Sequence.drafting`."""

    def __init__(self, budget: BudgetPolicy, limits: Limits, memory: KVMemory, settings: SpeculationSettings) -> None:
        self.cost = budget.cost
        self.acceptance = Acceptance()
        self._budget = budget
        self._limits = limits
        self._memory = memory
        self._settings = settings
        self._policy = make_policy(settings)
        self._asking = Asking(settings, self._policy.is_selective)
        self._placing = Placing(limits, memory, settings)
        self._most_masks = limits.max_batched_tokens
        self._first_gains = FirstGains()
        self._host = HostCost()
        self._lookout = Lookout()
        self._worked = 0, 0, False
        self._price = PromptPrice(settings.price)
        self._draft_s = 0.0

    @property
    def stream_s(self) -> float:
        return self._budget.stream_s

    @property
    def host_s(self) -> float:
        """Seconds that a step without drafts takes beside the worker's."""
        return self._host.plain_s

    def shape(self, draft: DraftPlan, backlog: Backlog | None) -> None:
        bound_s = self._budget.bound_s(draft, backlog)
        if self._lookout.is_due(draft.num_decodes):
            if draft.host_s is not None:
                self._host.observe(draft.host_s, *self._worked)
                self._asking.extra = self._host.asking
            if draft.num_decodes and self.cost.is_ready:
                self._draft(draft, backlog, bound_s)
        self._budget.fill(draft, backlog, bound_s)

    def _draft(self, draft: DraftPlan, backlog: Backlog | None, bound_s: float) -> None:
        """Verify what waits and pays, ask for what may pay."""
        states = [seq.drafting or self._meet(seq) for seq in draft.owners[: draft.num_decodes]]
        is_quiet = backlog is None and not any(state.is_forced for state in states)
        if self._policy.is_selective and self._host.is_stale and is_quiet:
            return
        for state in states:
            self._first_gains.expect(state, draft.num_decodes)
            state.lasts = self._price.lasts
        offers = self._offers(draft, states)
        if offers or self._settings.has_sequential:
            free = [offer for offer in offers if not offer.state.is_forced]
            forced = [offer for offer in offers if offer.state.is_forced]
            lengths = self._force(draft, forced, backlog)
            outlook = self._outlook(draft, backlog, bound_s, forced, lengths)
            allocation = self._policy.allocate([offer.survivals for offer in free], outlook)
            self._note_gains(free, allocation, outlook)
            room = outlook.room - sum(allocation.lengths)
            self._asking.probe([offer.state for offer in free], allocation.lengths, room)
            lengths |= zip((offer.row for offer in free), allocation.lengths, strict=True)
            count, prefill = sum(allocation.lengths), min(allocation.prefill, outlook.fewest)
            step_s = outlook.seconds(count, prefill)
            self._asking.row_s = outlook.seconds(count + 2, prefill) - outlook.seconds(count + 1, prefill)
            wishes = self._ask(draft, states, allocation, outlook)
            self._place(draft, lengths, wishes, outlook.draft_bound_s - step_s)
            return
        # The usual step of those who draft nothing: no plan to compare with others, only whether to ask.
        features = draft.features
        target_s = self.cost.predict(features)
        one_more = features._replace(tokens=features.tokens + 1, judged=features.judged + 1)
        self._asking.row_s = self.cost.predict(one_more) - target_s
        step_s = self._draft_s + self.host_s + target_s
        draft.goodput = (draft.num_decodes + draft.denoise_value) / step_s if step_s > 0.0 else 0.0
        most, num_steps = self._policy.most(draft.num_decodes), 1 + self._lookout.num_skipped
        wishes = self._asking.choose(states, most, step_s, num_steps)
        self._lookout.saw(any(wishes))
        if any(wishes):
            self._place(draft, {}, wishes, self._draft_bound_s(draft, backlog, bound_s) - target_s)

    def _meet(self, seq: Sequence) -> DraftState:
        seq.drafting = state = make_state(seq.request.speculation, self._settings.max_drafts)
        names = ("auto", self._settings.mask_drafter)
        state.may_mask = state.wants_masks = self._settings.mask_block > 0 and seq.request.speculation.drafter in names
        state.takes_trees = state.takes_trees and not leaves_keys_out(seq.request.attention)
        return state

    def _offers(self, draft: DraftPlan, states: Many[DraftState]) -> list[_Offer]:
        offers = []
        may_branch = draft.num_decodes <= self._settings.tree_max_seqs
        for row, (seq, state) in enumerate(zip(draft.owners, states, strict=False)):
            drafts = seq.decoding.drafts
            if drafts is None or not state.limit:
                continue
            most = min(len(drafts.tokens), state.limit, seq.decoding.most_drafts)
            if drafts.parents and not (may_branch and state.takes_trees):
                most = min(most, chain_length(drafts))
            if most > 0:
                offers.append(_Offer(row, state, state.survivals[:most]))
        return offers

    def _force(self, draft: DraftPlan, forced: Many[_Offer], backlog: Backlog | None) -> dict[int, int]:
        """Drafts of requests that want all that are offered, as far as the budget goes (R1)."""
        room = self._limits.max_batched_tokens - draft.num_decodes - draft.num_denoise
        room = max(0, room - min(backlog.tokens, max(MIN_CHUNK, backlog.fewest))) if backlog else room
        lengths = {}
        for offer in forced:
            lengths[offer.row] = min(room, len(offer.survivals))
            room -= lengths[offer.row]
        return lengths

    def _outlook(
        self,
        draft: DraftPlan,
        backlog: Backlog | None,
        bound_s: float,
        forced: Many[_Offer],
        lengths: dict[int, int],
    ) -> Outlook:
        curve = self.cost.curve(draft.features, backlog.start if backlog else 0)
        taken, host_s, host = sum(lengths.values()), self.host_s, self._host
        overhead_s = self._draft_s + host_s
        waiting = backlog.tokens if backlog else 0
        value = sum(sum(offer.survivals[: lengths[offer.row]]) for offer in forced)
        return Outlook(
            value=draft.num_decodes + draft.denoise_value + value,
            room=self._limits.max_batched_tokens - draft.num_decodes - draft.num_denoise - taken,
            backlog=waiting,
            price=self._price.value,
            seconds=lambda drafts, rows: overhead_s + host.verifying_s(taken + drafts) + curve(taken + drafts, rows),
            bound_s=bound_s + host_s,
            fewest=min(waiting, max(MIN_CHUNK, backlog.fewest)) if backlog else 0,
            draft_bound_s=host_s + self._draft_bound_s(draft, backlog, bound_s),
        )

    def _draft_bound_s(self, draft: DraftPlan, backlog: Backlog | None, bound_s: float) -> float:
        """Our streams may gain by a long step what it costs them; those of another model only wait. Beside prompts the
        bound holds for both together: those without drafts would pay for the others' twice."""
        if self._limits.tbt_slo_s is not None or backlog is not None:
            return bound_s
        if draft.others.stream_s > 0.0:
            return max(bound_s, _LEEWAY_BESIDE * self._budget.stream_s)
        return _DRAFT_LEEWAY * bound_s

    def _note_gains(self, offers: Many[_Offer], allocation: Allocation, outlook: Outlook) -> None:
        """What each offer saves: its share, by expected tokens, of the time that the step saves over plain decoding."""
        tokens = [sum(offer.survivals[:n]) for offer, n in zip(offers, allocation.lengths, strict=True)]
        total = sum(tokens)
        saved_s = max(0.0, saved_seconds(allocation, outlook, self._draft_s)) if total > 0.0 else 0.0
        for offer, expected in zip(offers, tokens, strict=True):
            self._gained(offer.state, saved_s * expected / total if saved_s else 0.0)
            offer.state.lasts = self._price.lasts ** (1.0 + expected)

    def _gained(self, state: DraftState, seconds: float) -> None:
        is_of_masks = state.source == self._settings.mask_drafter
        self._first_gains.observe(state, seconds, is_of_masks)
        state.gained(seconds, is_of_masks)

    def _ask(self, draft: DraftPlan, states: list[DraftState], allocation: Allocation, outlook: Outlook) -> list[int]:
        """Drafts wanted of each decode at the end of this step."""
        prefill, step_s = allocation.prefill, outlook.seconds(sum(allocation.lengths), allocation.prefill)
        if step_s > 0.0:
            draft.goodput = allocation.goodput - outlook.price * prefill / step_s
        wishes = self._asking.choose(states, self._policy.most(draft.num_decodes), step_s)
        if self._settings.has_sequential:
            rates = [self.acceptance.mean_rate(state.source, state.counts) for state in states if state.limit]
            forced = [state.limit for state in states if state.is_forced]
            draft.draft_depth = max(self._asking.choose_depth(rates, outlook, prefill, allocation.cutoff), *forced, 0)
        return wishes

    def _place(self, draft: DraftPlan, lengths: dict[int, int], wishes: list[int], left_s: float) -> None:
        """left_s: by which the step may become longer for mask rows."""
        if self._settings.mask_block:
            row_s, rows = self._asking.row_s, draft.features.tokens + sum(lengths.values())
            room = max(0, self._limits.max_batched_tokens - rows - MIN_CHUNK)
            self._most_masks = room if row_s <= 0.0 or left_s >= room * row_s else max(0, int(left_s / row_s))
        self._placing.place(draft, lengths, wishes, self._most_masks)

    def finish(self, draft: DraftPlan) -> None:
        """Ask for the first drafts of prompts that end in this step."""
        if draft.num_prefill and self.cost.is_ready and (ending := draft.ending):
            self._ask_first(draft, ending)
        if not draft.num_asked:
            draft.draft_depth = 0

    def _ask_first(self, draft: DraftPlan, ending: list[int]) -> None:
        """ending: rows of the spans. Where nobody decodes, nobody waits for masks."""
        num_soon = draft.num_decodes + len(ending)
        most = self._policy.most(num_soon)
        most_masks = self._limits.max_batched_tokens - draft.features.tokens + draft.num_masks
        if num_soon > 1 or draft.num_denoising or draft.others.stream_s > 0.0:
            most_masks = min(most_masks, self._most_masks)
        for index in ending:
            seq = draft.owners[index]
            state = seq.drafting or self._meet(seq)
            self._first_gains.expect(state, num_soon)
            state.lasts = self._price.lasts
            wish = min(state.limit, most, seq.decoding.most_drafts)
            is_free, is_paid = state.is_forced or not self._policy.is_selective, draft.num_asked > 0
            may = is_free or self._asking.pays(state, is_paid) or self._asking.may_try(state, is_paid, len(seq.tokens))
            if not may:
                continue
            if wish and self._placing.place_first(draft, index, wish, most_masks):
                self._lookout.wake()

    def predict(self, draft: DraftPlan) -> float:
        target_s = self._budget.predict(draft)
        return target_s + self._asking.predict(draft) if target_s and draft.num_asked else target_s

    def learn(self, draft: DraftPlan, result: StepResult, is_timed: bool) -> DraftReport:
        self._budget.learn(draft, result, is_timed)
        self._worked = draft.num_asked, draft.num_drafts, draft.num_prefill > 0
        if is_timed:
            self._draft_s += 0.1 * (result.draft_s - self._draft_s)
            if draft.num_asked:
                self._asking.learn(draft, result.draft_s)
        report = self._observe(draft, result.outcomes) if draft.verified else DraftReport()
        for seq in draft.owners:
            if seq.finish_reason is not None:
                self._price.learn(seq)
        if draft.num_asked:
            for seq, span, outcome in zip(draft.owners, draft.spans, result.outcomes, strict=True):
                if span.num_drafts and seq.finish_reason is None:
                    self._receive(seq, span.num_drafts, outcome)
        return report

    def _observe(self, draft: DraftPlan, outcomes: Many[Outcome]) -> DraftReport:
        """How the drafts fared. One behind the end of the text is worth no more than a wrong one."""
        num_accepted = 0
        tallies: dict[tuple[str, int], Many[int]] = {}
        for row, drafts, length in draft.verified:
            seq, span = draft.owners[row], draft.spans[row]
            path = accepted_path(span, outcomes[row].tokens)
            if path is None or seq.drafting is None:
                continue
            path = path[: len(seq.tokens) - span.start - 1]
            num_accepted += len(path)
            found = self.acceptance.observe(drafts, length, path, seq.drafting.counts, seq.drafting.survivals)
            for source, depth, *counts in found:
                old = tallies.get((source, depth), (0, 0, 0))
                tallies[source, depth] = [a + b for a, b in zip(old, counts, strict=True)]
        return DraftReport(num_accepted, [DraftTally(*key, *row) for key, row in sorted(tallies.items())])

    def _receive(self, seq: Sequence, num_asked: int, outcome: Outcome) -> None:
        """Rate an offer, or drop one that cannot be verified."""
        state, drafts = seq.drafting, seq.decoding.drafts
        assert state is not None, "drafts were asked of a sequence without a state"
        if drafts is None or len(drafts.tokens) > num_asked or not is_well_formed(drafts):
            seq.decoding.drafts, state.source = None, ""
            self._gained(state, 0.0)
            return
        state.source = drafts.source
        state.survivals = self.acceptance.survivals(drafts, state.counts)
