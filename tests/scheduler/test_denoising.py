"""The pass for denoise spans: whole or not at all, nobody for ever, decodes protected, prompts kept going."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler.fake_worker import FakeWorker, features_of
from scheduler.scheduler import Scheduler
from scheduler.simulation import Machine, percentile, request_of
from scheduler.span_offers import SpanOffer, buy_spans
from scheduler.step_cost import StepCost
from scheduler.types import DiffusionModel, Limits, Read, Request, Sampling, StepResult, Topology
from tests.scheduler.diffusion_worlds import DiffusionWorld, dual_model
from tests.scheduler.test_block_diffusion import B, denoising
from tests.scheduler.worlds import VOCAB, make_limits, make_request


def linear(spans: int, rows: int) -> float:
    return 0.010 + 1e-4 * rows


def test_all_spans_that_fit_are_bought_while_they_finish_more_than_they_cost() -> None:
    offers = [SpanOffer(8, 8, 0.2)] * 3
    assert buy_spans(offers, 4.0, 100, linear) == [8, 8, 8]
    assert buy_spans(offers, 4.0, 17, linear) == [8, 8, 0]


def test_a_fused_span_becomes_a_narrow_one_where_rows_are_short_and_never_anything_in_between() -> None:
    offers = [SpanOffer(8, 16, 0.2), SpanOffer(8, 16, 0.1)]
    assert buy_spans(offers, 1.0, 31, linear) == [16, 8]
    assert buy_spans(offers, 1.0, 15, linear) == [8, 0]
    assert buy_spans(offers, 1.0, 7, linear) == [0, 0]


def test_a_span_that_yields_less_than_the_step_is_passed_over_until_it_is_due() -> None:
    poor = SpanOffer(32, 32, 0.01)
    # 40 decodes at 10 ms are 4,000 tokens a second; 32 rows at 3.2 ms for 0.32 tokens are 100.
    assert buy_spans([SpanOffer(8, 8, 1.0), poor], 40.0, 99, linear) == [8, 0]
    assert buy_spans([SpanOffer(8, 8, 1.0), poor._replace(num_passed=3, is_due=True)], 40.0, 99, linear) == [8, 32]
    assert buy_spans([poor], 40.0, 99, linear) == [32], "one is always taken"


def test_the_longest_passed_over_goes_first_and_the_time_bound_holds_for_all_but_one() -> None:
    offers = [SpanOffer(8, 8, 0.9, n, is_due=True) for n in (3, 5, 4)]
    assert buy_spans(offers, 1.0, 16, linear) == [0, 8, 8]
    assert buy_spans(offers, 1.0, 99, linear, bound_s=0.0119) == [0, 8, 8]
    assert buy_spans(offers, 1.0, 99, linear, bound_s=0.001) == [0, 8, 0]
    assert buy_spans([SpanOffer(8, 16, 0.9)], 1.0, 99, linear, bound_s=0.001) == [8], "the narrower of the two"


def test_denoise_spans_that_do_not_fit_take_turns() -> None:
    limits = make_limits(max_batched_tokens=2 * B, max_seqs=8)
    world = DiffusionWorld(limits, dual_model(B))
    for number in range(6):
        world.add(denoising(f"d{number}", prompt=2, max_tokens=6 * B, sampling=Sampling(seed=number)))
    last_seen: dict[str, int] = {}
    while (plan := world.step()) is not None:
        for span in plan.spans:
            assert len(span.tokens) in (B, 2 * B)
        running = [seq for seq in world.scheduler._queues.running if seq.decoding.is_denoising]
        for seq in running:
            state = seq.denoising
            last_seen[seq.request.id] = state.num_passed if state else 0
            assert last_seen[seq.request.id] <= 6
    world.finish()
    assert len(last_seen) == 6


def test_decodes_are_never_refused_and_somebody_always_denoises() -> None:
    limits = make_limits(max_batched_tokens=2 * B + 3, max_seqs=8)
    world = DiffusionWorld(limits, dual_model(B))
    for number in range(4):
        world.add(make_request(f"a{number}", 3, 40, sampling=Sampling(seed=number)))
        world.add(denoising(f"d{number}", prompt=3, max_tokens=20, sampling=Sampling(seed=number)))
    num_steps = 0
    while world.scheduler.has_work:
        is_due = any(seq.decoding.is_denoising for seq in world.scheduler._queues.running)
        plan = world.step()
        assert plan is not None
        assert not is_due or any(span.mask_block == B for span in plan.spans), "nobody denoises in this step"
        num_steps += is_due
    assert num_steps > 20
    world.finish()


def test_a_step_counts_its_denoise_rows() -> None:
    world = DiffusionWorld(make_limits(), dual_model(B))
    world.add(denoising("d", prompt=2, max_tokens=3 * B))
    world.add(make_request("a", 3, 5))
    world.finish()
    for plan, stats in zip(world.plans, world.stats, strict=True):
        rows = sum(len(span.tokens) for span in plan.spans if span.mask_block == B)
        assert stats.denoise_tokens == rows


@pytest.mark.parametrize(
    ("model", "request_", "param"),
    [
        (None, denoising(), "decoding"),
        (dual_model(B, is_dual=False), make_request("a"), "decoding"),
        (dual_model(64), denoising(), "decoding"),
        (dual_model(B), denoising(max_tokens=0), "max_tokens"),
        (dual_model(B), denoising(sampling=Sampling(prompt_logprobs=0)), "prompt_logprobs"),
        (dual_model(B), denoising(prompt=256, max_tokens=4), "prompt"),
        (dual_model(B, shift=1), denoising(policy="wino"), "decoding.selector"),
        (dual_model(B, shift=1), denoising(policy="learn2pd"), "decoding.selector"),
    ],
)
def test_what_can_never_run_is_refused_with_the_parameter_to_blame(
    model: DiffusionModel | None, request_: Request, param: str
) -> None:
    limits = make_limits(max_batched_tokens=64, max_model_len=258, page_size=64)
    fault = Scheduler(limits, diffusion=model).add(request_, 0.0)
    assert fault is not None
    assert (fault.status, fault.param) == (400, param)


def test_what_fits_exactly_is_not_refused() -> None:
    limits = make_limits(max_batched_tokens=2 * B, max_model_len=256, page_size=B, num_pages=64)
    scheduler = Scheduler(limits, diffusion=dual_model(B))
    assert scheduler.add(denoising("a", prompt=255, max_tokens=99), 0.0) is None
    assert scheduler.add(denoising("b", prompt=200, max_tokens=99, policy="wino"), 0.0) is None
    few = Scheduler(replace(limits, num_pages=63), diffusion=dual_model(B))
    assert (fault := few.add(denoising("a", prompt=250, max_tokens=3), 0.0)) is not None
    assert fault.param == "max_tokens"


def test_a_page_holds_whole_blocks() -> None:
    with pytest.raises(ValueError, match="page_size is 6; it must be a multiple of the model's block size, 4"):
        Scheduler(make_limits(page_size=6), diffusion=dual_model(B))
    Scheduler(make_limits(page_size=6), diffusion=DiffusionModel(VOCAB, B, Topology.BIDIRECTIONAL))


def test_the_time_between_tokens_holds_while_32_requests_denoise() -> None:
    """Simulated clock: 8 streams alone, then beside 32 diffusion requests of blocks of 16, with a step time that grows
    with its rows."""
    quiet, crowded = _gaps(0), _gaps(32)
    ratio = percentile(crowded, 99) / percentile(quiet, 50)
    as_decodes = Machine(noise=0.0)._rows(40) / Machine(noise=0.0)._rows(8)
    assert ratio < 1.45 * as_decodes
    # The control: all denoise rows in each step would take several times as long.
    assert Machine(noise=0.0)._rows(8 + 32 * 16) / Machine(noise=0.0)._rows(8) > 2 * ratio


def _gaps(num_denoising: int) -> list[float]:
    """Seconds between tokens of 8 streams, from the moment when all prompts are in."""
    machine, rng, now = Machine(noise=0.02, outlier_rate=0.0), random.Random(0), 0.0
    limits, model = Limits(1024, 64, 1024, 4096, 16), dual_model(16)
    scheduler = Scheduler(limits, StepCost(machine.profile(rng)), diffusion=model)
    worker = FakeWorker(limits.num_pages, limits.page_size, VOCAB, diffusion=model)
    for number in range(8):
        assert scheduler.add(request_of(f"a{number}", 32, 150, rng), now) is None
    for number in range(num_denoising):
        assert scheduler.add(denoising(f"d{number}", 20, 500, sampling=Sampling(seed=number)), now) is None
    gaps: list[float] = []
    last: dict[str, float] = {}
    for step in range(140):
        plan = scheduler.schedule(now)
        assert plan is not None
        assert step < 20 or not num_denoising or any(span.read is Read.DENOISE for span in plan.spans)
        elapsed = machine.seconds(features_of(plan), rng)
        now += elapsed
        deltas, _ = scheduler.update(plan, StepResult(plan.step, worker.run(plan), elapsed), now)
        for delta in deltas:
            if delta.request_id.startswith("a") and delta.tokens:
                if delta.request_id in last and step > 20:
                    gaps.append(now - last[delta.request_id])
                last[delta.request_id] = now
    return gaps
