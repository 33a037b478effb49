"""What is known of one request's drafts, and what a new request may expect of its first ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from scheduler.acceptance import RequestCounts
from scheduler.types import Speculation, SpeculationMode

_GAIN_RATE = 0.25
MOST_PATIENCE = 8
"""A request waits twice as long as others with each probe in vain, up to so many times."""
_FIRST_RATE = 0.2
_MOST_LOADS_APART = 1


@dataclass(slots=True)
class DraftState:
    """What is known of one request's drafts.

    limit       most drafts in one step; 0 = never
    is_forced   drafts are verified as offered, whatever they pay (SpeculationMode.ON)
    survivals   estimates for the offer that waits for the next span
    gain_s      seconds that an answer saved lately, those that offered nothing included; inf = unknown. What answers of
                mask rows saved is not in it: what another drafter would have offered in their place is not known
    num_gains   answers so far
    may_mask    mask rows may be asked for this request's drafts
    mask_gain_s what answers of mask rows saved, in the steps that wanted such rows, with room for them or not;
                inf = unknown
    num_masked  answers of steps that wanted mask rows so far; num_unmasked steps with drafts since the last one
    wants_masks mask rows are asked as well; is_masked the latest step had room for them
    num_seen    tokens of the text when drafts were last asked for: what drafters have taken in (0 after a preemption)
    num_quiet   steps since drafts were asked for; num_unverified since one was verified although some were offered
    patience    how many probing intervals it waits until it is asked again
    source      name of the drafter of the last offer
    load        class of load (`FirstGains`) that gain_s and mask_gain_s are of
    lasts       probability that the text goes on behind the step that is planned: if not, what is asked in it is lost
    is_first, is_first_masked   no answer has been counted since they were last set to what others' first ones saved
    """

    limit: int
    is_forced: bool = False
    takes_trees: bool = True
    gain_s: float = inf
    num_gains: int = 0
    may_mask: bool = False
    mask_gain_s: float = inf
    num_masked: int = 0
    num_unmasked: int = 0
    wants_masks: bool = False
    is_masked: bool = False
    patience: int = 1
    counts: RequestCounts = field(default_factory=RequestCounts)
    survivals: list[float] = field(default_factory=list)
    num_seen: int = 0
    num_quiet: int = 0
    num_unverified: int = 0
    source: str = ""
    load: int = 0
    lasts: float = 1.0
    is_first: bool = True
    is_first_masked: bool = True

    def gained(self, seconds: float, is_of_masks: bool = False) -> None:
        """A mean and nothing more: what pays now and then must pay for the answers in between. A mean that rose faster
        than it falls would be half as much again where every other answer is empty."""
        self.patience = 1 if seconds > 0.0 else min(MOST_PATIENCE, 2 * self.patience)
        if self.wants_masks:
            self.num_masked += 1
            self.mask_gain_s = _mean(self.mask_gain_s, seconds if is_of_masks else 0.0)
        if not is_of_masks:
            self.num_gains += 1
            self.gain_s = _mean(self.gain_s, seconds)

    def worth_s(self, mask_s: float) -> float:
        """Seconds that asking saves, where mask rows cost `mask_s`; what is of no use is left out."""
        return self.lasts * self.gain_s + (max(0.0, self.lasts * self.mask_gain_s - mask_s) if self.may_mask else 0.0)


def _mean(old: float, new: float) -> float:
    return new if old == inf else old + _GAIN_RATE * (new - old)


class FirstGains:
    """What first offers saved on average: what a new request may expect. inf = nothing is known yet.

    Kept apart by the octave of the number of decodes: what a draft saves falls with it, and where 32 streams have
    taught that drafts do not pay, one stream would wait long to find out that they do. A request that has come into
    another load expects what new ones do. Later offers do not count: those whose first one saved something are asked
    more often.
    """

    def __init__(self) -> None:
        self._means: dict[tuple[int, bool], float] = {}

    def expect(self, state: DraftState, num_decodes: int) -> None:
        """Let a request expect what others got under this load, if it is new or its own record is of quite another."""
        load = num_decodes.bit_length()
        if state.load and abs(state.load - load) <= _MOST_LOADS_APART:
            return
        state.load, state.is_first, state.is_first_masked = load, True, True
        state.gain_s, state.mask_gain_s = self._means.get((load, False), inf), self._means.get((load, True), inf)

    def observe(self, state: DraftState, seconds: float, is_of_masks: bool) -> None:
        """An answer that the request has not counted yet."""
        if state.wants_masks and state.is_first_masked:
            state.is_first_masked = False
            self._learn(state.load, True, seconds if is_of_masks else 0.0)
        if not is_of_masks and state.is_first:
            state.is_first = False
            self._learn(state.load, False, seconds)

    def _learn(self, load: int, is_masked: bool, seconds: float) -> None:
        old = self._means.get((load, is_masked), seconds)
        self._means[load, is_masked] = old + _FIRST_RATE * (seconds - old)


def make_state(asked: Speculation, max_drafts: int) -> DraftState:
    limit = max_drafts if asked.max_tokens is None else min(max_drafts, asked.max_tokens)
    if asked.mode is SpeculationMode.OFF:
        limit = 0
    return DraftState(limit, asked.mode is SpeculationMode.ON, asked.tree is not False)
