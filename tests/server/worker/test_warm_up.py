"""Warm-up runs attention in every form that a step can ask for: what a form is, is read off the plans themselves."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from kernels.triton.plan import plan_step, row_masks
from kernels.triton.tiles import Geometry
from scheduler.types import Admission, DiffusionModel, StepPlan
from server.worker.batch import HostBatch, host_batch
from server.worker.gpu_checks import random_checks
from server.worker.random_steps import Space, random_batches, random_plans
from server.worker.recipe import make_recipe
from server.worker.sequences import SequenceState, make_sequences
from server.worker.warm_up import kernel_steps
from tests.server.worker.tiny_model import TinyModel, make_worker

ROWS = 400
SPACE = Space(2000, 64, 1024, 50, DiffusionModel(3, 8))
Form = tuple[Geometry, bool]


def batches(plans: Iterable[StepPlan]) -> list[HostBatch]:
    table = make_sequences(64, SPACE.model_len, SPACE.num_pages, SPACE.page_size)

    def state(new: Admission, slot: int, step: int) -> SequenceState:
        return SequenceState(new.request, make_recipe(new.request, ()), slot, [], step)

    found = []
    for plan in plans:
        table.apply(plan, state)
        if plan.spans:
            states = [table[span.seq_id] for span in plan.spans]
            found.append(host_batch(plan.spans, states, table.page_table, SPACE.page_size))
    return found


def forms(found: Iterable[HostBatch], group: int, itemsize: int) -> set[Form]:
    """What the kernels are compiled for besides the model: tiles of each launch, and whether tree masks are read."""
    return {
        (launch.geometry, host.rows.tree is not None)
        for host in found
        for launch in plan_step(host.rows, row_masks(host.rows, None), group, 1, 128, itemsize, 132)
    }


@functools.cache
def warm(has_trees: bool = True) -> list[HostBatch]:
    """Without the random steps that warm-up adds: they might be the ones that are compared."""
    info = replace(make_worker(TinyModel(50)).info, num_pages=2000, page_size=64, model_len=1024)
    plans = [plan for plan in kernel_steps(info, ROWS, ROWS) if plan.step < 0]
    return batches([plan for plan in plans if has_trees or not any(span.parents for span in plan.spans)])


@functools.cache
def met() -> list[HostBatch]:
    return list(random_batches(random.Random(1), SPACE, 60, ROWS))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 71])
def test_no_random_step_needs_a_form_that_warm_up_did_not_run(group: int) -> None:
    for itemsize in (2, 4):
        assert forms(met(), group, itemsize) <= forms(warm(), group, itemsize)


def test_without_its_trees_warm_up_would_miss_forms() -> None:
    """The comparison above can fail."""
    assert not forms(met(), 4, 2) <= forms(warm(has_trees=False), 4, 2)


def test_the_gpu_check_of_random_steps_counts_what_goes_wrong() -> None:
    model = TinyModel(50)
    worker = make_worker(model, num_pages=200)
    for layer in worker._pool.layers:
        for pages in layer:
            pages.zero_()
    (_, has_compiled_none), (_, is_answered) = random_checks(worker, 60, 6, seed=1)
    assert has_compiled_none
    assert is_answered
    first = next(iter(random_plans(random.Random(1), worker.info, 1, 60)))
    model.poisoned_token = first.spans[0].tokens[0]
    compiled = iter(range(100))
    worker._num_compiled = lambda: next(compiled)
    for what, is_right in random_checks(worker, 60, 6, seed=1):
        assert not is_right, what
