"""The report's sparse section on a CPU: interpreted kernels on tiny cases, scripted clocks. No figure counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.gpu_report.attention_times import Bench
from kernels.gpu_report.run import Run, dry_setup
from kernels.gpu_report.sparse_cases import (
    ChunkVariant,
    Reading,
    RowVariant,
    SparseCase,
    tiny_sparse_cases,
)
from kernels.gpu_report.sparse_times import run_once, time_sparse
from kernels.gpu_report.timing import HostTimer, Rates
from kernels.triton.ops import TritonOps
from kernels.triton.sparse import prefill
from kernels.triton.sparse.attend import SparseAttention
from tests.kernels.triton.scripted_timer import ScriptedTimer

CPU = torch.device("cpu")
ROWS, CHUNK = tiny_sparse_cases()
FOLLOWING = SparseCase(ROWS.dense, (RowVariant(Reading.TIDAL_FOLLOW, 70),))


def bench_of(timer: ScriptedTimer | HostTimer) -> Bench:
    return Bench(TritonOps(num_programs=2), CPU, timer, Rates(1e6, 1e9), 0, {})


def test_a_dry_run_goes_through_all_methods_and_claims_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    setup = replace(dry_setup(TritonOps(num_programs=3), HostTimer(), {}), serving=None)
    run = Run(setup, 1e6, lambda: 0.0, lines.append, tmp_path / "report.json")
    run.all(["sparse"])
    found = json.loads((tmp_path / "report.json").read_text())
    names = [f"{case.dense.label}: {variant.label}" for case in tiny_sparse_cases() for variant in case.variants]
    assert [case["case"] for case in found["sparse"]] == names
    for case in found["sparse"]:
        assert case["reason"] is None, case
        assert [case[name] for name in ("us", "gb_s", "copy_fraction", "floor_fraction", "noise")] == [None] * 5
        assert [(b["name"], b["ratio"], b["reason"]) for b in case["baselines"]] == [("dense", None, None)]
    assert sum(name in line for name in names for line in lines) == len(names)
    assert found["left_out"]["sparse"] == []


def test_figures_follow_from_the_times_and_failures_are_said() -> None:
    quest, labels, pages, listing, following = (variant.label for variant in ROWS.variants)
    timer = ScriptedTimer(
        {"dense": [8e-3, 16e-3], "dense again": [8.8e-3, 17.6e-3], quest: [2e-3, 4e-3], labels: "out of memory",
         pages: [2e-3, 2e-3], listing: [8e-3, 8e-3], following: [1e-3, 1e-3]}
    )  # fmt: skip
    found = dict(zip((quest, labels, pages, listing, following), time_sparse(bench_of(timer), ROWS), strict=True))
    assert timer.called == ["dense", "dense again", quest, labels, pages, listing, following]
    assert found[labels].reason == "out of memory"
    one = found[quest]
    # 1 kv head of 16 elements of 4 bytes: bounds of 290 // 8 sub-pages, 256 keys and values.
    assert one.num_bytes == 64 * (2 * 36 + 2 * 256)
    assert one.us == pytest.approx(3000.0)
    assert one.ratio_to("dense") == pytest.approx(4.0), "the dense kernel takes four times as long"
    assert one.copy_fraction == pytest.approx(one.num_bytes / 3e-3 / 1e6)
    assert one.noise == pytest.approx(0.1)


def test_a_method_that_cannot_run_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(prefill, "x_attention", fail)
    x_attention, blocks = time_sparse(bench_of(HostTimer()), CHUNK)
    assert x_attention.reason == "RuntimeError: no such kernel"
    assert blocks.reason is None
    impossible = replace(CHUNK, dense=replace(CHUNK.dense, heads=replace(CHUNK.dense.heads, num_q=3, num_kv=2)))
    assert all(result.reason is not None for result in time_sparse(bench_of(HostTimer()), impossible))


def test_a_layer_that_follows_is_timed_without_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is made before the clock runs, by the layer that lists; what is timed reads it."""
    chosen: list[int] = []
    choose = SparseAttention._choose

    def counted(self: SparseAttention, *arguments: object) -> None:
        chosen.append(1)
        choose(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SparseAttention, "_choose", counted)
    label = FOLLOWING.variants[0].label
    timer = ScriptedTimer({"dense": [1.0], "dense again": [1.0], label: [1.0]})
    (found,) = time_sparse(bench_of(timer), FOLLOWING)
    assert found.reason is None
    assert len(chosen) == 1


def test_copies_of_the_keys_are_so_many_that_what_is_read_of_them_passes_the_cache() -> None:
    case = replace(CHUNK, variants=(ChunkVariant(CHUNK.variants[0].method),))  # type: ignore[union-attr]
    label = case.variants[0].label
    timer = ScriptedTimer({"dense": [4.0, 4.0], "dense again": [4.0, 4.0], label: [2.0, 2.0]})
    (found,) = time_sparse(replace(bench_of(timer), cache_bytes=case.least_bytes), case)
    assert found.us == pytest.approx(2e6 / 3), "a call runs on all three copies, its time is of one"


def test_warming_runs_every_call_and_times_none() -> None:
    timer = ScriptedTimer({})
    run_once(bench_of(timer), CHUNK)
    assert timer.called == []
