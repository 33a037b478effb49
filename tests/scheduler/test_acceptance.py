"""What drafts are worth is learned from their fate, and only from those that were put to the test."""

from __future__ import annotations

import random

import pytest

from scheduler.acceptance import Acceptance, RequestCounts
from scheduler.types import Drafts, DraftTally


def offer(length: int = 4, claim: float = 0.5, source: str = "s") -> Drafts:
    return Drafts((1,) * length, tuple(claim ** (j + 1) for j in range(length)), source)


def live(
    model: Acceptance, counts: RequestCounts, rate: float, steps: int, rng: random.Random, claim: float = 0.5
) -> None:
    """Verify full offers of 4 whose drafts are right at `rate`."""
    for _ in range(steps):
        accepted = 0
        while accepted < 4 and rng.random() < rate:
            accepted += 1
        model.observe(offer(claim=claim), 4, tuple(range(1, accepted + 1)), counts)


def conditional(survivals: list[float]) -> list[float]:
    return [s / before for s, before in zip(survivals, [1.0, *survivals], strict=False)]


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_drafts_behind_a_rejected_one_are_no_evidence(rate: float) -> None:
    """Counted as failures they would drag the estimate of 0.8 down to about 0.6."""
    model, counts = Acceptance(), RequestCounts()
    live(model, counts, rate, 400, random.Random(1))
    rates = conditional(model.survivals(offer(), counts))
    assert rates[0] == pytest.approx(rate, abs=0.12)
    assert rates[1] == pytest.approx(rate, abs=0.12)


def test_a_new_request_starts_at_what_its_drafter_usually_gets() -> None:
    model = Acceptance()
    live(model, RequestCounts(), 0.9, 400, random.Random(2))
    assert conditional(model.survivals(offer(), RequestCounts()))[0] == pytest.approx(0.9, abs=0.05)
    assert conditional(model.survivals(offer(source="unheard of"), RequestCounts()))[0] < 0.7


def test_requests_are_told_apart_within_a_few_steps() -> None:
    model, rng = Acceptance(), random.Random(3)
    good, bad = RequestCounts(), RequestCounts()
    for _ in range(12):
        live(model, good, 0.95, 1, rng)
        live(model, bad, 0.05, 1, rng)
    assert conditional(model.survivals(offer(), good))[0] > 0.75
    assert conditional(model.survivals(offer(), bad))[0] < 0.45


def test_a_claim_is_worth_what_such_claims_came_to() -> None:
    model, rng, counts = Acceptance(), random.Random(4), RequestCounts()
    for _ in range(300):
        live(model, counts, 0.95, 1, rng, claim=0.8)
        live(model, counts, 0.1, 1, rng, claim=0.4)
    assert conditional(model.survivals(offer(claim=0.8), counts))[0] > 0.85
    assert conditional(model.survivals(offer(claim=0.4), counts))[0] < 0.25


def test_positions_are_told_apart() -> None:
    model = Acceptance()
    for _ in range(300):
        model.observe(offer(), 4, (1, 2), RequestCounts())
    rates = conditional(model.survivals(offer(), RequestCounts()))
    assert rates[0] > 0.85
    assert rates[2] < 0.4


def test_estimates_stay_clear_of_certainty() -> None:
    model, counts = Acceptance(), RequestCounts()
    live(model, counts, 1.0, 500, random.Random(5))
    assert conditional(model.survivals(offer(), counts))[0] == pytest.approx(0.98)
    live(model, counts, 0.0, 500, random.Random(5))
    assert 0.02 <= conditional(model.survivals(offer(), counts))[0] < 0.05


def test_children_of_accepted_nodes_are_trials_and_no_others() -> None:
    #        root -> 0, 1;  0 -> 2;  1 -> 3
    tree = Drafts((5, 6, 7, 8), (0.6, 0.4, 0.3, 0.2), "tree", (-1, -1, 0, 1))
    tallies = Acceptance().observe(tree, 4, (2, 4), RequestCounts())
    assert tallies == [DraftTally("tree", 1, 2, 1, 2), DraftTally("tree", 2, 1, 1, 2)]
    assert Acceptance().observe(tree, 3, (), RequestCounts()) == [
        DraftTally("tree", 1, 2, 0, 2),
        DraftTally("tree", 2, 0, 0, 1),
    ]


def test_survivals_of_a_tree_never_rise_along_its_order() -> None:
    model, rng, counts = Acceptance(), random.Random(6), RequestCounts()
    tree = Drafts((5, 6, 7, 8), (0.6, 0.4, 0.39, 0.2), "tree", (-1, -1, 0, 1))
    for _ in range(200):
        path = rng.choice(((1, 3), (2, 4), (1,), ()))
        model.observe(tree, 4, path, counts)
    survivals = model.survivals(tree, counts)
    assert survivals == sorted(survivals, reverse=True)
    assert all(0.0 < survival < 1.0 for survival in survivals)


def test_a_drafter_that_goes_stale_is_seen() -> None:
    model, counts = Acceptance(), RequestCounts()
    live(model, counts, 0.9, 2000, random.Random(7))
    assert model.drift("s") == pytest.approx(1.0, abs=0.1)
    live(model, counts, 0.2, 300, random.Random(7))
    assert model.drift("s") < 0.5


def test_what_is_expected_of_the_chosen_drafts_comes_true() -> None:
    """Each rate is right on average; those that look best are overestimated, and only those are verified."""
    rng = random.Random(3)
    acceptance = Acceptance()
    expected = came = 0.0
    for number in range(6000):
        counts, rate = RequestCounts(), 0.5
        counts.trials = [6.0] * 6
        counts.successes = [float(sum(rng.random() < rate for _ in range(6)))] * 6
        drafts = Drafts((1,), (0.6,), "store")
        survivals = acceptance.survivals(drafts, counts)
        if survivals[0] < 0.52 * acceptance.calibration_of("store"):
            continue
        path = [1] if rng.random() < rate else []
        acceptance.observe(drafts, 1, path, RequestCounts(), survivals)
        if number > 1000:
            expected, came = expected + survivals[0], came + len(path)
    assert came == pytest.approx(expected, rel=0.06)
    assert acceptance.calibration_of("store") < 0.95
