"""Random steps with sparse rows of all methods among dense ones, against the reference that reads a row at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.reference import ReferenceOps
from kernels.sparse import Method, least_budget
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_sparse import Wish
from tests.kernels.triton.interpreted.test_sparse_rows import CHOOSE, FOLLOW, SparseOps, filled

WISHES = st.lists(
    st.tuples(st.sampled_from([None, *Method]), st.integers(0, 60), st.integers(1, 60), st.integers(1, 3)),
    min_size=1,
    max_size=4,
)
"""Of each sequence: method or dense, keys over the least budget, keys more than the budget, rows of its span."""


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    WISHES,
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 2]),
    st.sampled_from([16, 40]),
    st.sampled_from([1, 4, 7, 16]),
    st.sampled_from([1, 3]),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_random_steps_read_what_the_reference_reads(
    wanted: list[tuple[Method | None, int, int, int]],
    group: int,
    num_kv: int,
    head_dim: int,
    page_size: int,
    num_programs: int,
    dtype: torch.dtype,
) -> None:
    shape = Shape(group * num_kv, num_kv, head_dim, page_size, dtype)
    lengths, wishes, spans = [], {}, {}
    for index, (method, more, over, num_rows) in enumerate(wanted):
        budget = least_budget(Method.TIDAL if method is None else method, page_size) + more
        lengths.append(budget + over)
        spans[index] = (budget + over - num_rows, budget + over)
        if method is not None:
            wishes[index] = Wish(method, budget)
    results = []
    for ops in (ReferenceOps(), SparseOps(num_programs)):
        world = filled(ops, shape, lengths)
        rows = world.rows(spans, wishes)
        q = world.write(rows, spans)
        outs = [world.attend(q, rows, dataclasses.replace(world.layer, roles=roles)) for roles in (CHOOSE, FOLLOW)]
        results.append((outs, None if rows.sparse is None else rows.sparse.lists))
    bound = 2.0**-9 if dtype == torch.float16 else 1e-5
    for expected, actual in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)
    if results[0][1] is not None:
        assert results[1][1] is not None
        assert torch.equal(results[0][1], results[1][1])
