"""Canvases as integers: how long, how many tokens a step, and which ones are refused on arrival."""

from __future__ import annotations

import pytest

from scheduler.decoding.canvas import DREAM_EPS, canvas_quota, refuse_canvas
from tests.scheduler.canvas_worker import MASK, Run, diffusion, model, request
from tests.scheduler.worlds import make_limits


def test_dreams_schedule_spreads_the_masks_over_its_steps() -> None:
    asked = diffusion("entropy", block_size=8, steps=4)
    left, counts = 8, []
    for step in range(4):
        counts.append(canvas_quota(asked, 8, left, step))
        left -= counts[-1]
    noise = [1 - (1 - DREAM_EPS) * s / 4 for s in range(5)]
    assert counts == [int(8 * (1 - noise[1])), int(7 * (1 - noise[2] / noise[1])), 2, 3]
    assert left == 0


def test_lladas_quotas_are_even_with_the_larger_ones_first() -> None:
    asked = diffusion("low_confidence", block_size=8, steps=3)
    run = Run(request(asked, max_tokens=8)).finish()
    assert [span.tokens.count(MASK) for span in run.spans] == [8, 5, 2]


REFUSED = [
    ({"prompt": 64, "max_tokens": 4}, {}, "room for 0"),
    ({}, {"gen_length": 6}, "multiple of block_size"),
    ({}, {"gen_length": 64}, "room for 59"),
    ({"max_tokens": 40}, {}, "45 tokens"),
    ({"prompt": 45, "max_tokens": 4}, {}, "49 tokens"),
]


@pytest.mark.parametrize(("of_request", "of_decoding", "message"), REFUSED)
def test_a_canvas_that_can_never_be_computed_is_refused(
    of_request: dict[str, int], of_decoding: dict[str, object], message: str
) -> None:
    limits = make_limits(max_batched_tokens=40, max_model_len=64, num_pages=64)
    asked = request(diffusion(**of_decoding), **of_request)  # type: ignore[arg-type]
    assert asked.decoding is not None
    fault = refuse_canvas(asked, asked.decoding, model(), limits)
    assert fault is not None
    assert fault.status == 400
    assert message in fault.message


def test_a_canvas_needs_pages_for_all_of_it() -> None:
    asked = request(diffusion(), max_tokens=12)
    assert asked.decoding is not None
    few = make_limits(max_model_len=16, num_pages=4)
    assert refuse_canvas(asked, asked.decoding, model(), few) is None, "the context cuts it to what fits"
    fault = refuse_canvas(asked, asked.decoding, model(), make_limits(max_model_len=64, num_pages=4))
    assert fault is not None
    assert "17 tokens" in fault.message
