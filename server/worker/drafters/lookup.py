"""`LookupDrafter`: drafts looked up in text or tables instead of computed by a model; no training, no forward pass.

A store says what may follow a place and how likely; `best_first` does the rest. Learning is lazy: a sequence costs
nothing until it is asked for drafts, then the store catches up with its tokens by position, so that asking twice is the
same as asking once. Speculative reference, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from scheduler.types import LEARN_MOST, MAX_TREE_NODES, Drafts
from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Walk, best_first
from server.worker.sequences import SequenceState

FLOOR = 0.04
"""Drafts less likely than this to be reached and accepted are never worth a row of a step."""
TREE_WIDTH = 4


class Store(Protocol):
    """What a lookup drafter looks things up in."""

    name: str
    needs_top: int

    def learn(self, want: Want, most: int) -> int:
        """Take in at most `most` of the sequence's tokens that are new, by position. Returns how many."""
        ...

    def begin(self, want: Want) -> Walk | None:
        """Where drafts of the sequence begin; None = it has nothing. Changes nothing."""
        ...

    def release(self, seq_id: int, state: SequenceState) -> None:
        """The sequence is gone. Idempotent; also for sequences never seen. Cheap: a step waits for it."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory in use, estimated from counts."""
        ...


class LookupDrafter:
    """A drafter over one store, named after it."""

    is_sequential = False

    def __init__(
        self,
        store: Store,
        serves: Callable[[SequenceState], bool] | None = None,
        tend: Callable[[], None] | None = None,
    ) -> None:
        """serves: which sequences the store may have something for, None = all. tend: called once a step."""
        self.store = store
        self.name = store.name
        self.needs_top = store.needs_top
        self._serves, self._tend = serves, tend

    def serves(self, state: SequenceState) -> bool:
        return self._serves is None or self._serves(state)

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        """See `Drafter.propose`; `depth` is of no interest here."""
        allowance, store = LEARN_MOST, self.store
        if self._tend is not None:
            self._tend()
        # All are learnt from before any is offered: a step that is run again offers the same again.
        for want in wants:
            if allowance > 0:
                allowance -= store.learn(want, allowance)
        return [self._offer(want) for want in wants]

    def _offer(self, want: Want) -> Drafts | None:
        walk = self.store.begin(want)
        if walk is None:
            return None
        if want.tree:
            return best_first(walk, min(want.num_drafts, MAX_TREE_NODES - 1), TREE_WIDTH, FLOOR, self.name)
        return best_first(walk, want.num_drafts, 1, FLOOR, self.name)

    def release(self, seq_id: int, state: SequenceState) -> None:
        self.store.release(seq_id, state)

    @property
    def num_bytes(self) -> int:
        return self.store.num_bytes
