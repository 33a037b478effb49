"""What is counted, what is timed, and the command as a whole, with an engine that knows the answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from scheduler.attention import AttentionOffer
from scheduler.types import Attention, AttentionMethod
from server.bench.arguments import make_parser
from server.bench.client import BenchError
from server.bench.sparse import report, run
from server.bench.sparse.measure import Accuracy, Speed, ask, race


class Oracle:
    """Looks the value up. With TIDAL it forgets the last token; with QUEST it does for every second question."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, str]] = []

    def answer(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, attention: Attention | Literal["dense"]
    ) -> list[tuple[int, ...]]:
        method = attention.method if isinstance(attention, Attention) else attention
        self.asked.append((len(prompts), num_tokens, method))
        found = []
        for number, prompt in enumerate(prompts):
            at = list(prompt).index(prompt[-1])
            value = list(prompt[at + 1 : at + 4])
            if method == AttentionMethod.TIDAL or (method == AttentionMethod.QUEST and number % 2):
                value[-1] = 0
            found.append(tuple((value * num_tokens)[:num_tokens]))
        return found


def test_values_count_whole_and_by_token_and_every_method_is_asked_the_same() -> None:
    engine = Oracle()
    budgets = {"dense": 64, "quest": 8, "tidal": 8}
    *_, found = ask(engine, 64, 14, budgets, seed=0)
    assert found == [
        Accuracy(64, "dense", 64, 14, 14, (14, 14, 14)),
        Accuracy(64, "quest", 8, 14, 7, (14, 14, 7)),
        Accuracy(64, "tidal", 8, 14, 0, (14, 14, 0)),
    ]
    assert engine.asked == [(10, 3, m) for m in budgets] + [(4, 3, m) for m in budgets]


def test_a_step_is_what_an_answer_takes_beyond_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Timed(Oracle):
        def answer(
            self, prompts: Sequence[Sequence[int]], num_tokens: int, attention: Attention | Literal["dense"]
        ) -> list[tuple[int, ...]]:
            nonlocal now
            now += 100.0 + (num_tokens - 1) * (4.0 if attention == "dense" else 1.0)
            return super().answer(prompts, num_tokens, attention)

    monkeypatch.setattr("server.bench.sparse.measure.time.perf_counter", lambda: now)
    found = race(Timed(), 64, 2, num_tokens=5, rounds=3, budgets={"dense": 64, "quest": 8}, seed=0)
    assert found == [Speed(64, "dense", 64, 2, 4000.0, 1.0), Speed(64, "quest", 8, 2, 1000.0, 4.0)]


def arguments(*flags: str) -> argparse.Namespace:
    return make_parser().parse_args(["sparse", *flags])


def test_the_report_has_a_line_a_method_and_length_and_the_file_all_figures(tmp_path: Path) -> None:
    asked = arguments("--lengths", "64", "128", "--questions", "10", "--rounds", "1", "--no-progress")
    budgets = {64: {"dense": 64, "quest": 8}, 128: {"dense": 128, "quest": 16}}
    accuracies, speeds = run.measure(Oracle(), budgets, asked)
    lines = report.as_table(accuracies, speeds).splitlines()
    assert len(lines) == 5
    assert lines[1].split("|")[3].strip() == "100.0% of 10"
    assert lines[2].split("|")[3].strip() == "50.0% of 10"
    report.write_json(tmp_path / "out.json", accuracies, speeds, {"lengths": [64, 128]})
    told = json.loads((tmp_path / "out.json").read_text())
    assert [one["share"] for one in told["accuracy"]] == [1.0, 0.5, 1.0, 0.5]
    assert len(told["speed"]) == 4


def test_a_method_that_needs_more_keys_than_its_share_is_named_and_left_out() -> None:
    offers = (AttentionOffer(AttentionMethod.QUEST, 160), AttentionOffer(AttentionMethod.TIDAL, 69))
    budgets, refused = run.choose_budgets([2048, 4096], 16, offers)
    assert budgets == {2048: {"dense": 2048, "tidal": 128}, 4096: {"dense": 4096, "quest": 256, "tidal": 256}}
    assert refused == ["quest at 2048 keys: 1/16 of them is 128, it needs 160"]


def test_lengths_that_no_pairs_make_are_refused() -> None:
    with pytest.raises(BenchError, match="--lengths has 2050, but must have multiples of 4 from 40 to 16384"):
        run.check_lengths([2048, 2050])
