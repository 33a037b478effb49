"""The step-time model: learns the shape, keeps what it learned, is not fooled by a busy neighbour."""

from __future__ import annotations

import math
import random

import pytest

from scheduler.simulation import Machine
from scheduler.step_cost import StepCost, with_prefill
from scheduler.types import StepFeatures, StepSample

SHAPES = {
    "cpu": Machine(outlier_rate=0.0),
    "flat, then steep": Machine(((1, 0.010), (64, 0.0102), (256, 0.012), (512, 0.020), (2048, 0.08)), 1e-8, 1e-10),
    "a line": Machine(((1, 0.001), (4096, 0.8)), 0.0, 0.0),
}


def random_step(rng: random.Random) -> StepFeatures:
    decodes = rng.choice((0, 1, 8, 32))
    context = sum(rng.randint(1, 1000) for _ in range(decodes))
    features = StepFeatures(decodes, 0, decodes, context)
    if decodes == 0 or rng.random() < 0.5:
        return with_prefill(features, rng.randrange(1000), rng.choice((16, 50, 100, 300, 512)))
    return features


def trained(machine: Machine, seed: int, steps: int = 400) -> StepCost:
    rng = random.Random(seed)
    cost = StepCost(machine.profile(rng))
    for _ in range(steps):
        features = random_step(rng)
        cost.observe(features, machine.seconds(features, rng))
    return cost


def error_of(cost: StepCost, machine: Machine, seed: int) -> float:
    rng = random.Random(seed)
    errors = []
    for _ in range(200):
        features = random_step(rng)
        exact = machine.seconds(features, None)
        errors.append(abs(cost.predict(features) - exact) / exact)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_are_within_a_tenth_on_average(shape: str) -> None:
    machine = SHAPES[shape]
    assert error_of(trained(machine, 1), machine, 2) < 0.1


def test_the_reported_error_is_the_error_of_the_predictions() -> None:
    cost = trained(Machine(noise=0.05, outlier_rate=0.0), 3)
    assert 0.02 < cost.mean_error < 0.08


def test_more_work_is_never_predicted_to_be_faster() -> None:
    for seed in range(5):
        cost = trained(Machine(noise=0.3), seed)
        times = [cost.predict(with_prefill(StepFeatures(8, 0, 8, 800), 100, rows)) for rows in range(0, 1000, 7)]
        assert times == sorted(times)


def test_a_busy_neighbour_now_and_then_hardly_moves_the_predictions() -> None:
    machine = Machine(noise=0.05, outlier_rate=0.05, outlier_factor=10.0)
    exact = Machine(noise=0.0, outlier_rate=0.0)
    assert error_of(trained(machine, 4), exact, 5) < 0.15


def test_one_outlier_moves_a_prediction_by_less_than_a_tenth() -> None:
    cost = trained(Machine(outlier_rate=0.0), 6)
    features = StepFeatures(8, 0, 8, 4000)
    before = cost.predict(features)
    for _ in range(4):
        cost.observe(features, before * (50 if _ == 0 else 1))
    assert cost.predict(features) <= 1.1 * before


def test_a_machine_that_becomes_slower_is_followed() -> None:
    cost = trained(Machine(outlier_rate=0.0), 7)
    features = StepFeatures(8, 0, 8, 4000)
    slow = 3.0 * Machine().seconds(features, None)
    for _ in range(300):
        cost.observe(features, slow)
    assert cost.predict(features) == pytest.approx(slow, rel=0.15)


def test_a_slower_machine_is_expected_to_be_slower_at_what_was_not_seen_since() -> None:
    cost = trained(Machine(outlier_rate=0.0), 7)
    features, mixed = StepFeatures(8, 0, 8, 4000), with_prefill(StepFeatures(8, 0, 8, 4000), 200, 256)
    before = cost.predict(mixed)
    for _ in range(300):
        cost.observe(features, 3.0 * Machine().seconds(features, None))
    assert cost.predict(mixed) > 2.0 * before


def test_noise_does_not_bias_the_predictions() -> None:
    noisy = Machine(noise=0.2, outlier_rate=0.0)
    exact = Machine(noise=0.0, outlier_rate=0.0)
    cost = trained(noisy, 11, steps=3000)
    rng = random.Random(12)
    # The mean of the noise is exp(0.2 ** 2 / 2).
    ratios = [cost.predict(step) / exact.seconds(step, None) for step in (random_step(rng) for _ in range(200))]
    assert sum(ratios) / len(ratios) == pytest.approx(math.exp(0.02), abs=0.06)


def test_an_hour_of_decoding_does_not_wipe_out_what_prefill_costs() -> None:
    machine = Machine(noise=0.03, outlier_rate=0.0)
    cost = trained(machine, 8)
    rng = random.Random(9)
    for step in range(8_000):
        features = StepFeatures(8, 0, 8, 8 * (100 + step % 500))
        cost.observe(features, machine.seconds(features, rng))
    mixed = with_prefill(StepFeatures(8, 0, 8, 2400), 200, 128)
    assert cost.predict(mixed) == pytest.approx(machine.seconds(mixed, None), rel=0.2)


def test_the_largest_prefill_fits_its_target_and_one_more_row_does_not() -> None:
    cost = trained(Machine(outlier_rate=0.0), 10)
    decodes = StepFeatures(8, 0, 8, 2400)
    rows = cost.largest_prefill(decodes, 300, 4000, 0.03)
    assert 0 < rows < 4000
    assert cost.predict(with_prefill(decodes, 300, rows)) <= 0.03
    assert cost.predict(with_prefill(decodes, 300, rows + 1)) > 0.03


def test_a_clock_that_stood_still_teaches_nothing() -> None:
    cost = StepCost()
    cost.observe(StepFeatures(1, 0, 1, 1), 0.0)
    assert not cost.is_ready
    assert cost.predict(StepFeatures(1, 0, 1, 1)) == 0.0


def verifying(seqs: int, drafts: int, context: int) -> StepFeatures:
    """`seqs` sequences with `drafts` drafts each, over `context` keys."""
    keys, count = context + drafts, seqs * drafts
    return StepFeatures(seqs + count, 0, seqs, seqs * keys, 0, count, count * keys)


def test_what_a_verified_row_costs_beyond_a_prompt_row_is_learned() -> None:
    """Its logits are read, its draft is judged, its keys were read by the row before it."""

    def exact(features: StepFeatures) -> float:
        return Machine(noise=0.0, outlier_rate=0.0).seconds(features, None) + 2e-4 * features.judged

    rng = random.Random(13)
    cost = StepCost()
    for _ in range(800):
        features = verifying(rng.choice((1, 4, 16)), rng.randrange(9), rng.randrange(2000))
        if rng.random() < 0.3:
            features = with_prefill(features, rng.randrange(1000), rng.choice((16, 100, 300)))
        cost.observe(features, exact(features) * math.exp(rng.gauss(0.0, 0.03)))
    errors = []
    for _ in range(100):
        features = verifying(rng.choice((1, 4, 16)), rng.randrange(9), rng.randrange(2000))
        errors.append(abs(cost.predict(features) / exact(features) - 1.0))
    assert sum(errors) / len(errors) < 0.05
    extra = cost.predict(verifying(8, 8, 500)) - cost.predict(with_prefill(verifying(8, 0, 508), 0, 64))
    assert extra > 0.5 * 64 * 2e-4


def test_the_curve_of_a_step_is_its_prediction() -> None:
    cost = trained(Machine(outlier_rate=0.0), 14)
    decodes = verifying(12, 0, 700)
    curve = cost.curve(decodes, 300)
    for drafts in (0, 5, 40, 200):
        for rows in (0, 16, 500):
            context = drafts * 700
            features = with_prefill(decodes, 300, rows)
            features = features._replace(tokens=features.tokens + drafts, judged=drafts, draft_context=context)
            assert curve(drafts, rows) == pytest.approx(cost.predict(features), rel=1e-9)


def test_the_curve_of_denoise_spans_is_the_prediction_of_decodes_of_many_rows() -> None:
    cost = StepCost(Machine(noise=0.0).profile(random.Random(0)))
    decodes = StepFeatures(5, 0, 5, 400)
    curve = cost.span_curve(decodes, 50)
    for spans, rows in ((0, 0), (1, 8), (3, 96), (20, 640)):
        joined = StepFeatures(5 + rows, 0, 5 + spans, 400 + 50 * spans, 0, rows - spans, 50 * (rows - spans))
        assert curve(spans, rows) == pytest.approx(cost.predict(joined))


def test_drafts_that_are_tried_now_and_then_do_not_make_rows_dear() -> None:
    """What is dearer about a step with any of them is not a price of each: a crowd would never be asked."""
    seeds = [(StepFeatures(n, 0, n, 100 * n), 0.010 + 1e-4 * n) for n in (1, 8, 32)]
    seeds += [(StepFeatures(n, n, 0, 0, n * n // 2, 1), 0.010 + 1e-4 * n) for n in (16, 64, 256)]
    seeds += [(StepFeatures(4 * n, 0, n, 100 * n, 0, 3 * n, 300 * n), 0.010 + 4e-4 * n) for n in (2, 8)]
    cost = StepCost([StepSample(*seed) for seed in seeds])
    plain = StepFeatures(8, 0, 8, 800)
    for number in range(1000):
        if number % 20:
            cost.observe(plain, 0.0108)
        else:
            cost.observe(plain._replace(tokens=9, judged=1, draft_context=100), 0.0128)
    seconds = cost.curve(plain, 0)
    assert seconds(1, 0) - seconds(0, 0) > 1.5e-3
    assert seconds(2, 0) - seconds(1, 0) < 3e-4
