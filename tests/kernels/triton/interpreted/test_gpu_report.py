"""The whole GPU report on a CPU: interpreted kernels, tiny cases, clocks of the test. No figure counts."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gpu_report import checks, installed
from kernels.gpu_report.attention_times import Bench, time_case
from kernels.gpu_report.baselines import all_baselines
from kernels.gpu_report.budget import Budget
from kernels.gpu_report.cases import Case, Heads, Kind, decode, tiny_cases
from kernels.gpu_report.problems import NotApplicableError, Prepared, Problem, make_problem
from kernels.gpu_report.results import Check, Report
from kernels.gpu_report.run import Run, Setup, dry_setup
from kernels.gpu_report.serving import run_serving, run_worker_checks
from kernels.gpu_report.timing import Call, HostTimer, Rates, Times
from kernels.gpu_report.tune import Tuner
from kernels.triton.fixed_split import VLLM_LIKE, FixedSplit
from kernels.triton.gpu_checks import Span, worst_error
from kernels.triton.ops import TritonOps
from kernels.triton.paged import DevicePlan, PagedAttention
from kernels.triton.tile_table import TileShape, WorkClass
from tests.kernels.triton.scripted_timer import ScriptedTimer

CPU = torch.device("cpu")
CAN_RUN = {"sdpa flash", "gather", "flex", "fixed split", "vllm-like"}
SERVING = """
import json, sys
path = sys.argv[sys.argv.index("--json") + 1]
open(path, "w").write(json.dumps({"shapes": {"8B": {"decode": [{"streams": 1, "steps": 3}], "notes": ["no peer"]}}}))
"""


@pytest.fixture(scope="module")
def ops() -> TritonOps:
    return TritonOps(num_programs=2)


def small_setup(ops: TritonOps, cases: Sequence[Case], serving: Sequence[str] | None = None) -> Setup:
    found = dry_setup(ops, HostTimer(), all_baselines())
    return replace(found, cases=cases, sparse=(), serving=serving)


def test_a_dry_run_goes_through_every_part_and_claims_nothing(ops: TritonOps, tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / "report.json"
    cases = [tiny_cases()[i] for i in (0, 3)]
    setup = small_setup(ops, cases, [sys.executable, "-c", SERVING])
    assert Run(setup, 1e6, lambda: 0.0, lines.append, path).all() == 0
    found = json.loads(path.read_text())
    assert set(found) == {"schema", *(field.name for field in fields(Report))}
    assert (found["schema"], found["dry_run"]) == (1, True)
    assert [check for check in found["checks"] if not check["is_right"]] == []
    assert len(found["checks"]) == 9
    assert [case["case"] for case in found["cases"]] == [case.label for case in cases]
    for case in found["cases"]:
        assert case["reason"] is None
        no_figure = ("us", "gb_s", "tflop_s", "copy_fraction", "floor_fraction", "parts_ratio", "plan_us", "spread")
        assert [case[name] for name in no_figure] == [None] * len(no_figure)
        assert all(baseline["us"] is baseline["ratio"] is None for baseline in case["baselines"])
        ran = {baseline["name"] for baseline in case["baselines"] if baseline["reason"] is None}
        expected = CAN_RUN - {"flex"} if case["kind"] not in ("decode", "prefill") else CAN_RUN
        assert ran == ({"gather"} if case["kind"] == "tree" else expected), case
    assert found["copy_gb_s"] is None
    assert found["verdicts"] == []
    assert found["serving"]["shapes"]["8B"]["decode"] == [{"streams": 1, "steps": 3}]
    assert found["sparse"] == []
    assert any("DRY RUN" in line for line in lines)
    assert "8B decode: streams 1, steps 3" in lines
    assert "8B: no peer" in lines


def test_other_kernels_attention_is_ours(ops: TritonOps) -> None:
    """In float32, where a wrong mask or page cannot hide in rounding; keys behind the last are NaN in our pages."""
    for case in (tiny_cases()[5], tiny_cases()[7]):
        problem = make_problem(ops, case, CPU, 0)
        ours = ops.paged_attention(problem.q_TQD, *problem.pools[0], problem.rows, problem.scale)
        for name, baseline in all_baselines().items():
            try:
                prepared = baseline(problem)
                out = prepared.run(0)
            except (NotApplicableError, RuntimeError):
                continue
            if prepared.rows is not None:
                torch.testing.assert_close(prepared.rows(out), ours, rtol=1e-4, atol=1e-5, msg=f"{name}, {case.label}")


@pytest.mark.parametrize("spans", [(Span(70, 1), Span(3, 1)), (Span(40, 19), Span(33, 33), Span(17, 1))])
def test_a_fixed_split_is_right_where_segments_are_empty(ops: TritonOps, spans: tuple[Span, ...]) -> None:
    problem = make_problem(ops, Case("", Kind.DECODE, spans, Heads(3, 1, 24), torch.float32), CPU, 0)
    for settings in (VLLM_LIKE, replace(VLLM_LIKE, segments=3, tile_keys=16)):
        split = FixedSplit(problem.rows, problem.q_TQD, problem.pools[0][0], settings)
        out = split.run(problem.q_TQD, *problem.pools[0], problem.scale)
        assert worst_error(problem.world, out, problem.scale, None) <= 1


def bench_of(ops: TritonOps, timer: ScriptedTimer, **baselines: Callable[[Problem], Prepared]) -> Bench:
    return Bench(ops, CPU, timer, Rates(1e6, 1e9), 0, baselines, num_plans=1)


MIXED = replace(tiny_cases()[7], spans=(*decode(2, 5), Span(9, 4)), parts=(decode(2, 5), (Span(9, 4),)))


def test_figures_follow_from_the_times(ops: TritonOps) -> None:
    seconds = {"ours": [4e-3, 8e-3], "ours again": [4.4e-3, 8.8e-3], "part 0": [1e-3, 2e-3], "part 1": [1e-3, 2e-3]}
    timer = ScriptedTimer({**seconds, "other": [8e-3, 16e-3]})
    other = all_baselines()["gather"]
    found = time_case(bench_of(ops, timer, other=other), MIXED)
    assert found.reason is None
    # 2 x 5 + 9 keys, 1 kv head, 16 elements of 4 bytes, keys and values.
    assert found.num_bytes == 19 * 16 * 4 * 2
    assert found.num_flop == 4 * 16 * 2 * (5 + 5 + 6 + 7 + 8 + 9)
    assert found.us == pytest.approx(6000.0)
    assert found.gb_s == pytest.approx(19 * 128 / 6e-3 / 1e9)
    assert found.copy_fraction == pytest.approx(19 * 128 / 6e-3 / 1e6)
    assert found.floor_fraction == pytest.approx(19 * 128 / 1e6 / 6e-3), "bytes need longer than operations"
    assert found.parts_ratio == pytest.approx(2.0)
    assert found.noise == pytest.approx(0.1)
    assert found.ratio_to("other") == pytest.approx(2.0)
    assert found.plan_us is not None
    assert found.combine_share is None, "there is no device to ask"


def test_each_steps_plan_lives_until_all_calls_were_timed(ops: TritonOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph reads its plan where it lay: one that the next step's had replaced would be memory of others."""
    made: list[weakref.ref[DevicePlan]] = []
    plan = PagedAttention.plan

    def recorded(self: PagedAttention, *arguments: Any) -> DevicePlan:
        found = plan(self, *arguments)
        made.append(weakref.ref(found))
        return found

    class Timer(ScriptedTimer):
        def time(self, calls: Mapping[str, Call], target_s: float = 0.0) -> dict[str, Times | str]:
            made.clear()
            found = super().time(calls, target_s)
            gc.collect()
            assert len(made) == 4
            assert all(reference() is not None for reference in made)
            return found

    monkeypatch.setattr(PagedAttention, "plan", recorded)
    assert time_case(bench_of(ops, Timer({})), MIXED).reason is None


def test_copies_of_the_keys_make_three_times_the_cache(ops: TritonOps) -> None:
    timer = ScriptedTimer({"ours": [3.0, 3.0]})
    case = replace(MIXED, parts=())
    problem = make_problem(ops, case, CPU, cache_bytes=case.num_bytes)
    assert len(problem.pools) == 3
    assert not torch.equal(problem.pools[0][0][0], problem.pools[2][0][0])
    found = time_case(replace(bench_of(ops, timer), cache_bytes=case.num_bytes), case)
    assert found.us == pytest.approx(1e6), "a call runs on all copies, its time is of one"


def refusing(problem: Problem) -> Prepared:
    raise NotApplicableError("takes nothing")


def wrong(problem: Problem) -> Prepared:
    return Prepared(lambda pool: torch.zeros_like(problem.q_TQD), lambda out: out)


def broken(problem: Problem) -> Prepared:
    def run(pool: int) -> Tensor:
        raise torch.cuda.OutOfMemoryError("20 GiB")

    return Prepared(run, lambda out: out)


def test_a_baseline_that_fails_ends_nothing_and_one_that_is_wrong_is_not_timed(ops: TritonOps) -> None:
    timer = ScriptedTimer({"late": "RuntimeError: in the loop"})
    bench = bench_of(ops, timer, refusing=refusing, wrong=wrong, broken=broken, late=all_baselines()["gather"])
    found = time_case(bench, replace(MIXED, parts=()))
    assert found.us is not None
    assert {baseline.name: baseline.reason for baseline in found.baselines} == {
        "refusing": "takes nothing",
        "wrong": "its result differs from ours by 100.0%",
        "broken": "out of memory",
        "late": "RuntimeError: in the loop",
    }
    assert timer.called == ["ours", "ours again", "late"]


def test_a_case_that_fails_has_its_reason_and_the_next_one_runs(ops: TritonOps) -> None:
    impossible = replace(MIXED, heads=Heads(300, 1, 16), parts=())
    lines: list[str] = []
    run = Run(replace(small_setup(ops, [impossible, MIXED]), baselines={}), 1e6, lambda: 0.0, lines.append, None)
    run.all(["attention"])
    first, second = run.report.cases
    assert first.reason is not None
    assert "query heads must be a multiple" in first.reason
    assert second.reason is None
    assert any("query heads must be a multiple" in line for line in lines)


def test_what_does_not_fit_into_the_time_is_named(ops: TritonOps, tmp_path: Path) -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 50.0
            return self.now

    lines: list[str] = []
    path = tmp_path / "report.json"
    run = Run(replace(small_setup(ops, tiny_cases(), ["false"]), baselines={}), 540.0, Clock(), lines.append, path)
    assert run.all(["attention", "serving"]) == 0
    found = json.loads(path.read_text())
    assert 0 < len(found["cases"]) < len(tiny_cases())
    done = [case["case"] for case in found["cases"]]
    assert done + found["left_out"]["attention"] == [case.label for case in tiny_cases()]
    assert any(line.startswith("left out of attention") for line in lines)


def test_no_check_within_the_time_is_not_a_pass(ops: TritonOps) -> None:
    run = Run(small_setup(ops, []), 0.0, lambda: 0.0, lambda line: None, None)
    assert run.all(["checks"]) == 1
    assert len(run.report.left_out["checks"]) == 3


class WrongOps(TritonOps):
    """Sees one key too many or too few."""

    def paged_attention(self, *args: Any, **kwargs: Any) -> Tensor:
        q, k_pages, v_pages, rows, *rest = args
        fewer = replace(rows, visible=(rows.visible - 1).clamp_min(1))
        return super().paged_attention(q, k_pages, v_pages, fewer, *rest, **kwargs)


def test_a_wrong_kernel_is_exit_code_1(tmp_path: Path) -> None:
    lines: list[str] = []
    run = Run(small_setup(WrongOps(num_programs=3), []), 1e6, lambda: 0.0, lines.append, tmp_path / "r.json")
    assert run.all(["checks"]) == 1
    assert any(line.startswith("WRONG attention") for line in lines)


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (1, 1)])
def test_the_workers_checks_count_where_the_tree_has_them(ops: TritonOps, code: int, exit_code: int) -> None:
    lines: list[str] = []
    command = [sys.executable, "-c", f"print('pages differ'); raise SystemExit({code})"]
    setup = replace(small_setup(ops, []), worker_checks=command, effort=replace(checks.DRY, most_checks=1))
    run = Run(setup, 1e6, lambda: 0.0, lines.append, None)
    assert run.all(["checks"]) == exit_code
    assert run.report.checks[-1] == Check("server.worker.gpu_checks", code == 0, float(code), "pages differ")
    assert ("WRONG server.worker.gpu_checks: pages differ" in lines) == (code == 1)


def test_serving_that_fails_or_takes_too_long_keeps_what_it_had() -> None:
    write = "import json, sys; json.dump({'shapes': {}}, open(sys.argv[sys.argv.index('--json') + 1], 'w')); "
    found = run_serving([sys.executable, "-c", write + "raise SystemExit('no memory')"], 60.0)
    assert found["shapes"] == {}
    assert found["notes"] == ["the end-to-end part ended with code 1: no memory"]
    found = run_serving([sys.executable, "-c", write + "import time; time.sleep(600)"], 3.0)
    assert found["shapes"] == {}
    assert "ended after 3 s" in str(found["notes"])
    assert run_worker_checks([sys.executable, "-c", "import time; time.sleep(600)"], 1.0) is None


def test_a_check_that_raises_is_a_failed_one() -> None:
    def raising() -> Any:
        yield "first", 0.5
        raise RuntimeError("illegal address")

    section = Budget(10, lambda: 0.0).section("checks", 1.0)
    found = list(checks.run_checks([("family", raising, 1.0)], section, lambda line: None))
    assert found[0] == Check("first", True, 0.5)
    assert not found[1].is_right
    assert found[1].detail == "RuntimeError: illegal address"
    nan = list(checks.run_checks([("family", lambda: iter([("x", float("nan"))]), 1.0)], section, lambda line: None))
    assert not nan[0].is_right


def test_the_watchdog_keeps_what_there_is(ops: TritonOps, tmp_path: Path) -> None:
    path, codes = tmp_path / "report.json", list[int]()
    run = Run(small_setup(ops, []), 0.01, lambda: 0.0, lambda line: None, path)
    watchdog = run.watch(codes.append)
    watchdog.join(30)
    assert codes == [1], "checks had not ended"
    assert json.loads(path.read_text())["dry_run"] is True


def test_packages_are_called_as_they_document_it(ops: TritonOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes with the documented signatures, which attend in plain torch: the layouts we hand over are right."""

    class FlashAttention:
        @staticmethod
        def flash_attn_with_kvcache(
            q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, softmax_scale: float, causal: bool,
            block_table: Tensor | None = None, page_table: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            assert causal
            table = block_table if block_table is not None else page_table
            assert table is not None
            length = int(cache_seqlens[0])
            k, v = (cache[table.long()].flatten(1, 2)[:, :length].transpose(1, 2) for cache in (k_cache, v_cache))
            bias = torch.nn.attention.bias.causal_lower_right(q.shape[1], length)
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, bias, scale=softmax_scale, enable_gqa=True
            )
            return out.transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttention)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", FlashAttention)
    for case in (tiny_cases()[0], replace(tiny_cases()[6], spans=(Span(70, 20),) * 2)):
        problem = make_problem(ops, case, CPU, 0)
        ours = ops.paged_attention(problem.q_TQD, *problem.pools[0], problem.rows, problem.scale)
        for baseline in (installed.flash_attention_2, installed.flash_attention_3):
            prepared = baseline(problem)
            assert prepared.rows is not None
            torch.testing.assert_close(prepared.rows(prepared.run(0)), ours, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotApplicableError, match="causal rows only"):
        installed.flash_attention_3(make_problem(ops, tiny_cases()[3], CPU, 0))


def test_shapes_under_trial_are_what_runs(ops: TritonOps) -> None:
    case = Case("", Kind.DECODE, decode(2, 40), Heads(2, 1, 16), torch.float16)
    work, shapes = WorkClass(16, 16, 2), [TileShape(16, 16, 4, 2, 1, 1), TileShape(16, 32, 4, 2, 2, 1)]
    timer = ScriptedTimer({"today": [2.0, 4.0], "0": [1.0, 2.0], "1": "out of memory"})
    made: list[TritonOps] = []

    def make_ops() -> TritonOps:
        made.append(TritonOps())
        return made[-1]

    found = Tuner(make_ops, CPU, timer).relative_times(work, case, shapes)
    assert found == {shapes[0]: 0.5, shapes[1]: "out of memory"}
    keys = [[launch.geometry.tile_keys for launch in plan.launches] for plan in map(only_plan, made[2:])]
    assert keys == [[16], [32]]


def only_plan(ops: TritonOps) -> Any:
    [plan] = ops._attention._plans.values()
    return plan
