"""Random worlds in which requests denoise, decode and draft side by side."""

from __future__ import annotations

import pytest

from tests.scheduler.diffusion_worlds import diffusion_world, num_denoise_spans, play_diffusion

NUM_WORLDS = 240


@pytest.mark.parametrize("part", range(6))
def test_every_request_of_a_random_world_reads_as_if_it_had_run_alone(part: int) -> None:
    num_preempted = num_hits = num_fused = num_denoise = num_drafts = 0
    for seed in range(part, NUM_WORLDS, 6):
        world = diffusion_world(seed)
        try:
            play_diffusion(world, seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        num_hits += sum(stats.prefix_hits for stats in world.stats)
        num_drafts += sum(stats.draft_tokens for stats in world.stats)
        num_denoise += sum(map(num_denoise_spans, world.plans))
        spans = [span for plan in world.plans for span in plan.spans]
        num_fused += sum(span.denoise is not None and span.start < span.denoise.lo < span.kv_len for span in spans)
    # Worlds in which nothing happens would prove nothing.
    assert num_preempted > 10
    assert num_hits > 20
    assert num_drafts > 20
    assert num_denoise > 500
    assert num_fused > 50
