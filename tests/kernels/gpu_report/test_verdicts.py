"""Goals held against figures that the test makes up."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("pip install triton: shows that the report's verdicts follow from its figures", allow_module_level=True)

from kernels.gpu_report.results import BaselineResult, CaseResult, Verdict
from kernels.gpu_report.tables import sparse_header, sparse_line, verdict_line
from kernels.gpu_report.verdicts import (
    at_least,
    at_most,
    attention_verdicts,
    fp8_slopes,
    serving_verdicts,
    sparse_verdicts,
)


def case(kind: str, batch: int = 32, keys: int = 8192, kv_dtype: str = "bfloat16", **figures: object) -> CaseResult:
    return CaseResult(f"{kind} {batch} x {keys}", kind, 4, 128, kv_dtype, batch, keys, 1, 1, **figures)  # type: ignore[arg-type]


def of(verdicts: list[Verdict], start: str) -> Verdict:
    return next(verdict for verdict in verdicts if verdict.name.startswith(start))


def test_the_worst_case_decides_and_bounds_belong_to_the_better_side() -> None:
    assert at_least("", [("a", 0.95), ("b", 0.85)], 0.8, 0.92).outcome == "met"
    assert at_least("", [("a", 0.92), ("b", 0.95)], 0.8, 0.92).outcome == "goal"
    assert at_least("", [("a", 0.79)], 0.8, 0.92).outcome == "missed"
    worst = at_most("", [("a", 1.12), ("b", 1.01)], 1.15, 1.05)
    assert (worst.outcome, worst.figure, worst.detail) == ("met", 1.12, "worst of 2: a")
    assert at_most("", [("a", 1.16)], 1.15, 1.05).outcome == "missed"


@pytest.mark.parametrize("figures", [[], [("a", None)], [("a", math.nan)]])
def test_what_was_not_measured_is_not_met(figures: list[tuple[str, float | None]]) -> None:
    assert at_most("", figures, 1.0, 1.0).outcome == "not measured"
    assert at_least("", figures, 0.0, 0.0).outcome == "not measured"


def test_goals_look_at_their_own_cases() -> None:
    cases = [
        case("decode", copy_fraction=0.93),
        case("decode", batch=8, copy_fraction=0.1),  # small work has no goal
        case("decode", keys=512, copy_fraction=0.1),
        case("decode", batch=1, keys=131072, copy_fraction=0.76),
        case("skew", keys=131072, copy_fraction=0.8, baselines=(BaselineResult("fixed split", 9.0, 2.5),)),
        case("verify", parts_ratio=1.2),
        case("prefill", batch=1, keys=8192, tflop_s=400.0, baselines=(BaselineResult("vllm-like", 9.0, 3.0),)),
        case("prefill", batch=1, keys=512, tflop_s=50.0),
        case("mixed", parts_ratio=0.99),
    ]
    found = attention_verdicts(cases)
    assert of(found, "decode, batch").outcome == "goal"
    assert of(found, "decode, one").outcome == "met"
    assert of(found, "skewed decode: time").figure == pytest.approx(1.25)
    assert of(found, "skewed decode: time").outcome == "met"
    assert of(found, "skewed decode over").outcome == "goal"
    assert of(found, "verify").outcome == "missed"
    assert of(found, "causal prefill").outcome == "met"
    assert of(found, "prefill over").outcome == "goal"
    assert of(found, "mixed").outcome == "goal"
    assert of(found, "denoise").outcome == "not measured"
    assert of(found, "fp8").outcome == "not measured"


def test_the_slope_of_fp8_leaves_out_what_does_not_grow_with_the_keys() -> None:
    def timed(kv_dtype: str, keys: int, us: float) -> CaseResult:
        return case("decode", keys=keys, kv_dtype=kv_dtype, us=us)

    cases = [
        timed("bfloat16", 8192, 120.0), timed("bfloat16", 32768, 420.0), timed("bfloat16", 2048, 45.0),
        timed("float8_e4m3fn", 8192, 80.0), timed("float8_e4m3fn", 32768, 245.0),
    ]  # fmt: skip
    # (245 - 80) / (420 - 120); the third bfloat16 case has no fellow.
    [(what, slope)] = fp8_slopes(cases)
    assert what == "batch 32, 8192 to 32768 keys"
    assert slope == pytest.approx(0.55)
    assert fp8_slopes(cases[:4]) == []


def test_serving_is_judged_by_its_own_file() -> None:
    shapes: dict[str, object] = {
        "8B": {"decode": [{"streams": 1, "floor_fraction": 0.8}, {"streams": 32, "floor_fraction": 0.1}]},
        "0.6B": {"decode": [{"streams": 32, "gap": 0.07}]},
    }
    floor, gap = serving_verdicts({"shapes": shapes})
    assert (floor.outcome, floor.figure) == ("goal", 0.8)
    assert (gap.outcome, gap.figure) == ("missed", 0.07)
    incomplete: list[dict[str, object]] = [
        {},
        {"shapes": None},
        {"shapes": {"8B": {"decode": [{"streams": 1, "floor_fraction": None}]}}},
    ]
    for broken in incomplete:
        assert {verdict.outcome for verdict in serving_verdicts(broken)} == {"not measured"}


def test_a_line_tells_the_figure_the_bounds_and_the_case() -> None:
    line = verdict_line(at_most("verify", [("verify 32", 1.2)], 1.15, 1.05))
    assert line.startswith("MISSED")
    assert "1.2  <= 1.15 (goal 1.05)" in line
    assert line.endswith("worst of 1: verify 32")


def test_double_sparsity_is_judged_by_a_sixteenth_of_many_keys_at_batch_8() -> None:
    def sparse(variant: str, keys: int, batch: int, ratio: float) -> CaseResult:
        found = case("sparse decode", batch, keys, baselines=(BaselineResult("dense", 9.0, ratio),))
        return replace(found, case=f"decode {batch} x {keys}: {variant}")

    cases = [
        sparse("double sparsity, 2048 keys", 32768, 8, 6.0),
        sparse("double sparsity, 8192 keys", 131072, 8, 5.0),
        sparse("double sparsity, 1024 keys", 131072, 8, 9.0),
        sparse("double sparsity, 512 keys", 8192, 8, 1.0),
        sparse("double sparsity, 2048 keys", 32768, 1, 2.0),
        sparse("quest, 2048 keys", 32768, 8, 3.0),
    ]
    (found,) = sparse_verdicts(cases)
    assert (found.outcome, found.figure, found.detail) == (
        "met",
        5.0,
        "worst of 2: decode 8 x 131072: double sparsity, 8192 keys",
    )
    assert sparse_verdicts([])[0].outcome == "not measured"


def test_a_sparse_line_has_its_figures_or_its_reason() -> None:
    dense = (BaselineResult("dense", 40.0, 4.04, 0.1, True),)
    found = case("sparse decode", us=9.9, spread=0.01, copy_fraction=0.5, floor_fraction=0.6, is_graph=False,
                 noise=0.02, baselines=dense)  # fmt: skip
    assert sparse_line(found).split() == [
        "sparse",
        "decode",
        "32",
        "x",
        "8192",
        "9.9*",
        "1.0%",
        "0.50",
        "0.60",
        "4.04",
        "2.0%",
    ]
    assert sparse_line(case("sparse decode", reason="out of memory")).endswith("out of memory")
    assert len(sparse_header()) == len(sparse_line(found))
