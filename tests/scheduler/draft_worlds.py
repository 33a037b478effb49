"""Random worlds with drafts: a drafter of every temper, requests of every wish, settings of every policy."""

from __future__ import annotations

import random
from dataclasses import replace

from scheduler.fake_worker import Known, Truth
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from scheduler.types import (
    Drafts,
    Request,
    Speculation,
    SpeculationMode,
    SpeculationSettings,
    StepFeatures,
    StepSample,
)
from tests.scheduler.worlds import VOCAB, World, play, random_limits


class RandomDrafter:
    """Silent, right, wrong, branching or malformed, as the dice say. `rightness`: how often a draft is the truth."""

    def __init__(self, rng: random.Random, branches: bool) -> None:
        self._rng = rng
        self._rightness = rng.choice((0.0, 0.5, 0.9, 1.0))
        self._branches = branches

    def __call__(self, known: Known, most: int, truth: Truth) -> Drafts | None:
        rng = self._rng
        temper = rng.random()
        if temper < 0.2:
            return None
        if temper < 0.25:
            return self._malformed(most)
        length = rng.randint(1, most)
        if self._branches and temper < 0.8:
            return self._tree(length, truth)
        tokens = tuple(self._maybe(token) for token in truth(length))
        return Drafts(tokens, tuple(0.9 ** (j + 1) for j in range(length)), rng.choice(("chain", "other")))

    def _maybe(self, token: int) -> int:
        return token if self._rng.random() < self._rightness else self._rng.randrange(VOCAB)

    def _tree(self, length: int, truth: Truth) -> Drafts:
        """The truth down one path, noise beside it, siblings with equal tokens now and then."""
        rng = self._rng
        right = truth(length)
        tokens: list[int] = []
        parents: list[int] = []
        path = [-1]
        for node in range(length):
            if rng.random() < 0.3 + 0.6 * self._rightness and len(path) <= len(right):
                tokens.append(right[len(path) - 1])
                parents.append(path[-1])
                path.append(node)
            else:
                tokens.append(rng.randrange(VOCAB))
                parents.append(rng.randint(-1, node - 1))
        return Drafts(tuple(tokens), tuple(0.95 ** (j + 1) for j in range(length)), "tree", tuple(parents))

    def _malformed(self, most: int) -> Drafts:
        too_many = (1,) * (most + 1)
        return self._rng.choice(
            (
                Drafts((), (), "bad"),
                Drafts(too_many, (0.5,) * len(too_many), "bad"),
                Drafts((1,), (0.5, 0.4), "bad"),
                Drafts((1,), (1.5,), "bad"),
                Drafts((1, 2), (0.4, 0.5), "bad"),
                Drafts((1,), (0.5,), "bad", (0,)),
                Drafts((1,), (0.5,), "bad", (-2,)),
                Drafts((1,), (0.5,), "bad", (-1, 0)),
                Drafts((1,), (float("nan"),), "bad"),
            )
        )


def random_settings(rng: random.Random) -> SpeculationSettings:
    return SpeculationSettings(
        policy=rng.choice(("marginal", "marginal", "uniform", "fixed", "table")),
        max_drafts=rng.choice((1, 3, 8, 20)),
        table=((1, 20), (3, 2)),
        has_sequential=rng.random() < 0.5,
        tree_max_seqs=rng.choice((0, 8, 8)),
        probe_every=rng.choice((1, 4, 32)),
        price=rng.choice((None, None, 0.0)),
    )


def random_speculation(rng: random.Random, request: Request) -> Request:
    asked = Speculation(
        mode=rng.choice((*(SpeculationMode.AUTO,) * 3, *(SpeculationMode.ON,) * 3, SpeculationMode.OFF)),
        max_tokens=rng.choice((None, None, None, 1, 4)),
        tree=rng.choice((None, None, True, False)),
    )
    return replace(request, speculation=asked)


def flat_cost() -> StepCost:
    """A step takes 10 ms and hardly longer with more rows: drafts pay."""
    features = (StepFeatures(1, 0, 1, 9), StepFeatures(32, 24, 8, 99, 600), StepFeatures(64, 64, 0, 0, 2000))
    return StepCost([StepSample(entry, 0.01 + 1e-6 * entry.tokens) for entry in features])


def draft_world(seed: int) -> World:
    rng = random.Random(f"drafts {seed}")
    limits = random_limits(random.Random(seed))
    scheduler = Scheduler(limits, flat_cost(), bytes(32), random_settings(rng))
    return World(limits, scheduler, drafter=RandomDrafter(rng, branches=rng.random() < 0.7))


def play_drafts(world: World, seed: int) -> None:
    rng = random.Random(f"wishes {seed}")
    play(world, seed, lambda request: random_speculation(rng, request))
