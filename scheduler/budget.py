"""The token budget of a step, chosen from the time-between-tokens target (serving reference A3-A5).

A step in which prompts and decodes meet may take `tbt_slo_s`, or, by default, `tbt_auto_factor` times what a step would
take if all who are here, waiting prompts too, were decoding already: the streams of a burst's beginning do not hold up
the burst. The target is what 99 of 100 steps shall keep to, so a step is planned shorter by what the late steps of the
last while took beyond their prediction. The largest prefill that fits is bought, but never less than `MIN_CHUNK`:
prompts always progress.

Where several models take turns, the target is of a round: a step of each. A model's step may then take its equal part
of the target, less where what the streams of the others need leaves less.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple, Protocol

from scheduler.draft_plan import ALONE, Backlog, DraftPlan, Others
from scheduler.lateness import Lateness
from scheduler.step_cost import StepCost
from scheduler.types import DraftTally, Limits, StepFeatures, StepResult

MIN_CHUNK = 16
"""Fewest prompt tokens per step while decodes run: an unreachable target slows prompts down, it does not stop them."""

_SAFETY = (1.1, 2.2)
"""Bounds of the factor on the predicted time. In between it is the 99th percentile of measured over predicted times."""

_UNKNOWN_SAFETY = 1.2

_BLIND_CHUNK = 64
"""Prompt tokens next to decodes while nothing has been measured yet."""


_DENOISE_LEEWAY = 1.3
"""Without an explicit target, a step with denoise spans may take so much longer than if each of them were a decode."""


class DraftReport(NamedTuple):
    """How a step's drafts fared: accepted ones that became output, and all by drafter and position."""

    num_accepted: int = 0
    tallies: Sequence[DraftTally] = ()


class StepPolicy(Protocol):
    """What decides the size of a step, and learns from it."""

    cost: StepCost

    @property
    def stream_s(self) -> float:
        """Predicted seconds of the last step's decodes by themselves."""
        ...

    def shape(self, draft: DraftPlan, backlog: Backlog | None) -> None:
        """Set the budget of a step whose decodes are placed, and give them drafts. None = no prompt can join."""
        ...

    def finish(self, draft: DraftPlan) -> None:
        """Called when the step's prompts are placed, too."""
        ...

    def predict(self, draft: DraftPlan) -> float:
        """Expected wall seconds of the step; 0 = nothing is known yet."""
        ...

    def learn(self, draft: DraftPlan, result: StepResult, is_timed: bool) -> DraftReport:
        """Learn from a step whose outcomes were absorbed. `is_timed`: its time tells how long such steps take."""
        ...


class BudgetPolicy:
    """The policy without drafts: chooses budgets from a `StepCost`, which it also keeps fitted."""

    def __init__(self, limits: Limits, cost: StepCost) -> None:
        self.cost = cost
        self._limits = limits
        self._decodes = StepFeatures(0)
        self._lateness = Lateness(0.99, _UNKNOWN_SAFETY)

    @property
    def stream_s(self) -> float:
        return self.cost.predict(self._decodes) if self._decodes.tokens and self.cost.is_ready else 0.0

    def target_s(self, decodes: StepFeatures, num_prompts: int, others: Others = ALONE) -> float:
        """Seconds between two tokens of a stream: of a step with these decodes while so many prompts wait to become
        decodes, and of a step of each of the others."""
        if self._limits.tbt_slo_s is not None:
            return self._limits.tbt_slo_s
        undisturbed_s = self.cost.predict(self._soon(decodes, num_prompts)) + others.stream_s
        return self._limits.tbt_auto_factor * undisturbed_s

    def _soon(self, decodes: StepFeatures, num_prompts: int) -> StepFeatures:
        """The decodes once all that wait have joined them, over contexts of the mean length of today's."""
        running = decodes.decode_seqs
        added = min(num_prompts, self._limits.max_seqs - running)
        if added <= 0 or not running:
            return decodes
        context = decodes.context_tokens * (running + added) // running
        return decodes._replace(tokens=decodes.tokens + added, decode_seqs=running + added, context_tokens=context)

    def _safety(self) -> float:
        fewest, most = _SAFETY
        return min(most, max(fewest, self._lateness.factor))

    def bound_s(self, draft: DraftPlan, backlog: Backlog | None) -> float:
        """Longest time that may be predicted for a step with these decodes, which have no drafts yet."""
        self._decodes = decodes = draft.streams
        if not self.cost.is_ready:
            return inf
        others = draft.others
        bound_s = self.target_s(decodes, backlog.num_prompts if backlog else 0, others) / self._safety()
        return bound_s if not others.num else max(0.0, min(bound_s / (1 + others.num), bound_s - others.stream_s))

    def denoise_bound_s(self, streams: StepFeatures, others: Others = ALONE) -> float:
        """Longest time that may be predicted for a step with denoise spans beside decodes, ours or the others'.

        streams  the decodes, and one more for each sequence that denoises
        """
        if not self.cost.is_ready:
            return inf
        if self._limits.tbt_slo_s is not None:
            bound_s = self._limits.tbt_slo_s / self._safety()
        else:
            bound_s = _DENOISE_LEEWAY * (self.cost.predict(streams) + others.stream_s)
        return max(0.0, bound_s - others.stream_s)

    def shape(self, draft: DraftPlan, backlog: Backlog | None) -> None:
        self.fill(draft, backlog, self.bound_s(draft, backlog))

    def fill(self, draft: DraftPlan, backlog: Backlog | None, bound_s: float) -> None:
        """Set the budget: rows of decodes, denoise spans and drafts, and as many of prompts as fit next to them."""
        cap = self._limits.max_batched_tokens
        features = draft.features
        rows = features.tokens
        if backlog is None or (rows == 0 and not draft.others.stream_s):
            draft.budget = cap
            return
        most = max(_BLIND_CHUNK, backlog.fewest)
        if self.cost.is_ready:
            most = self.cost.largest_prefill(features, backlog.start, cap - rows, bound_s)
            most = max(MIN_CHUNK, backlog.fewest, most)
        draft.budget = rows + min(cap - rows, most)

    def finish(self, draft: DraftPlan) -> None:
        """Without drafts nothing is left to do."""

    def predict(self, draft: DraftPlan) -> float:
        return self.cost.predict(draft.features) if self.cost.is_ready else 0.0

    def learn(self, draft: DraftPlan, result: StepResult, is_timed: bool) -> DraftReport:
        if is_timed:
            seconds = result.elapsed_s - result.draft_s
            is_drafting = draft.num_drafts > 0 or draft.num_asked > 0
            self._lateness.observe(self.cost.observe(draft.features, seconds), seconds, is_drafting)
        return DraftReport()
