"""Random steps of attention: hypothesis draws the awkward sizes and shrinks what fails."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_trees import MASK_ALL, Piece, tree
from tests.kernels.triton.worlds import check

LENGTHS = [0, 1, 15, 16, 17, 31, 33, 61, 63, 64, 65, 127, 128, 129, 251]


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    start, num_rows = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from([1, 1, 1, 2, 5, 8, 31, 33, 70]))
    if draw(st.booleans()):
        return Piece(start, num_rows, draw(st.sampled_from([1, 1, 8, 32, MASK_ALL])))
    return tree(random.Random(draw(st.integers(0, 99))), start, min(num_rows, 64), draw(st.sampled_from([1, 3, 64])))


@settings(max_examples=16, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(pieces(), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]),
    st.sampled_from([1, 2]),
    st.sampled_from([16, 64, 80]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([None, None, 1, 5, 64, 1000]),
    st.sampled_from([1, 3, 6]),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from(["normal", "one-hot"]),
)
def test_random_steps_equal_their_definition(
    step: list[Piece],
    group: int,
    num_kv: int,
    head_dim: int,
    page_size: int,
    window: int | None,
    num_programs: int,
    dtype: torch.dtype,
    values: str,
) -> None:
    check(step, Shape(group * num_kv, num_kv, head_dim, page_size, dtype), window, num_programs, values)
