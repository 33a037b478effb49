"""The token budget of a step, chosen from the time-between-tokens target (serving reference A3-A5).

A step in which prompts and decodes meet may take `tbt_slo_s`, or, by default, `tbt_auto_factor` times what the
decodes alone would take. The largest prefill that fits is bought, but never less than `MIN_CHUNK`: prompts always
progress.
"""

from __future__ import annotations

from scheduler.step_cost import StepCost
from scheduler.types import Limits, StepFeatures

MIN_CHUNK = 16
"""Fewest prompt tokens per step while decodes run: an unreachable target slows prompts down, it does not stop them."""

_SAFETY = (1.1, 1.6)
"""Bounds of the factor on the predicted time. In between it is 1 + 3 x the mean relative error of the predictions: for
normal noise of that size, about 1 % of the steps take longer than that."""

_BLIND_CHUNK = 64
"""Prompt tokens next to decodes while nothing has been measured yet."""


class BudgetPolicy:
    """Chooses budgets from a `StepCost`, which it also keeps fitted."""

    def __init__(self, limits: Limits, cost: StepCost) -> None:
        self.cost = cost
        self._limits = limits

    def target_s(self, decodes: StepFeatures) -> float:
        """Seconds that a step with these decodes may take."""
        if self._limits.tbt_slo_s is not None:
            return self._limits.tbt_slo_s
        return self._limits.tbt_auto_factor * self.cost.predict(decodes)

    def _safety(self) -> float:
        fewest, most = _SAFETY
        return min(most, max(fewest, 1.0 + 3.0 * self.cost.mean_error))

    def choose(self, decodes: StepFeatures, prompt_start: int) -> int:
        """Budget in tokens, decodes included. `prompt_start` = KV index where the first waiting prompt goes on."""
        cap = self._limits.max_batched_tokens
        num_decodes = decodes.tokens
        if num_decodes == 0:
            return cap
        room = cap - num_decodes
        if not self.cost.is_ready:
            return num_decodes + min(room, _BLIND_CHUNK)
        rows = self.cost.largest_prefill(decodes, prompt_start, room, self.target_s(decodes) / self._safety())
        return num_decodes + min(room, max(rows, MIN_CHUNK))

    def predict(self, features: StepFeatures) -> float:
        return self.cost.predict(features) if self.cost.is_ready else 0.0
