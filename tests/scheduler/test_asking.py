"""Who is asked for drafts: where it pays, in turn where it might, and nobody where speculation is off."""

from __future__ import annotations

import itertools

import pytest

from scheduler.asking import Asking, DraftCost, DraftState, FirstGain, make_state
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


def test_in_vain_proposals_take_little_of_the_time() -> None:
    made, states = asking(per_sequence_s=1e-4), [DraftState(8, gain_s=0.0) for _ in range(16)]
    asked = sum(sum(wish > 0 for wish in made.choose(states, 8, step_s=0.02)) for _ in range(200))
    assert 0 < asked * 1e-4 <= 1.1 * 0.015 * 200 * 0.02


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


def test_a_gain_is_a_mean_that_rises_faster_than_it_falls() -> None:
    state = DraftState(8, gain_s=0.0)
    state.gained(1e-3)
    assert state.gain_s == 0.5e-3
    state.gained(0.0)
    assert 0.3e-3 < state.gain_s < 0.5e-3
    for number in range(200):
        state.gained(1e-3 * (number % 10 == 0))
    # One answer in ten pays: by the tenth one nothing is expected of it any more.
    assert state.gain_s < 0.1e-3


def test_who_answers_in_vain_is_asked_ever_less_often() -> None:
    made, state = asking(per_sequence_s=100.0), DraftState(8, gain_s=0.0)
    asked_at = []
    for step in range(1200):
        if made.choose([state], 8, step_s=0.01) != [0]:
            asked_at.append(step)
            state.gained(0.0)
    gaps = [b - a for a, b in itertools.pairwise(asked_at)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 8 * SETTINGS.probe_every
    state.gained(1e-9)
    assert state.patience == 1


def test_steps_that_went_by_unseen_count_as_if_they_had_been_seen() -> None:
    one, many = asking(per_sequence_s=0.02), asking(per_sequence_s=0.02)
    seen, unseen = DraftState(8, gain_s=0.0), DraftState(8, gain_s=0.0)
    num_seen = sum(one.choose([seen], 8, step_s=0.05) != [0] for _ in range(320))
    num_unseen = sum(many.choose([unseen], 8, 0.05, num_steps=8) != [0] for _ in range(40))
    assert num_unseen == pytest.approx(num_seen, abs=2)
    assert num_seen > 5


def test_a_new_request_is_tried_once_out_of_the_time_set_aside() -> None:
    made, paying, new = asking(per_sequence_s=1e-3), DraftState(8, gain_s=1.0), DraftState(8, gain_s=0.0)
    num_tried = 0
    for _ in range(200):
        # Each step sets 1.5 % of 20 ms aside, 0.3 of what asking takes.
        assert made.choose([paying], 8, step_s=0.02) == [8]
        num_tried += made.may_try(new)
    assert 50 <= num_tried <= 62
    made.choose([paying], 8, step_s=1.0)
    new.gained(0.0)
    assert not made.may_try(new)


def test_new_requests_expect_what_the_first_offers_of_others_saved() -> None:
    first = FirstGain()
    old = DraftState(8, num_gains=50)
    for _ in range(100):
        young = DraftState(8)
        young.gained(1e-3)
        first.observe(young, 1e-3)
        first.observe(old, 1.0)
    assert first.seconds == pytest.approx(1e-3)


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
