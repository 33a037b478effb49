"""What is left for KV pages, with numbers; and a worker built on a device that is only played."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionRows, StepRows
from kernels.reference import ReferenceOps
from scheduler.types import StepPlan
from server.worker import build
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.graphs import Capture
from server.worker.memory import MemoryReading, Needs, graph_bytes, kv_budget, ledger, peak_of, show
from server.worker.random_steps import random_plans
from server.worker.warm_up import kernel_steps, largest_steps
from server.worker.worker import Worker
from tests.server.worker.test_graphs import Recorded

GIB, MIB = 1 << 30, 1 << 20
NEEDS = Needs(total=80 * GIB, other=2 * GIB, weights=16 * GIB, activations=3 * GIB, graphs=GIB)


def test_pages_get_what_is_left_of_the_part_that_may_be_used() -> None:
    assert kv_budget(NEEDS, 0.9, None) == 72 * GIB - 22 * GIB
    assert kv_budget(NEEDS, 1.0, None) == 58 * GIB
    held = dict(ledger(NEEDS, 50 * GIB))
    assert sum(held.values()) == 80 * GIB
    assert (held["KV pages"], held["unused"], held["weights"]) == (50 * GIB, 8 * GIB, 16 * GIB)


def test_a_size_that_is_asked_for_is_given_if_the_device_has_it() -> None:
    assert kv_budget(NEEDS, 0.5, 58 * GIB) == 58 * GIB
    message = (
        "kv_cache_bytes (--kv-cache-memory) is 59.00 GiB, but of this device's 80.00 GiB weights take 16.00 GiB, "
        "a step 3.00 GiB, CUDA graphs 1.00 GiB, other programs, libraries and models 2.00 GiB: "
        "at most 58.00 GiB can be had"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        kv_budget(NEEDS, 0.9, 59 * GIB)


def test_where_nothing_is_left_the_setting_and_what_it_would_take_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(--gpu-memory-utilization\) is 0.275: 22.00 GiB .* Raise it above 0\.275"):
        kv_budget(NEEDS, 0.275, None)
    assert kv_budget(NEEDS, 0.276, None) > 0


def readings(*free: int) -> list[MemoryReading]:
    return [MemoryReading(80 * GIB, left, 0, 0, 0) for left in free]


@pytest.mark.parametrize(
    ("free", "num_graphs", "expected"),
    [
        ((9 * GIB, 8 * GIB, 8 * GIB - 2 * MIB), 51, GIB + 100 * MIB),
        ((9 * GIB, 8 * GIB, 8 * GIB), 51, GIB),
        ((9 * GIB, 8 * GIB), 1, GIB),
        ((9 * GIB,), 0, 0),
        ((8 * GIB, 9 * GIB, 9 * GIB), 2, 0),  # somebody else gave memory back meanwhile
    ],
)
def test_graphs_are_estimated_from_two_of_them(free: tuple[int, ...], num_graphs: int, expected: int) -> None:
    assert graph_bytes(readings(*free), num_graphs) == expected


class Played:
    """A device of 1 GiB whose tensors are the host's: `allocated` follows a script, graphs are `Recorded`."""

    def __init__(self, total: int = GIB, other: int = 100 * MIB, peak: int = 40 * MIB) -> None:
        self.total, self.other, self.peak = total, other, peak
        self.allocated = self.peaks = 0
        self.recorded: list[Recorded] = []
        self.calls = 0

    def read(self) -> MemoryReading:
        held = 3 * MIB * (len(self.recorded) > 0) * sum(recorded.num_captured for recorded in self.recorded)
        # Weights are there from the second reading on.
        self.allocated = 16 * MIB * (self.calls > 0)
        self.calls += 1
        free = self.total - self.other - self.allocated - held
        return MemoryReading(self.total, free, self.allocated, self.allocated + held, self.allocated + self.peaks)

    def reset_peak(self) -> None:
        self.peaks = self.peak

    def capture(self) -> Capture:
        self.recorded.append(Recorded())
        return self.recorded[-1]

    def num_compiled(self) -> int:
        return self.calls


class PlannedOps(ReferenceOps):
    """A back end whose forwards may be captured: it has no plan."""

    def plan_words(self, num_rows: int) -> int:
        return 0

    def fix_plans(self, rows: AttentionRows, words: Tensor) -> None:
        pass

    def write_plans(self, host: StepRows, words: NDArray[np.int32]) -> None:
        pass


SHAPE = "hidden=32,layers=2,heads=4,kv_heads=2,mlp=64,vocab=64,max_len=256"


def make(accelerator: Played, **options: object) -> Worker:
    settings: dict[str, object] = {
        "model": "nowhere", "random_weights": SHAPE, "dtype": "float32", "device": "cpu", "num_threads": 1,
        "remember_profile": False, "max_batched_tokens": 64, "max_seqs": 8, "page_size": 16,
    }  # fmt: skip
    return build_worker(WorkerConfig(**(settings | options)), progress=False, accelerator=accelerator)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "select_ops", lambda *args, **options: PlannedOps())


def test_a_peak_is_what_a_run_adds_to_what_was_there() -> None:
    device = Played()
    device.read()
    assert peak_of(device, lambda: None) == 40 * MIB


def test_a_worker_on_a_device_measures_divides_warms_up_and_captures() -> None:
    device = Played()
    worker = make(device, gpu_memory_utilization=0.2)
    held = dict(worker.info.memory)
    assert sum(held.values()) == GIB
    assert (held["weights"], held["activations"], held["other"]) == (16 * MIB, 40 * MIB, 100 * MIB)
    trial, real = device.recorded
    sizes = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert (trial.num_captured, real.num_captured) == (2, len(sizes))
    assert held["CUDA graphs"] == 3 * MIB * len(sizes)
    # What the estimate left: a fifth of a GiB less 100 + 16 + 40 MiB and 11 graphs of 3 MiB; of use is less.
    most_useful = 8 * 256 // 16
    page = held["KV pages"] // (worker.info.num_pages + 1)
    assert page == 2 * 2 * 2 * 8 * 16 * 4
    assert worker.info.num_pages == min(most_useful, (int(0.2 * GIB) - (100 + 16 + 40 + 33) * MIB) // page)
    before = real.num_runs
    for plan in random_plans(random.Random(1), worker.info, 5, 64):
        assert all(outcome.error is None for outcome in worker.run(plan).outcomes)
    assert real.num_runs == before + 5


@pytest.fixture(scope="module")
def eager() -> tuple[Played, Worker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "select_ops", lambda *args, **options: PlannedOps())
        device = Played()
        return device, make(device, enforce_eager=True, kv_cache_bytes=5 * MIB)


def test_eager_means_that_nothing_is_captured_and_pages_get_the_memory_of_graphs(eager: tuple[Played, Worker]) -> None:
    device, worker = eager
    assert device.recorded == []
    assert dict(worker.info.memory)["CUDA graphs"] == 0
    assert worker.info.num_pages == 5 * MIB // (2 * 2 * 2 * 8 * 16 * 4)


def test_a_device_that_others_fill_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(ValueError, match=r"--gpu-memory-utilization\) is 0.9: .* nothing is left for the KV cache"):
        make(Played(other=900 * MIB))


def rows_of(plans: Sequence[StepPlan]) -> list[int]:
    return [plan.num_tokens for plan in plans if plan.spans]


def test_the_largest_steps_fill_the_budget_and_every_form_of_attention_is_run(eager: tuple[Played, Worker]) -> None:
    info = eager[1].info
    prompts, crowd, _ = largest_steps(info, 8, 600)
    assert rows_of([prompts]) == [600]
    assert max(span.kv_len for span in prompts.spans) == 256
    assert len(crowd.spans) == 8
    steps = [plan.spans for plan in kernel_steps(info, 8, 200) if plan.step < 0 and plan.spans]
    chains = {len(spans[0].tokens) for spans in steps if len(spans) == 1 and not spans[0].parents}
    trees = {len(spans[0].tokens) for spans in steps if len(spans) == 1 and spans[0].parents}
    assert chains == trees | {128} == {1, 2, 4, 8, 16, 32, 64, 128}
    assert any(spans[0].parents and len(spans[1].tokens) == 128 for spans in steps if len(spans) == 2)
    shared = [[span.start for span in spans] for spans in steps if spans[0].start]
    assert shared == [[255] * 4, [255] * 8], "few and many that share as many keys as there is room for"


def test_sizes_are_shown_in_the_unit_that_fits() -> None:
    assert [show(size) for size in (5, 2048, 3 * MIB, -2 * GIB)] == ["5 B", "2.00 KiB", "3.00 MiB", "-2.00 GiB"]


def test_a_step_says_how_many_kernels_it_compiled(eager: tuple[Played, Worker]) -> None:
    device, worker = eager
    plan = next(iter(random_plans(random.Random(1), worker.info, 1, 8)))
    assert worker.run(plan).num_compiled == 0
    # The played device compiles whenever it is read.
    finish = worker._begin(plan)
    device.read()
    assert worker._finish(finish).num_compiled == 1
