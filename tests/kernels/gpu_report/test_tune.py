"""Tuning without a GPU: what is dropped before timing, and who wins."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("pip install triton: shows how tile shapes are chosen", allow_module_level=True)

from kernels.gpu_report.budget import Budget
from kernels.gpu_report.cases import Case
from kernels.gpu_report.compile_only import compile_variant, usages
from kernels.gpu_report.timing import HostTimer
from kernels.gpu_report.tune import Tuner, all_tasks, prune, variants_of
from kernels.triton.ops import TritonOps
from kernels.triton.tile_table import TileShape, WorkClass

TASK = all_tasks()[0]
VARIANT = {"arch": 90, "head_dim": 64, "page": 64, "group": 4, "tile_rows": 16, "tile_keys": 64, "num_warps": 4, "num_stages": 3}  # fmt: skip  # noqa: E501


def test_every_class_of_work_has_cases_and_a_grid() -> None:
    tasks = all_tasks()
    assert {(task.work.packed_rows, task.work.head_dim) for task in tasks} == {
        (rows, dim) for rows in (16, 32, 64, 0) for dim in (128, 64)
    }
    for task in tasks:
        assert len(task.cases) >= 2
        assert len(set(task.shapes)) == len(task.shapes) >= 18
        most = max(span.num_rows * case.heads.group for case in task.cases for span in case.spans)
        if task.work.packed_rows:
            assert most <= task.work.packed_rows == task.shapes[0].tile_rows


def test_variants_say_what_the_compiler_must_know() -> None:
    found = variants_of(all_tasks()[-1], (10, 3))
    assert len(found) == len(all_tasks()[-1].shapes)
    assert {(v["arch"], v["head_dim"], v["page"], v["group"]) for v in found} == {(103, 64, 64, 4)}
    assert {v["tile_rows"] for v in found} == {64, 128}
    assert found[0].keys() == VARIANT.keys()


def test_shapes_that_spill_or_do_not_fit_cost_no_gpu_time() -> None:
    def compiled(variants: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for variant in variants:
            if variant["num_stages"] == 4:
                found.append({"error": "CompilationError: no"})
            else:
                spills = 7 if variant["num_warps"] == 8 else 0
                found.append({"registers": 99, "spills": spills, "shared": 2048 * variant["tile_keys"]})
        return found

    kept, notes = prune(TASK, compiled(variants_of(TASK, (9, 0))), (9, 0))
    # 227 KB hold two programs of 32 keys (64 KB each), one of 64 keys, none of 128.
    assert {(shape.tile_keys, shape.programs_per_sm) for shape in kept} == {(32, 2), (64, 1)}
    assert {shape.num_warps for shape in kept} == {4}
    assert {shape.num_stages for shape in kept} == {2, 3}
    assert len(notes) == len(TASK.shapes)
    assert sum("dropped" not in note for note in notes) == len(kept)
    reasons = {note["dropped"].split(" ")[0] for note in notes if "dropped" in note}
    assert reasons == {"CompilationError:", "7", "262144"}


class ScriptedTuner(Tuner):
    """Times are a function of the shape."""

    def __init__(self, time_of: Mapping[int, float | str], best_programs: int = 2) -> None:
        super().__init__(TritonOps, torch.device("cpu"), HostTimer())
        self._time_of, self._best_programs = time_of, best_programs

    def relative_times(self, work: WorkClass, case: Case, shapes: Sequence[TileShape]) -> dict[TileShape, float | str]:
        found: dict[TileShape, float | str] = {}
        for shape in shapes:
            value = self._time_of[shape.tile_keys]
            bonus = 0.9 if shape.programs_per_sm == self._best_programs else 1.0
            found[shape] = value if isinstance(value, str) else value * bonus
        return found


def shapes_of(*keys: int) -> list[TileShape]:
    return [TileShape(16, key, 4, 3, 2, 2) for key in keys]


def test_the_fastest_shape_wins_with_the_best_number_of_programs() -> None:
    section = Budget(1e6, lambda: 0.0).section("tuning", 1.0)
    winner, notes = ScriptedTuner({32: 1.2, 64: 0.9, 128: 1.0}, best_programs=3).best(
        TASK, shapes_of(32, 64, 128), section
    )
    assert winner is not None
    assert (winner.tile_keys, winner.programs_per_sm) == (64, 3)
    assert len(notes) > 3 * len(TASK.cases), "losers stay in the notes"


def test_a_gain_within_noise_changes_nothing() -> None:
    section = Budget(1e6, lambda: 0.0).section("tuning", 1.0)
    assert ScriptedTuner({64: 0.99}, best_programs=8).best(TASK, shapes_of(64), section)[0] is None


def test_a_shape_that_fails_on_one_case_cannot_win() -> None:
    section = Budget(1e6, lambda: 0.0).section("tuning", 1.0)
    winner, notes = ScriptedTuner({32: "out of memory", 64: 0.9}).best(TASK, shapes_of(32, 64), section)
    assert winner is not None
    assert winner.tile_keys == 64
    assert any(note["over_today"] == "out of memory" for note in notes)


def test_without_time_nothing_wins() -> None:
    section = Budget(0.0, lambda: 0.0).section("tuning", 1.0)
    assert ScriptedTuner({64: 0.5}).best(TASK, shapes_of(64), section) == (None, [])
    assert len(section.left_out) == len(TASK.cases)


def test_a_variant_is_compiled_for_the_gpu_asked_for() -> None:
    usage = compile_variant(VARIANT)
    assert usage.spills == 0
    assert 0 < usage.shared < 227 << 10
    assert usage.buffers >= 2


@pytest.mark.slow
def test_variants_are_compiled_by_processes_in_their_order() -> None:
    found = usages([VARIANT, {**VARIANT, "tile_rows": 24}, {**VARIANT, "tile_keys": 32}], 2, 300.0)
    assert found[0]["shared"] > found[2]["shared"] > 0
    assert "error" in found[1]
