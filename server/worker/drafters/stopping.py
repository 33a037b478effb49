"""How likely a model's next draft is accepted, and when it is no longer worth drafting on.

An estimate is made from what is known before the token is drawn (the shape of the draft's distribution, or the hidden
state it came from), never from which token came out: so it may steer the rejection modes too (speculative reference,
2.5). Optimal stopping is a threshold on the chance that nothing was rejected so far (Huang et al., "SpecDec++", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

STOP_BELOW = 0.3
"""Drafting ends when all drafts so far are accepted with less than this chance: the released SpecDec++ code's value."""
STOPS = ("fixed", "confidence", "acc_head")


class AcceptanceEstimate(Protocol):
    """Chance that a draft drawn now is accepted if all before it were."""

    def __call__(self, hidden_JH: Tensor, best_J: Tensor, is_greedy: Sequence[bool]) -> list[float]:
        """hidden_JH: the states the drafts are drawn from. best_J: probability of each row's likeliest token."""
        ...


def by_confidence(hidden_JH: Tensor, best_J: Tensor, is_greedy: Sequence[bool]) -> list[float]:
    """The probability of the likeliest token: where a draft model is sure, the target mostly agrees."""
    return [float(best) for best in best_J.tolist()]


@dataclass(frozen=True, slots=True)
class StopRule:
    """estimate: of the next draft. stop_below: the product of estimates at which drafting ends; 0 = never early."""

    estimate: AcceptanceEstimate = by_confidence
    stop_below: float = 0.0


def stop_rule(name: str, head: AcceptanceEstimate | None = None) -> StopRule:
    """The rule of this name (`STOPS`); `acc_head` needs the head. Raises ValueError for any other name."""
    if name not in STOPS:
        raise ValueError(f"draft_stop is {name!r}; expected {', '.join(STOPS)}")
    if name == "acc_head":
        if head is None:
            raise ValueError("draft_stop 'acc_head' needs the acceptance head of a draft model")
        return StopRule(head, STOP_BELOW)
    return StopRule(stop_below=STOP_BELOW if name == "confidence" else 0.0)
