"""Policies on engines of one process: the same texts of all, closed loops, and ratios with their spread."""

from __future__ import annotations

import random

import pytest

from server.bench.client import BenchError
from server.bench.drafting import PolicyEngine, comparisons, main, read_config
from server.bench.speculation_report import Round
from server.bench.speculation_work import WORKLOADS
from server.engine.config import SpeculationConfig


def test_policies_are_named_as_in_the_benchmark_of_servers() -> None:
    assert read_config("off").mode == "off"
    assert read_config("auto") == SpeculationConfig()
    assert (read_config("fixed:4").policy, read_config("fixed:4").max_drafts) == ("fixed", 4)
    assert read_config("uniform").policy == "uniform"
    with pytest.raises(BenchError, match="none of off, auto"):
        read_config("fixed:0")


def test_streams_share_their_requests_and_each_is_told_apart() -> None:
    engine = PolicyEngine("braid-tiny", read_config("fixed:4"), threads=1)
    rng, ticks = random.Random(0), iter(range(10**6))
    asks = [WORKLOADS["code-edit"](rng) for _ in range(5)]
    samples = engine.run(asks, 2, lambda: float(next(ticks)))
    engine.close()
    assert all(sample.is_complete and sample.event_tokens[-1] == sample.output_tokens for sample in samples)
    assert [sample.output_tokens for sample in samples] == [len("".join(s.texts).split()) for s in samples]
    events = sorted([(s.sent, 1) for s in samples] + [(s.finished, -1) for s in samples])
    running = [sum(change for _, change in events[: number + 1]) for number in range(len(events))]
    assert max(running) == 2
    assert sum(sample.drafted for sample in samples) > 0
    assert 0 < engine.steps.num_drafting <= engine.steps.num


def test_auto_is_compared_with_off_and_the_better_fixed_number() -> None:
    speeds = {"off": [10, 20, 40], "auto": [20, 30, 40], "fixed:2": [11, 21, 41], "fixed:4": [15, 30, 60]}
    rounds = {label: [Round([], speed, 1.0) for speed in found] for label, found in speeds.items()}
    assert list(comparisons(rounds)) == ["auto/off 1.500 (1.00-2.00)", "auto/fixed:4 1.000 (0.67-1.33)"]


def test_texts_are_the_same_with_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--streams", "2", "--workloads", "code-edit", "--policies", "auto", "fixed:4"]
    assert (
        main(
            [
                *arguments,
                "--rounds",
                "2",
                "--requests-per-stream",
                "2",
                "--min-requests",
                "1",
                "--threads",
                "1",
                "--cpu-time",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "steps," in line] == ["off", "auto", "fixed:4"]
    assert any("auto/off" in line and "auto/fixed:4" in line for line in lines)
    assert lines[-1] == "texts that differ from those of off: 0"


def test_an_unknown_policy_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--policies", "fast"]) == 2
    assert "policy 'fast' is none of" in capsys.readouterr().err
