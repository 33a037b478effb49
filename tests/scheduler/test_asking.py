"""Who is asked for drafts: where it pays, in turn where it might, and nobody where speculation is off."""

from __future__ import annotations

import itertools

import pytest

from scheduler.asking import Asking, DraftCost, DraftState, make_state
from scheduler.goodput import Outlook
from scheduler.types import Speculation, SpeculationMode, SpeculationSettings

SETTINGS = SpeculationSettings(probe_every=32)


def asking(settings: SpeculationSettings = SETTINGS, per_sequence_s: float = 1e-4, depth_s: float = 0.0) -> Asking:
    """One whose costs were measured."""
    made = Asking(settings, settings.policy in ("marginal", "uniform"))
    for number in range(400):
        count, depth = 1 + number % 16, number % 6
        made.cost.observe(count, depth, count * (per_sequence_s + depth * depth_s))
    return made


def test_the_cost_of_proposing_is_learned_from_steps() -> None:
    cost = DraftCost()
    for number in range(500):
        count, depth = 1 + number % 20, number % 5
        cost.observe(count, depth, 1e-4 + 5e-5 * count + depth * (2e-3 + 1e-4 * count))
    assert cost.predict(10, 0) == pytest.approx(6e-4, rel=0.1)
    assert cost.predict(10, 4) == pytest.approx(12.6e-3, rel=0.1)
    assert cost.predict(0, 4) == 0.0


def test_who_saves_more_than_proposing_costs_is_asked() -> None:
    states = [DraftState(8, gain_s=2e-3), DraftState(4, gain_s=5e-4), DraftState(8, gain_s=0.0)]
    assert asking().choose(states, 8, step_s=1e-9) == [8, 4, 0]


def test_off_is_never_asked_and_on_always() -> None:
    off = make_state(Speculation(SpeculationMode.OFF), 8, gain_s=1.0)
    forced = make_state(Speculation(SpeculationMode.ON, max_tokens=3), 8, gain_s=0.0)
    made = asking()
    for _ in range(100):
        assert made.choose([off, forced], 8, step_s=1e-9) == [0, 3]


def test_where_proposing_is_cheap_everybody_is_asked_every_step() -> None:
    states = [DraftState(8, gain_s=0.0) for _ in range(4)]
    assert asking(per_sequence_s=1e-6).choose(states, 8, step_s=0.01) == [8] * 4


def test_in_vain_proposals_take_at_most_a_hundredth_of_the_time() -> None:
    made, states = asking(per_sequence_s=1e-4), [DraftState(8, gain_s=0.0) for _ in range(16)]
    asked = sum(sum(wish > 0 for wish in made.choose(states, 8, step_s=0.02)) for _ in range(200))
    assert 0 < asked * 1e-4 <= 1.1 * 0.01 * 200 * 0.02


def test_everybody_is_asked_again_within_the_probing_interval() -> None:
    """However dear proposing is: an estimate that cannot change is a trap."""
    made, states = asking(per_sequence_s=0.1), [DraftState(8, gain_s=0.0) for _ in range(40)]
    asked_at = [[] for _ in states]  # type: list[list[int]]
    for step in range(160):
        for index, wish in enumerate(made.choose(states, 8, step_s=0.01)):
            if wish:
                asked_at[index].append(step)
    gaps = [b - a for steps in asked_at for a, b in itertools.pairwise(steps)]
    assert all(len(steps) >= 3 for steps in asked_at)
    assert max(gaps) <= 2 * SETTINGS.probe_every
    assert sum(len(steps) for steps in asked_at) <= 160 * 3


def test_a_gain_rises_at_once_and_falls_slowly() -> None:
    state = DraftState(8, gain_s=0.0)
    state.gained(1e-3)
    assert state.gain_s == 1e-3
    state.gained(0.0)
    assert 0.5e-3 < state.gain_s < 1e-3


def outlook() -> Outlook:
    return Outlook(4.0, 1000, 0, 0.3, lambda drafts, prefill: 0.010 + 1e-4 * (drafts + prefill))


def run_depth(made: Asking, rate: float, steps: int = 64) -> list[int]:
    return [made.choose_depth([rate] * 4, outlook(), 0, 0.05) for _ in range(steps)]


def test_a_model_drafter_goes_as_deep_as_pays() -> None:
    settings = SpeculationSettings(has_sequential=True)
    cheap = run_depth(asking(settings, depth_s=5e-5), 0.9)[-1]
    dear = run_depth(asking(settings, depth_s=1e-3), 0.9)[-1]
    assert cheap > dear >= 1


def test_a_hopeless_model_drafter_rests_and_is_tried_now_and_then() -> None:
    depths = run_depth(asking(SpeculationSettings(has_sequential=True), depth_s=1e-3), 0.05, steps=200)[8:]
    assert set(depths) == {0, 1}
    assert 3 <= depths.count(1) <= 8


def test_the_depth_does_not_flap() -> None:
    made = asking(SpeculationSettings(has_sequential=True), depth_s=2e-4)
    depths = [made.choose_depth([0.7 + 0.01 * (step % 3)] * 4, outlook(), 0, 0.05) for step in range(200)][20:]
    assert sum(a != b for a, b in itertools.pairwise(depths)) <= 4


def test_without_a_model_drafter_the_depth_is_zero() -> None:
    assert set(run_depth(asking(), 0.9)) == {0}
