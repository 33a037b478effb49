"""How likely each offered draft is to be reached and accepted: what drafters claim, corrected by what became of it.

A drafter's claim for a draft given its predecessors (its survival over its parent's) falls into a bucket; per drafter,
bucket and position there is a running acceptance rate, `beta`. Per request and bucket there are decayed counts of
trials N and successes S, and

    a = (S + kappa beta) / (N + kappa),   clamped to [0.02, 0.98]

so that a new request starts at what its drafter usually gets, and a claim is worth what such claims came to. All
survivals of a drafter are then scaled by what its verified offers came to as a whole. Only
drafts whose predecessors were all accepted are trials: those behind a rejected one are censored, not failures. In a
tree a trial is a child of an accepted node; its position is its depth.

Source: speculative reference 3.3. Departure: the claim as a bucket, for every drafter alike, instead of a logistic
regression on a feature of each.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.types import Drafts, DraftTally

_EDGES = (0.3, 0.55, 0.75, 0.9, 0.97)
_NUM_BUCKETS = len(_EDGES) + 1
_FINE = 200
_BUCKET = tuple(sum(edge <= i / _FINE for edge in _EDGES) for i in range(_FINE + 2))
"""Bucket of a claim in [0, 1], by its rounded-down two-hundredth."""
_LAST_POSITION = 8
_KAPPA = 8.0
_KAPPA_CELL = 16.0
_CLAIM_TRIALS = 4.0
"""The trials that a drafter's bare claim counts for while nothing is known."""
_CALIBRATION_TRIALS = 4.0
_DECAY = 0.98
_DECAY_SOURCE = 0.998
_LOWEST, _HIGHEST = 0.02, 0.98
_FAST, _SLOW = 0.01, 0.0002


class RequestCounts:
    """Decayed trials and successes of one request's drafts, per bucket of claim."""

    __slots__ = ("successes", "trials")

    def __init__(self) -> None:
        self.trials = [0.0] * _NUM_BUCKETS
        self.successes = [0.0] * _NUM_BUCKETS

    def add(self, bucket: int, is_accepted: bool) -> None:
        self.trials[bucket] = self.trials[bucket] * _DECAY + 1.0
        self.successes[bucket] = self.successes[bucket] * _DECAY + is_accepted


class _Source:
    """One drafter: decayed counts per bucket, and per bucket and position."""

    def __init__(self) -> None:
        # Index 0 of a row pools all positions.
        self._trials = [[0.0] * (_LAST_POSITION + 1) for _ in range(_NUM_BUCKETS)]
        self._successes = [[0.0] * (_LAST_POSITION + 1) for _ in range(_NUM_BUCKETS)]
        self._claims = [0.0] * _NUM_BUCKETS
        low = (0.0, *_EDGES)
        high = (*_EDGES, 1.0)
        self._pooled = [(low[b] + high[b]) / 2 for b in range(_NUM_BUCKETS)]
        self._expected = self._came = 0.0
        self.calibration = 1.0
        """What offers came to over what was expected of the part that was verified. Below 1 even where every rate is
        right: the drafts that are chosen are those whose rates are overestimated. Never above 1."""
        self.fast = self.slow = 0.5
        self.num_trials = 0

    def beta(self, bucket: int, position: int) -> float:
        """The rate at which claims of a bucket came true at a position."""
        successes, trials = self._successes[bucket][position], self._trials[bucket][position]
        return (successes + _KAPPA_CELL * self._pooled[bucket]) / (trials + _KAPPA_CELL)

    def add(self, bucket: int, position: int, claim: float, is_accepted: bool) -> None:
        trials, successes = self._trials[bucket], self._successes[bucket]
        for cell in (0, position):
            trials[cell] = trials[cell] * _DECAY_SOURCE + 1.0
            successes[cell] = successes[cell] * _DECAY_SOURCE + is_accepted
        self._claims[bucket] = claims = self._claims[bucket] * _DECAY_SOURCE + claim
        num_trials = trials[0]
        self._pooled[bucket] = (successes[0] + _CLAIM_TRIALS * claims / num_trials) / (num_trials + _CLAIM_TRIALS)
        self.num_trials += 1
        self.fast += max(_FAST, 1.0 / self.num_trials) * (is_accepted - self.fast)
        self.slow += max(_SLOW, 1.0 / self.num_trials) * (is_accepted - self.slow)

    def calibrate(self, expected: float, num_accepted: int) -> None:
        """Learn from an offer: what its rates alone let expect of the verified part, and what came of it."""
        self._expected = self._expected * _DECAY_SOURCE + expected
        self._came = self._came * _DECAY_SOURCE + num_accepted
        self.calibration = min(1.0, (self._came + _CALIBRATION_TRIALS) / (self._expected + _CALIBRATION_TRIALS))


class Acceptance:
    """Learns from verified spans and rates offers. One per scheduler."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self._unknown = _Source()

    def survivals(self, drafts: Drafts, counts: RequestCounts) -> list[float]:
        """For each draft of a well-formed offer the probability that it is reached and accepted, never rising.

        Where the estimates of a tree would rise along its order, the earlier, lower one stands: a cut is a prefix.
        """
        source = self._sources.get(drafts.source) or self._unknown
        beta, trials, successes = source.beta, counts.trials, counts.successes
        if drafts.parents:
            return _tree_survivals(drafts, source, counts)
        result, claimed, reached, depth = [], 1.0, source.calibration, 0
        for claim in drafts.survivals:
            bucket = _BUCKET[int(_FINE * claim / claimed)]
            if depth < _LAST_POSITION:
                depth += 1
            rate = (successes[bucket] + _KAPPA * beta(bucket, depth)) / (trials[bucket] + _KAPPA)
            reached *= _LOWEST if rate < _LOWEST else _HIGHEST if rate > _HIGHEST else rate
            claimed = claim
            result.append(reached)
        return result

    def observe(
        self,
        drafts: Drafts,
        num_verified: int,
        path: Sequence[int],
        counts: RequestCounts,
        survivals: Sequence[float] = (),
    ) -> list[DraftTally]:
        """Learn from the first `num_verified` drafts, of which those at `path` (offsets in the span) were accepted.

        survivals  what was expected of the offer when it was rated
        """
        source = self._sources.setdefault(drafts.source, _Source())
        if survivals:
            source.calibrate(sum(survivals[:num_verified]) / source.calibration, len(path))
        accepted = set(path)
        tally: dict[int, list[int]] = {}
        depths = [0]
        for node in range(1, num_verified + 1):
            parent = drafts.parents[node - 1] + 1 if drafts.parents else node - 1
            depth = depths[parent] + 1
            depths.append(depth)
            row = tally.setdefault(depth, [0, 0, 0])
            row[2] += 1
            if parent and parent not in accepted:
                continue
            claimed = drafts.survivals[parent - 1] if parent else 1.0
            claim = min(1.0, drafts.survivals[node - 1] / claimed)
            bucket = _BUCKET[int(_FINE * claim)]
            is_accepted = node in accepted
            source.add(bucket, min(depth, _LAST_POSITION), claim, is_accepted)
            counts.add(bucket, is_accepted)
            row[0] += 1
            row[1] += is_accepted
        return [DraftTally(drafts.source, depth, *row) for depth, row in tally.items()]

    def mean_rate(self, name: str, counts: RequestCounts) -> float:
        """Acceptance of any draft of one request: its own counts, shrunk to its drafter's recent mean."""
        source = self._sources.get(name) or self._unknown
        rate = (sum(counts.successes) + _KAPPA * source.fast) / (sum(counts.trials) + _KAPPA)
        return min(_HIGHEST, max(_LOWEST, rate))

    def calibration_of(self, name: str) -> float:
        """What a drafter's verified offers came to over what their rates let expect, at most 1."""
        return (self._sources.get(name) or self._unknown).calibration

    def drift(self, name: str) -> float:
        """A drafter's recent acceptance over its long-run one: far below 1, what it drafts from has gone stale."""
        source = self._sources.get(name) or self._unknown
        return source.fast / source.slow if source.slow > 0.0 else 1.0


def _tree_survivals(drafts: Drafts, source: _Source, counts: RequestCounts) -> list[float]:
    exact: list[float] = []
    depths: list[int] = []
    result: list[float] = []
    lowest = 1.0
    for claim, parent in zip(drafts.survivals, drafts.parents, strict=True):
        is_child = parent >= 0
        depth = depths[parent] + 1 if is_child else 1
        bucket = _BUCKET[int(_FINE * claim / (drafts.survivals[parent] if is_child else 1.0))]
        cell = source.beta(bucket, min(depth, _LAST_POSITION))
        rate = (counts.successes[bucket] + _KAPPA * cell) / (counts.trials[bucket] + _KAPPA)
        survival = min(_HIGHEST, max(_LOWEST, rate)) * (exact[parent] if is_child else source.calibration)
        exact.append(survival)
        depths.append(depth)
        lowest = min(lowest, survival)
        result.append(lowest)
    return result
