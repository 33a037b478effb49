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
        is_end = token in self.want.state.request.stop_ids or self.survival < stop_below
        self.is_over = len(self.drafts) >= self.most or (is_end and not self.keeps_q)

    def offer(self, source: str) -> Drafts | None:
        """Under the rejection rules neither its length nor its survivals tell what was drawn.

        Whoever cuts or refuses an offer looks at all of it, and a first draft that is dropped because of what came
        after it biases the text (speculative reference, 2.5). So such a lane never stops early, and its later survivals
        go by its first one, which was known before anything was drawn.
        """
        if not self.drafts:
            return None
        survivals = self.survivals
        if self.keeps_q:
            survivals = [max(LEAST_SURVIVAL, survivals[0] ** depth) for depth in range(1, len(survivals) + 1)]
        return Drafts(tuple(self.drafts), tuple(survivals), source)


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
