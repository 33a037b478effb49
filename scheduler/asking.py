"""Which sequences are asked for drafts at the end of a step, and how deep a model drafter may go.

Proposing costs time whether or not the drafts are used, so it must be earned. Per request there is the time that its
recent offers saved: those whose savings exceed the measured cost of proposing are asked. The others are asked in turn
for at most `_SPARE` of the step's time, and each of them every `probe_every` steps, so that a text that becomes
predictable, or a machine that becomes idle, is noticed. Where nobody is asked no drafter works: k = 0 is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from scheduler.acceptance import RequestCounts
from scheduler.goodput import Outlook
from scheduler.regression import NonNegativeRidge
from scheduler.types import Speculation, SpeculationMode, SpeculationSettings

_SPARE = 0.01
"""Share of a step's time for proposals that have not paid lately."""
_GAIN_DECAY = 0.3
_DEPTHS = (0, 1, 2, 3, 5, 8)
_HYSTERESIS = 1.02
_DEPTH_EVERY = 4
_UNIT_S = 1e-3
_SWEEPS = 8
_NUM_EARLY, _CLIP, _FLOOR_S = 8, 2.0, 2e-5


@dataclass(slots=True)
class DraftState:
    """What is known of one request's drafts.

    limit       most drafts in one step; 0 = never
    is_forced   drafts are verified as offered, whatever they pay (SpeculationMode.ON)
    survivals   estimates for the offer that waits for the next span
    gain_s      seconds that an offer saved lately, inf = unknown; it rises at once and falls slowly
    num_quiet   steps since drafts were asked for; num_unverified since one was verified although some were offered
    source      name of the drafter of the last offer
    """

    limit: int
    is_forced: bool = False
    takes_trees: bool = True
    gain_s: float = inf
    counts: RequestCounts = field(default_factory=RequestCounts)
    survivals: list[float] = field(default_factory=list)
    num_quiet: int = 0
    num_unverified: int = 0
    source: str = ""

    def gained(self, seconds: float) -> None:
        if self.gain_s == inf:
            self.gain_s = seconds
        self.gain_s = max(seconds, self.gain_s + _GAIN_DECAY * (seconds - self.gain_s))


def make_state(asked: Speculation, max_drafts: int, gain_s: float) -> DraftState:
    limit = max_drafts if asked.max_tokens is None else min(max_drafts, asked.max_tokens)
    if asked.mode is SpeculationMode.OFF:
        limit = 0
    return DraftState(limit, asked.mode is SpeculationMode.ON, asked.tree is not False, gain_s)


class DraftCost:
    """Seconds that proposing takes: (1 + sequences) for lookups, depth x (1 + sequences) for model drafters."""

    def __init__(self) -> None:
        self._model = NonNegativeRidge((1.0, 0.1, 0.2, 0.02), forgetting=0.97)
        self._num_observed = 0

    def observe(self, num_asked: int, depth: int, seconds: float) -> None:
        """Learn from a step. What is far above the expected (a neighbour took the core) is clipped."""
        self._num_observed += 1
        if self._num_observed > _NUM_EARLY:
            seconds = min(seconds, _CLIP * max(self.predict(num_asked, depth), _FLOOR_S))
        self._model.accumulate(_terms(num_asked, depth), seconds, _UNIT_S)
        self._model.fit(_SWEEPS)

    def predict(self, num_asked: int, depth: int) -> float:
        return self._model.predict(_terms(num_asked, depth)) if num_asked else 0.0

    def per_sequence(self, num_seqs: int, depth: int) -> float:
        """Of one sequence among `num_seqs`: its share of what is paid once."""
        return self.predict(num_seqs, depth) / max(1, num_seqs)


def _terms(num_asked: int, depth: int) -> tuple[float, ...]:
    return 1.0, num_asked, depth, depth * num_asked


class Asking:
    """Chooses `Span.num_drafts` and `StepPlan.draft_depth`. Asked sequences change their `num_quiet`."""

    def __init__(self, settings: SpeculationSettings, is_selective: bool) -> None:
        self.cost = DraftCost()
        self._settings = settings
        self._is_selective = is_selective
        self._depth = min(1, settings.max_drafts) if settings.has_sequential else 0
        self._credit_s = 0.0
        self._num_steps = 0
        self._num_shallow = 0

    def choose(self, states: Sequence[DraftState], most: int, step_s: float) -> list[int]:
        """Drafts to ask of each sequence, given the time of the step; `most` is the policy's own limit."""
        if not self._is_selective:
            return [min(most, state.limit) for state in states]
        price_s = self.cost.per_sequence(len(states), self._depth)
        wishes, unpaid = [], []
        for index, state in enumerate(states):
            limit = state.limit
            if limit and not state.is_forced and state.gain_s <= price_s:
                state.num_quiet += 1
                unpaid.append(index)
                limit = 0
            wishes.append(limit)
        for index in self._spare(states, unpaid, step_s):
            states[index].num_quiet = 0
            wishes[index] = states[index].limit
        return wishes

    def _spare(self, states: Sequence[DraftState], unpaid: list[int], step_s: float) -> list[int]:
        """Of those that have not paid lately, the ones to ask nevertheless: the longest unasked first."""
        if not unpaid:
            return []
        price_s = self.cost.predict(1, 0)
        unpaid.sort(key=lambda index: -states[index].num_quiet)
        allowance_s = _SPARE * step_s
        self._credit_s = min(self._credit_s + allowance_s, max(allowance_s, price_s))
        count = len(unpaid)
        if price_s > 0.0:
            count = min(count, int(self._credit_s / price_s))
            self._credit_s -= count * price_s
        every = self._settings.probe_every
        due = sum(1 for index in unpaid[: -(-len(states) // every)] if states[index].num_quiet >= every)
        return unpaid[: max(count, due)]

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
