"""What is known of one request's drafts, and what a new request may expect of its first ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from scheduler.acceptance import RequestCounts
from scheduler.types import Speculation, SpeculationMode

_GAIN_RATE = 0.25
MOST_PATIENCE = 8
"""A request waits twice as long as others with each probe in vain, up to so many times."""
_FIRST_RATE = 0.1


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
    mask_gain_s what answers of mask rows saved, in the steps that had such rows; inf = unknown
    num_masked  answers of steps with mask rows so far; num_unmasked steps with drafts since the last one
    wants_masks mask rows are asked as well; is_masked the latest step had room for them
    num_quiet   steps since drafts were asked for; num_unverified since one was verified although some were offered
    patience    how many probing intervals it waits until it is asked again
    source      name of the drafter of the last offer
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
    num_quiet: int = 0
    num_unverified: int = 0
    source: str = ""

    def gained(self, seconds: float, is_of_masks: bool = False) -> None:
        """A mean and nothing more: what pays now and then must pay for the answers in between. A mean that rose faster
        than it falls would be half as much again where every other answer is empty."""
        self.patience = 1 if seconds > 0.0 else min(MOST_PATIENCE, 2 * self.patience)
        if self.is_masked:
            self.num_masked += 1
            self.mask_gain_s = _mean(self.mask_gain_s, seconds if is_of_masks else 0.0)
        if not is_of_masks:
            self.num_gains += 1
            self.gain_s = _mean(self.gain_s, seconds)

    def worth_s(self, mask_s: float) -> float:
        """Seconds that asking saves, where mask rows cost `mask_s`; what is of no use is left out."""
        return self.gain_s + (max(0.0, self.mask_gain_s - mask_s) if self.may_mask else 0.0)


def _mean(old: float, new: float) -> float:
    return new if old == inf else old + _GAIN_RATE * (new - old)


class FirstGain:
    """What requests' first offers saved on average: what a new one may expect. inf = nothing is known yet.

    Later offers do not count: those whose first one saved something are asked more often.
    """

    def __init__(self) -> None:
        self.seconds = inf

    def observe(self, num_before: int, seconds: float) -> None:
        """num_before: offers that the request had had."""
        if num_before == 0:
            self.seconds = seconds if self.seconds == inf else self.seconds + _FIRST_RATE * (seconds - self.seconds)


def make_state(asked: Speculation, max_drafts: int, gain_s: float) -> DraftState:
    limit = max_drafts if asked.max_tokens is None else min(max_drafts, asked.max_tokens)
    if asked.mode is SpeculationMode.OFF:
        limit = 0
    return DraftState(limit, asked.mode is SpeculationMode.ON, asked.tree is not False, gain_s)
