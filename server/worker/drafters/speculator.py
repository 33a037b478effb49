"""`Speculator`: all drafters together, what the worker calls. Per request it takes the best offer.

Members are not trusted. One that raises is switched off for the life of the process; an offer that breaks the protocol
is dropped and counted; drafts that a request's grammar forbids are cut. Verification decides every token in any case,
so the worst a drafter can do is cost time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from scheduler.types import Drafts, VerifyMode, leaves_keys_out
from server.worker.drafters.base import Drafter, Want
from server.worker.drafters.soundness import flaw, legal_part
from server.worker.drafters.track_record import TrackRecord
from server.worker.sequences import SequenceState

logger = logging.getLogger(__name__)

GOOD_SHARE = 0.6
"""A lookup offer that expects this share of the drafts a model could make is taken without asking the model."""


class Speculator:
    """The composite of the loaded drafters, asked in order; on a tie the earlier one wins."""

    def __init__(
        self,
        drafters: Sequence[Drafter],
        vocab_size: int,
        draft_tree: bool,
        has_window: bool,
        keep: Callable[[], object] | None = None,
    ) -> None:
        """draft_tree: drafts branch where a request leaves it open; has_window: the model has windowed attention, whose
        rule is by position and not by branch, so nothing branches; keep: called at the end, saves what was learnt."""
        self._drafters = list(drafters)
        self._vocab_size, self._keep = vocab_size, keep
        self._draft_tree, self._trees_run = draft_tree, not has_window
        self._members = tuple((drafter.name, drafter.is_sequential) for drafter in drafters)
        self._record = TrackRecord()
        self._serving: dict[int, list[Drafter]] = {}
        self.num_dropped: Counter[str] = Counter()
        """Offers dropped or cut since the start, by reason."""
        self.disabled: dict[str, str] = {}
        """Drafters that raised, and what."""

    @property
    def drafters(self) -> tuple[tuple[str, bool], ...]:
        """(name, is_sequential) of every drafter that was loaded."""
        return self._members

    @property
    def needs_top(self) -> int:
        """How many best tokens of each judged row the drafters want to see."""
        return max((drafter.needs_top for drafter in self._drafters), default=0)

    @property
    def num_bytes(self) -> int:
        return sum(drafter.num_bytes for drafter in self._drafters)

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        """The best offer for each want; None = nothing is offered. depth: most model steps, 0 = no model runs.

        Never raises for a drafter's fault.
        """
        wants = [self._with_tree(want) for want in wants]
        serving = [self._drafters_of(want) for want in wants]
        for want, drafters in zip(wants, serving, strict=True):
            if len(drafters) > 1:
                self._record.settle(want.seq_id, want.tokens)
        best: list[Drafts | None] = [None] * len(wants)
        for is_sequential in (False, True) if depth > 0 else (False,):
            for drafter in tuple(self._drafters):
                if drafter.is_sequential is is_sequential:
                    chosen = [i for i, drafters in enumerate(serving) if drafter in drafters]
                    self._ask(drafter, wants, chosen, depth, best)
        return best

    def _drafters_of(self, want: Want) -> list[Drafter]:
        """The drafters that may have something for a sequence; the others are never asked about it."""
        found = self._serving.get(want.seq_id)
        if found is None:
            name = want.state.request.speculation.drafter
            found = [one for one in self._drafters if name in ("auto", one.name) and one.serves(want.state)]
            self._serving[want.seq_id] = found
        return found

    def _ask(
        self, drafter: Drafter, wants: Sequence[Want], chosen: list[int], depth: int, best: list[Drafts | None]
    ) -> None:
        """Put the drafter's offers to the wants `chosen` in `best` where they beat what is there."""
        if drafter.is_sequential:
            chosen = [i for i in chosen if not self._is_good(best[i], wants[i], depth)]
        if not chosen:
            return
        # What a sampled offer was drawn from stays with its sequence only if the offer is taken.
        before = {i: wants[i].state.draft_q for i in chosen}
        taken: set[int] = set()
        for i in chosen:
            wants[i].state.draft_q = None
        try:
            offers = drafter.propose([wants[i] for i in chosen], depth)
            if len(offers) != len(chosen):
                raise ValueError(f"{len(offers)} offers for {len(chosen)} sequences")
            for i, offer in zip(chosen, offers, strict=True):
                sound = self._sound(offer, wants[i]) if offer is not None else None
                if sound is None:
                    continue
                if len(self._serving[wants[i].seq_id]) > 1 and wants[i].state.draft_q is None:
                    self._record.remember(wants[i].seq_id, len(wants[i].tokens), sound)
                if self._is_better(sound, best[i], wants[i]):
                    best[i] = sound
                    taken.add(i)
        except Exception as error:
            self._disable(drafter, error)
        for i in before.keys() - taken:
            wants[i].state.draft_q = before[i]

    def _is_better(self, offer: Drafts, best: Drafts | None, want: Want) -> bool:
        if best is None:
            return True
        # The chance of the first draft is all that a choice may look at where drafts were sampled: later survivals
        # depend on which tokens came out, and choosing by those biases the text (speculative reference, 2.5).
        if want.state.draft_q is not None:
            return offer.survivals[0] > best.survivals[0]
        return self._worth(offer, want) > self._worth(best, want)

    def _worth(self, offer: Drafts, want: Want) -> float:
        """Tokens that the offer will add, going by what its drafter's offers came to."""
        return sum(offer.survivals) * self._record.trust(want.seq_id, offer.source)

    def _is_good(self, offer: Drafts | None, want: Want, depth: int) -> bool:
        return offer is not None and self._worth(offer, want) >= GOOD_SHARE * min(depth, want.num_drafts)

    def _with_tree(self, want: Want) -> Want:
        asked = want.state.request.speculation
        wished = self._draft_tree if asked.tree is None else asked.tree
        # A sparse row has no tree mask.
        wished = wished and not leaves_keys_out(want.state.request.attention)
        return want._replace(tree=True) if wished and self._trees_run and asked.verify is VerifyMode.COUPLED else want

    def _sound(self, offer: Drafts, want: Want) -> Drafts | None:
        """The offer if it keeps the protocol, cut to what the request's grammar allows; None = nothing is left."""
        reason = flaw(offer, want, self._vocab_size)
        if reason is not None:
            self.num_dropped[reason] += 1
            return None
        # Drafts that were drawn stay whole: their distribution knows what is illegal, and a cut would bias the text.
        if want.state.matcher is None or want.state.draft_q is not None:
            return offer
        legal = legal_part(offer, want)
        if legal is None or len(legal.tokens) < len(offer.tokens):
            self.num_dropped["illegal under the grammar"] += 1
        return legal

    def release(self, released: Iterable[tuple[int, SequenceState]]) -> None:
        """Sequences are gone (finished, aborted or preempted). Idempotent."""
        gone = list(released)
        for seq_id, _ in gone:
            self._record.release(seq_id)
            self._serving.pop(seq_id, None)
        for drafter in tuple(self._drafters):
            try:
                for seq_id, state in gone:
                    drafter.release(seq_id, state)
            except Exception as error:
                self._disable(drafter, error)

    def close(self) -> None:
        """Keep what drafters have learnt, if they were told where. The engine ends."""
        if self._keep is not None:
            self._keep()

    def _disable(self, drafter: Drafter, error: Exception) -> None:
        self._drafters.remove(drafter)
        for serving in self._serving.values():
            if drafter in serving:
                serving.remove(drafter)
        self.disabled[drafter.name] = f"{type(error).__name__}: {error}"
        logger.error("drafter %s failed and is off until the next start", drafter.name, exc_info=error)
