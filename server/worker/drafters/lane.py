"""One sequence while a model drafts for it: what was drawn so far and the rules its next draft is drawn under."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from scheduler.types import Drafts, VerifyMode
from server.worker.drafters.base import Want
from server.worker.process_logits import JudgedRow

LEAST_SURVIVAL = 1e-6


@dataclass(slots=True)
class Lane:
    """most: drafts wanted and possible. survivals[i]: chance that draft i is reached and accepted.

    q  of each draft the distribution it was drawn from, float32 [V]; kept only where verification needs it
    """

    want: Want
    most: int
    drafts: list[int] = field(default_factory=list)
    survivals: list[float] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    is_over: bool = False

    @property
    def keeps_q(self) -> bool:
        """Its drafts are drawn with noise of their own and verified against the distribution they came from."""
        state = self.want.state
        return state.request.speculation.verify is not VerifyMode.COUPLED and not state.recipe.is_greedy

    @property
    def survival(self) -> float:
        return self.survivals[-1] if self.survivals else 1.0

    def row(self) -> JudgedRow:
        """What the next draft is drawn under."""
        return row_after(self.want, tuple(self.drafts))

    def take(self, token: int, chance: float, q_V: Tensor | None, stop_below: float) -> None:
        """Add a draft that is accepted with `chance` if it is reached."""
        self.drafts.append(token)
        self.survivals.append(max(LEAST_SURVIVAL, self.survival * min(1.0, chance)))
        if q_V is not None:
            self.q.append(q_V)
        # The draft itself is offered, however unlikely: its forward is paid, and the planner decides.
        # Under the rejection rules nothing may depend on which token was drawn (speculative reference, 2.5).
        is_end = not self.keeps_q and token in self.want.state.request.stop_ids
        self.is_over = is_end or len(self.drafts) >= self.most or self.survival < stop_below

    def offer(self, source: str) -> Drafts | None:
        return Drafts(tuple(self.drafts), tuple(self.survivals), source) if self.drafts else None


def row_after(want: Want, drafts: tuple[int, ...]) -> JudgedRow:
    """The request's rules for the token after the sequence's tokens and `drafts`.

    Counts and grammar are only looked at: drafts leave no trace in what the sequence's own tokens are judged by.
    """
    state, counts, mask = want.state, None, None
    if state.counts is not None:
        counts = state.counts.beyond(want.tokens, drafts)
    if state.matcher is not None:
        mask = state.matcher.mask_after(want.tokens, drafts)
    return JudgedRow(state.recipe, want.tokens, want.num_output + len(drafts), counts, mask, drafts)
