"""Who is asked for drafts: where it pays, in turn where it might, and nobody where speculation is off."""

from __future__ import annotations

import itertools
from math import inf

import pytest

from scheduler.asking import Asking
from scheduler.draft_cost import DraftCost
from scheduler.draft_state import DraftState, FirstGains, make_state
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


def test_what_is_asked_in_a_step_that_ends_the_text_is_lost() -> None:
    lasting, ending = DraftState(8, gain_s=2e-3, lasts=0.9), DraftState(8, gain_s=2e-3, lasts=0.01)
    assert asking().choose([lasting, ending], 8, step_s=1e-9) == [8, 0]
    made = asking()
    made.row_s, made.mean_masks = 1e-4, 4.0
    for state, wants in ((lasting, True), (ending, False)):
        state.may_mask, state.mask_gain_s, state.gain_s = True, 2e-3, inf
        assert made.pays(state, is_paid=True)
        assert state.wants_masks is wants


def test_off_is_never_asked_and_on_always() -> None:
    off = make_state(Speculation(SpeculationMode.OFF), 8)
    forced = make_state(Speculation(SpeculationMode.ON, max_tokens=3), 8)
    made = asking()
    for _ in range(100):
        assert made.choose([off, forced], 8, step_s=1e-9) == [0, 3]


def test_where_proposing_is_cheap_everybody_is_asked_every_step() -> None:
    states = [DraftState(8, gain_s=0.0) for _ in range(4)]
    assert asking(per_sequence_s=1e-6).choose(states, 8, step_s=0.01) == [8] * 4


def test_in_vain_proposals_take_little_of_the_time() -> None:
    """With what is paid once, and with the row that each of them has verified."""
    made, states = asking(per_sequence_s=1e-4), [DraftState(8, gain_s=0.0) for _ in range(16)]
    made.extra, made.row_s = (3e-4, 0.0), 1e-4
    spent_s = 0.0
    for _ in range(2000):
        asked = sum(wish > 0 for wish in made.choose(states, 8, step_s=0.005))
        spent_s += asked * 2e-4 + (3e-4 if asked else 0.0)
    assert 0.5 * 0.005 <= spent_s / (2000 * 0.005) <= 1.2 * 0.005


def test_everybody_is_asked_in_turn() -> None:
    made, states = asking(per_sequence_s=1e-3), [DraftState(8, gain_s=0.0) for _ in range(40)]
    asked_at = [[] for _ in states]  # type: list[list[int]]
    for step in range(2000):
        for index, wish in enumerate(made.choose(states, 8, step_s=0.02)):
            if wish:
                asked_at[index].append(step)
    assert all(len(steps) >= 3 for steps in asked_at)
    assert max(map(len, asked_at)) - min(map(len, asked_at)) <= 1


def test_however_dear_proposing_is_somebody_is_asked() -> None:
    """A price that cannot be learned again is a trap."""
    made, states = asking(per_sequence_s=100.0), [DraftState(8, gain_s=0.0) for _ in range(4)]
    asked_at = [step for step in range(1200) if any(made.choose(states, 8, step_s=0.01))]
    assert len(asked_at) == 1200 // (8 * SETTINGS.probe_every)


def num_asked(made: Asking, num_seqs: int) -> int:
    states = [DraftState(8, gain_s=0.0) for _ in range(num_seqs)]
    return sum(sum(wish > 0 for wish in made.choose(states, 8, step_s=0.01)) for _ in range(400))


def test_early_on_more_time_is_set_aside() -> None:
    made = Asking(SETTINGS, is_selective=True)
    for _ in range(10):
        made.cost.observe(1, 0, 1e-3)
    assert num_asked(made, 8) > 5 * num_asked(asking(per_sequence_s=1e-3), 8)


def test_the_more_streams_the_less_time_is_set_aside() -> None:
    found = [num_asked(asking(per_sequence_s=1e-3), count) for count in (1, 2, 8, 32)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(0.02 * 400 * 0.01 / 1e-3, rel=0.1)
    assert found[-1] <= found[0] / 5


def test_those_who_are_asked_pay_together_what_is_paid_once() -> None:
    made = asking(per_sequence_s=1e-4)
    made.extra = (1e-3, 0.0)
    few = [DraftState(8, gain_s=4e-4) for _ in range(3)]
    assert made.choose(few, 8, step_s=1e-9) == [0] * 3
    assert made.choose([*few, DraftState(8, gain_s=4e-4)], 8, step_s=1e-9) == [8] * 4
    assert made.choose([DraftState(8, gain_s=2e-3), DraftState(8, gain_s=0.5e-4)], 8, step_s=1e-9) == [8, 0]


def test_a_new_request_need_not_pay_alone_what_is_paid_once() -> None:
    made, new = asking(per_sequence_s=1e-4), DraftState(8, gain_s=4e-4)
    made.extra = (1e-3, 0.0)
    assert made.pays(new, is_paid=True)
    assert not made.pays(new, is_paid=False)
    assert made.choose([DraftState(8, gain_s=4e-4) for _ in range(2)], 8, step_s=1e-9) == [0] * 2
    assert not made.pays(new, is_paid=False)
    assert made.choose([DraftState(8, gain_s=4e-4) for _ in range(3)], 8, step_s=1e-9) == [0] * 3
    assert made.pays(new, is_paid=False)
    assert not made.pays(DraftState(8, gain_s=0.5e-4), is_paid=False)


def test_mask_rows_are_asked_where_what_they_saved_exceeds_what_they_cost() -> None:
    made = asking(per_sequence_s=1e-4)
    made.row_s, made.mean_masks = 1e-4, 4.0
    masks = DraftState(8, gain_s=0.0, may_mask=True, mask_gain_s=6e-4)
    dear = DraftState(8, gain_s=1e-3, may_mask=True, mask_gain_s=3e-4)
    never = DraftState(8, gain_s=1e-3, may_mask=False)
    states = [masks, dear, never]
    assert made.choose(states, 8, step_s=1e-9) == [8, 8, 8]
    assert [state.wants_masks for state in states] == [True, False, False]
    made.row_s = 2e-4
    assert made.choose(states, 8, step_s=1e-9) == [0, 8, 8]
    # An estimate that cannot change is a trap: masks are tried again out of the time set aside.
    tried = 0
    for _ in range(400):
        made.choose([dear], 8, step_s=0.05)
        tried += dear.wants_masks
    assert 5 <= tried <= 400 // SETTINGS.probe_every


def test_mask_rows_must_also_pay_for_being_read() -> None:
    made = Asking(SETTINGS, is_selective=True)
    for number in range(400):
        num_asked, num_masks = 1 + number % 4, 4 * (number % 3)
        made.cost.observe(num_asked, 0, 1e-4 * num_asked + 1e-4 * num_masks, num_masks)
    made.row_s, made.mean_masks = 1e-4, 4.0
    dear = DraftState(8, gain_s=1e-3, may_mask=True, mask_gain_s=6e-4)
    pays = DraftState(8, gain_s=1e-3, may_mask=True, mask_gain_s=1e-3)
    made.choose([dear, pays], 8, step_s=1e-9)
    assert [dear.wants_masks, pays.wants_masks] == [False, True]


def test_what_masks_saved_is_not_what_others_would_have_saved() -> None:
    state = DraftState(8, gain_s=1e-3, may_mask=True)
    state.is_masked = state.wants_masks = True
    state.gained(5e-3, is_of_masks=True)
    assert (state.gain_s, state.mask_gain_s) == (1e-3, 5e-3)
    state.gained(1e-3)
    assert (state.gain_s, state.mask_gain_s) == (1e-3, 0.75 * 5e-3)


def test_mask_rows_that_find_no_room_save_nothing() -> None:
    """Asked for their sake, a request would be asked in vain for ever."""
    gains, state = FirstGains(), DraftState(8, may_mask=True, mask_gain_s=1e-3)
    gains.expect(state, 2)
    state.mask_gain_s, state.wants_masks, state.is_masked = 1e-3, True, False
    for _ in range(20):
        gains.observe(state, 0.0, is_of_masks=False)
        state.gained(0.0)
    assert state.mask_gain_s < 1e-5
    new = DraftState(8, may_mask=True)
    gains.expect(new, 2)
    assert new.mask_gain_s == 0.0


def test_a_gain_is_a_mean() -> None:
    state = DraftState(8)
    state.gained(0.0)
    for number in range(400):
        state.gained(1e-3 * (number % 2))
    assert state.gain_s == pytest.approx(0.5e-3, rel=0.2)


def test_who_answers_in_vain_waits_longer_than_others() -> None:
    made = asking(per_sequence_s=1e-3)
    vain, other = DraftState(8, gain_s=0.0), DraftState(8, gain_s=0.0)
    count = [0, 0]
    for _ in range(4000):
        for index, wish in enumerate(made.choose([vain, other], 8, step_s=0.02)):
            count[index] += wish > 0
            if wish and not index:
                vain.gained(0.0)
    assert 4 * count[0] < count[1]
    vain.gained(1e-9)
    assert vain.patience == 1


def test_steps_that_went_by_unseen_count_as_if_they_had_been_seen() -> None:
    one, many = asking(per_sequence_s=0.002), asking(per_sequence_s=0.002)
    seen, unseen = DraftState(8, gain_s=0.0), DraftState(8, gain_s=0.0)
    num_seen = sum(one.choose([seen], 8, step_s=0.005) != [0] for _ in range(320))
    num_unseen = sum(many.choose([unseen], 8, 0.005, num_steps=8) != [0] for _ in range(40))
    assert num_unseen == pytest.approx(num_seen, abs=2)
    assert num_seen > 5


def test_a_new_request_is_tried_once_out_of_the_time_set_aside() -> None:
    made, paying, new = asking(per_sequence_s=1e-3), DraftState(8, gain_s=1.0), DraftState(8, gain_s=0.0)
    num_tried = 0
    for _ in range(200):
        # Each step of one stream sets 2 % of 15 ms aside, 0.3 of what asking takes.
        assert made.choose([paying], 8, step_s=0.015) == [8]
        num_tried += made.may_try(new, is_paid=True, num_tokens=10)
    assert 50 <= num_tried <= 62
    made.choose([paying], 8, step_s=1.0)
    new.gained(0.0)
    assert not made.may_try(new, is_paid=True, num_tokens=10)


def first_gain(gains: FirstGains, num_decodes: int) -> float:
    new = DraftState(8)
    gains.expect(new, num_decodes)
    return new.gain_s


def test_new_requests_expect_what_the_first_offers_of_others_saved() -> None:
    gains = FirstGains()
    assert first_gain(gains, 1) == inf
    for _ in range(100):
        state = DraftState(8)
        gains.expect(state, 1)
        for number in range(4):
            gains.observe(state, 1.0 if number else 1e-3, is_of_masks=False)
    assert first_gain(gains, 1) == pytest.approx(1e-3)


def test_what_many_streams_have_taught_is_nothing_to_one() -> None:
    gains, old = FirstGains(), DraftState(8)
    gains.expect(old, 32)
    gains.observe(old, 0.0, is_of_masks=False)
    old.gained(0.0)
    assert first_gain(gains, 33) == 0.0
    assert first_gain(gains, 1) == inf
    gains.expect(old, 20)
    assert old.gain_s == 0.0, "about as many streams: its own record holds"
    gains.expect(old, 2)
    assert old.gain_s == inf
    gains.observe(old, 5e-3, is_of_masks=False)
    assert first_gain(gains, 3) == 5e-3, "its next answer is a first one of this load"


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


def test_what_a_trial_takes_in_is_paid_for_out_of_the_same_time() -> None:
    """Else those that are tried after a long silence would cost several times what is set aside."""

    def num_tried(unseen_s: float) -> int:
        made = asking(per_sequence_s=1e-4)
        for _ in range(100):
            made.cost.observe(1, 0, 1e-4 + 100 * unseen_s, num_unseen=100)
            made.cost.observe(1, 0, 1e-4, num_unseen=0)
        states = [DraftState(8, gain_s=0.0) for _ in range(4)]
        return sum(any(made.choose(states, 8, step_s=1e-3)) for _ in range(4000))

    assert num_tried(1e-5) < 0.5 * num_tried(0.0)
