"""The speculation benchmark: policies to flags, the same texts for all, ratios within a round, and a real small run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from scheduler.types import FinishReason
from server.bench.cli import main
from server.bench.client import BenchError, Sample
from server.bench.speculation import OFF, read_policies, read_policy, rotated
from server.bench.speculation_report import Point, Round, as_table, draw, verdict
from server.bench.speculation_work import WORKLOADS
from server.engine.config import SpeculationConfig
from server.engine.offline import Engine


@pytest.mark.parametrize(
    ("text", "drafters", "label", "flags"),
    [
        ("off", "suffix", "off", "--speculation off"),
        ("auto", "", "auto", ""),
        ("on", "", "on", "--speculation on"),
        ("uniform", "suffix", "uniform suffix", "--speculation-policy uniform --drafters suffix"),
        ("fixed:4", "", "fixed:4", "--speculation-policy fixed --num-speculative-tokens 4"),
        ("table:1:8,4:4", "", "table:1:8,4:4", "--speculation-policy table --speculation-table 1:8,4:4"),
        ("auto", "draft_model", "auto draft_model", "--drafters draft_model --draft-model braid-tiny-draft"),
    ],
)
def test_a_policy_is_a_server_with_these_flags(text: str, drafters: str, label: str, flags: str) -> None:
    policy = read_policy(text, drafters)
    assert (policy.label, policy.flags.split()) == (label, flags.split())


@pytest.mark.parametrize("text", ["fast", "fixed", "fixed:0", "fixed:x", "table:", "table:1", ""])
def test_an_unknown_policy_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="is none of off, auto"):
        read_policy(text)


def test_off_is_measured_once_asked_for_or_not() -> None:
    labels = [policy.label for policy in read_policies(["auto", "fixed:2"], ["suffix", "history"])]
    assert labels == [OFF, "auto suffix", "fixed:2 suffix", "auto history", "fixed:2 history"]
    assert [policy.label for policy in read_policies(["off", "auto"], [])] == [OFF, "auto"]


def test_every_policy_begins_a_round_in_turn() -> None:
    assert [rotated(["a", "b", "c"], number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_texts_are_a_function_of_the_seed(workload: str) -> None:
    first, again, other = ([WORKLOADS[workload](random.Random(seed + i)) for i in range(20)] for seed in (0, 0, 1000))
    assert first == again
    assert first != other


def test_lists_are_such_as_the_embedded_model_can_answer() -> None:
    """With names it never saw it goes on with text of any kind, to the last token that it may."""
    rng = random.Random(0)
    asks = [WORKLOADS["list"](rng) for _ in range(24)]
    with Engine("braid-tiny", speculation=SpeculationConfig(mode="off"), num_threads=1) as engine:
        answers = [engine.generate([ask.prompt], max_tokens=ask.max_tokens)[0] for ask in asks]
    items = [ask.prompt.removesuffix(" ->").split()[1:] for ask in asks]
    assert {len(some) for some in items} == {4, 5, 6}
    right = [sorted(answer.text.split()) == sorted(some) for answer, some in zip(answers, items, strict=True)]
    assert sum(right) >= 23
    assert all(answer.finish_reason is FinishReason.STOP for answer in answers)


def test_a_prediction_is_sent_only_where_asked_and_known() -> None:
    ask = WORKLOADS["code-edit"](random.Random(0))
    assert ask.expected in ask.prompt
    assert ask.body("m", 0.0, 1, with_prediction=True)["prediction"] == {"type": "content", "content": ask.expected}
    assert "prediction" not in ask.body("m", 0.0, 1)
    assert "prediction" not in WORKLOADS["free"](random.Random(0)).body("m", 0.0, 1, with_prediction=True)


def one_round(speed: float, drafted: int = 0, accepted: int = 0, steps: int = 0) -> Round:
    """One request of 100 tokens at this many tokens per second."""
    end = 100 / speed
    sample = Sample(
        0.0, 200, [0.1 * end, end], end, 5, 100, True, drafted=drafted, accepted=accepted, draft_steps=steps
    )
    return Round.of([sample], 1)


def test_tokens_count_while_every_stream_has_a_request() -> None:
    """Two streams, three requests of a token every 0.1 s: at 0.5 the first stream finds none left."""
    samples = [
        Sample(
            sent,
            200,
            times,
            times[-1],
            output_tokens=len(times),
            is_counted=True,
            event_tokens=[*range(1, len(times) + 1)],
        )
        for sent, count in ((0.0, 2), (0.0, 5), (0.2, 9))
        for times in [[round(sent + 0.1 * (number + 1), 1) for number in range(count)]]
    ]
    measured = Round.of(samples, 2)
    assert (measured.tokens, measured.seconds) == (2 + 5 + 3, 0.5)
    # However many streams there are, the last of their requests is not alone in the measurement.
    assert Round.of(samples, 3).seconds == 0.2
    assert Round.of(samples, 1).tokens == 16


def test_a_failed_request_brings_no_tokens() -> None:
    failed = Sample(0.0, 500, finished=1.0, error="no")
    done = Sample(0.0, 200, [0.5, 2.0], 2.0, 1, 7, True, event_tokens=[3, 7])
    assert Round.of([failed, done], 2).tokens == 3


@pytest.mark.parametrize(("workload", "shortest", "longest"), [("free", 32, 96), ("list", 16, 48)])
def test_texts_without_an_end_differ_in_length(workload: str, shortest: int, longest: int) -> None:
    """Equal lengths would keep plain decoding in lockstep: all prompts in one step."""
    lengths = [WORKLOADS[workload](random.Random(seed)).max_tokens for seed in range(500)]
    assert (min(lengths), max(lengths)) == (shortest, longest)
    assert len(set(lengths)) == longest - shortest + 1


def test_ratios_are_of_the_same_round_and_their_median_counts() -> None:
    off = [one_round(100), one_round(10), one_round(50)]
    fast = [one_round(200, 30, 20, 10), one_round(15, 30, 20, 10), one_round(20, 30, 20, 10)]
    point = Point.of("list", 0.0, 1, "auto", fast, off)
    assert (point.ratio, point.ratio_low, point.ratio_high) == pytest.approx((1.5, 0.4, 2.0))
    assert point.tokens_a_step == pytest.approx(3.0)
    assert point.drafted == pytest.approx(0.3)
    assert point.accepted == pytest.approx(2 / 3)


def test_the_verdict_names_the_worst_place_and_the_best_fixed() -> None:
    points = []
    for streams, auto, fixed in ((1, 2.0, 1.0), (8, 0.9, 1.2)):
        off = [one_round(100)]
        points += [
            Point.of("list", 0.0, streams, "off", off, off),
            Point.of("list", 0.0, streams, "auto", [one_round(100 * auto)], off),
            Point.of("list", 0.0, streams, "fixed:4", [one_round(100 * fixed)], off),
        ]
    text = verdict(points)
    assert "worst 0.90 (list, T=0, 8 streams)" in text
    assert "best  2.00 (list, T=0, 1 streams)" in text
    assert "every fixed: worst 0.75 (list, T=0, 8 streams)" in text
    assert "DIFFER" not in as_table(points)


def test_the_plot_has_a_line_for_each_policy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    off = [one_round(100)]
    points = [
        Point.of(workload, 0.0, streams, policy, [one_round(speed)], off)
        for workload in ("list", "free")
        for streams in (1, 8)
        for policy, speed in (("off", 100.0), ("auto", 150.0))
    ]
    draw(tmp_path / "plots" / "s.png", points)
    assert (tmp_path / "plots" / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_that_differs_is_shown() -> None:
    changed = one_round(100)
    changed.num_different = 1
    point = Point.of("list", 0.0, 1, "auto", [changed], [one_round(100)])
    assert "1 of 1 TEXTS DIFFER" in as_table([point])
    assert "differ from those of off: 1 of 1" in verdict([point])


def test_a_real_sweep_writes_the_same_texts_with_and_without_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["speculation", "--policies", "fixed:4", "--streams", "2", "--workloads", "code-edit", "--rounds", "1"]
    arguments += [
        "--requests-per-stream",
        "2",
        "--min-requests",
        "1",
        "--temperature",
        "0.7",
        "--prediction",
        "--no-progress",
    ]
    assert main([*arguments, "--json", str(tmp_path / "s.json"), "--spawn", "--threads 1"]) == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert [point["policy"] for point in report["points"]] == ["off", "fixed:4"]
    assert report["points"][0]["drafted"] == 0
    assert report["points"][1]["drafted"] > 0
    assert all(point["num_different"] == point["failed"] == 0 for point in report["points"])
    assert "texts that differ from those of off: 0 of 8" in capsys.readouterr().out
