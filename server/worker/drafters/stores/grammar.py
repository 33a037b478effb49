"""`grammar`: the tokens that a request's grammar leaves no choice about. Survival 1; speculative reference 2.7."""

from __future__ import annotations

from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Child, Walk
from server.worker.sequences import SequenceState


def has_grammar(state: SequenceState) -> bool:
    return state.matcher is not None


class GrammarStore:
    """Holds nothing: the matcher belongs to the sequence and follows its tokens by position."""

    name = "grammar"
    needs_top = 0
    num_bytes = 0

    def learn(self, want: Want, most: int) -> int:
        return 0

    def begin(self, want: Want) -> Walk | None:
        matcher = want.state.matcher
        tokens = matcher.forced(want.tokens) if matcher is not None else []

        def children(place: int) -> list[Child]:
            return [(1.0, tokens[place], place + 1)] if place < len(tokens) else []

        return Walk(0, children) if tokens else None

    def release(self, seq_id: int, state: SequenceState) -> None:
        pass
