"""Random worlds in which some requests fill canvases, with every cache, and others decode beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.types import Read
from tests.scheduler.canvas_worker import diffusion, model, request
from tests.scheduler.canvas_worlds import CanvasWorld, canvas_world, play_canvases
from tests.scheduler.worlds import make_limits

NUM_WORLDS = 160


@pytest.mark.parametrize("part", range(4))
def test_every_request_of_a_random_world_reads_as_if_it_had_run_alone(part: int) -> None:
    num_preempted = num_full = num_partial = num_decodes = 0
    for seed in range(part, NUM_WORLDS, 4):
        world = canvas_world(seed)
        try:
            play_canvases(world, seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        num_decodes += sum(stats.decode_tokens for stats in world.stats)
        spans = [span for plan in world.plans for span in plan.spans if span.read is Read.DENOISE]
        num_full += sum(len(span.tokens) == span.kv_len for span in spans)
        num_partial += sum(len(span.tokens) < span.kv_len for span in spans)
    # Worlds in which nothing happens would prove nothing.
    assert num_preempted > 10
    assert num_decodes > 200
    assert num_full > 200
    assert num_partial > 100


def test_a_canvas_is_computed_whole_whatever_else_waits() -> None:
    world = CanvasWorld(make_limits(max_batched_tokens=24, max_model_len=64), replace(model(), is_dual=True))
    for number in range(4):
        world.add(replace(request(diffusion(cache="dual"), max_tokens=12), id=f"fb{number}"))
        world.add(replace(request(diffusion(), max_tokens=6), id=f"ar{number}", decoding=None))
    world.finish()
    for plan in world.plans:
        assert plan.num_tokens <= 24
        assert all(span.kv_len == 17 for span in plan.spans if span.read is Read.DENOISE)


def test_n_samples_are_the_requests_of_their_seeds() -> None:
    asked = [replace(request(diffusion("random"), seed=seed), id=f"r{seed}") for seed in range(4)]
    world = CanvasWorld(make_limits(), model())
    for one in asked:
        world.add(one)
    world.finish()
    assert len({world.stories[one.id].tokens for one in asked}) == 4
    for one in asked:
        assert world.stories[one.id].tokens == world.truth(one)[0]


def test_no_page_of_a_canvas_is_ever_shared() -> None:
    world = CanvasWorld(make_limits(page_size=2), model())
    for number in range(3):
        world.add(replace(request(diffusion(), prompt=8), id=f"r{number}"))
    world.finish()
    assert sum(stats.prefix_hits for stats in world.stats) == 0
    assert world.stats[-1].pages_cached == 0


def test_an_abort_frees_all_pages() -> None:
    world = CanvasWorld(make_limits(), model())
    world.add(request(diffusion(cache="dual"), max_tokens=12))
    for _ in range(3):
        world.step()
    world.abort("r")
    assert world.scheduler.stats().pages_used == 0


def test_what_can_never_be_computed_is_refused_with_400() -> None:
    world = CanvasWorld(make_limits(max_batched_tokens=16), model())
    fault = world.scheduler.add(request(diffusion(), max_tokens=12), 0.0)
    assert fault is not None
    assert (fault.status, fault.param) == (400, "max_tokens")
    wino = request(diffusion("wino", planner="masks"), max_tokens=4)
    fault = world.scheduler.add(wino, 0.0)
    assert fault is not None
    assert fault.param == "decoding.planner"
