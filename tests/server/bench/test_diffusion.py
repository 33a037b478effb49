"""The diffusion benchmark: ratios of neighbours in time, tokens and not events counted, and a real small run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from server.bench.cli import main
from server.bench.client import Sample
from server.bench.diffusion import SUFFIX, Ratio, num_right
from server.bench.diffusion_work import KINDS, function_task, list_task, make_asks, record_task
from tests.server.bench.fake_server import FakeServer
from tests.server.bench.test_cli import url as url  # the fake server on a loop of its own

SHORT = ["--rounds", "2", "--requests", "3", "--streams", "4", "--seconds", "0.3", "--no-progress"]


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer(names=("fake", "fake" + SUFFIX), bursts={"fake" + SUFFIX: 4})


def test_a_ratio_is_of_each_round_and_the_median_counts() -> None:
    ratio = Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)
    assert (ratio.ours, ratio.base) == (4.0, 1.0)


def test_list_tasks_have_the_answer_they_say() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        ask = list_task(rng)
        head, _, rest = ask.prompt.removesuffix(" ->").partition(": ")
        items, (operation, *words) = rest.split(), head.split()
        seen.add(operation)
        right = {"copy": items, "reverse": items[::-1], "sort": sorted(items)}.get(operation)
        if operation == "insert":
            right = items.copy()
            right.insert(int(words[2]) - 1, words[0])
        elif operation == "remove":
            right = items[: int(words[1]) - 1] + items[int(words[1]) :]
        elif operation == "replace":
            right = items.copy()
            right[int(words[0]) - 1] = words[2]
        assert ask.expected.split() == right
    assert seen == {"copy", "reverse", "sort", "insert", "remove", "replace"}


def test_each_task_comes_equally_often_whatever_was_asked_for() -> None:
    asks = make_asks(random.Random(0), 9)
    assert {kind: len(some) for kind, some in asks.items()} == {"lists": 12, "records": 2, "functions": 2}
    assert list(asks) == list(KINDS)


def test_records_and_functions_have_the_answer_they_say() -> None:
    rng = random.Random(0)
    for _ in range(50):
        record, function = record_task(rng), function_task(rng)
        values = {str(value) for value in json.loads(record.expected).values()}
        assert all(value in record.prompt for value in values)
        assert function.prompt.startswith("def ")
        assert function.prompt.endswith(":")
        compile(f"{function.prompt}\n{function.expected}", "function", "exec")


def test_an_answer_is_right_up_to_white_space_around_it() -> None:
    ask = list_task(random.Random(1))
    texts = [[ask.expected], [ask.expected.strip()], [ask.expected, "1"], []]
    assert num_right([Sample(0.0, texts=text) for text in texts], [ask] * 4) == 2


def test_bursts_are_faster_and_count_as_tokens(
    url: str, fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diffusion", "--url", url, *SHORT, "--json", str(tmp_path / "d.json")]) == 0
    out = capsys.readouterr().out
    assert "4.0 tokens an event" in out
    report = json.loads((tmp_path / "d.json").read_text())["report"]
    assert report["speed"]["median"] > 2, "four tokens for each gap of the other"
    assert report["company"]["median"] > 0
    assert report["speeds"].keys() == KINDS.keys()
    bodies = [body for body in fake.bodies if body["max_tokens"] in (24, 48, 96)]
    assert {body["model"] for body in bodies} == {"fake", "fake" + SUFFIX}
    assert all(("speculation" in body) == (body["model"] == "fake") for body in bodies)
    crowd = [body for body in fake.bodies if body["max_tokens"] == 400]
    assert {body["model"] for body in crowd} == {"fake", "fake" + SUFFIX}
    # A server notices late that the streams of one crowd were cut, so the next one may meet them.
    assert 4 <= fake.most_in_flight <= 8


def test_limits_that_are_missed_make_the_exit_code_one(url: str, fake: FakeServer) -> None:
    assert main(["diffusion", "--url", url, *SHORT, "--min-speed", "1000"]) == 1
    assert main(["diffusion", "--url", url, *SHORT, "--max-p99-ratio", "0.001"]) == 1


def test_a_server_without_a_second_name_is_refused(
    url: str, fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.names = ("fake",)
    assert main(["diffusion", "--url", url, *SHORT]) == 2
    assert "denoises under the same with -diffusion" in capsys.readouterr().err


def test_a_failed_request_is_no_measurement(url: str, fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refuse = {4: 503}
    assert main(["diffusion", "--url", url, *SHORT]) == 2
    assert "refused with 503" in capsys.readouterr().err


def test_it_measures_our_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--spawn", "", "--json", str(tmp_path / "d.json")]
    assert main(["diffusion", *arguments, *SHORT, "--seconds", "1"]) == 0
    report = json.loads((tmp_path / "d.json").read_text())["report"]
    assert report["tokens_per_event"] > 1
    assert report["right_denoised"] > 0.5 < report["right_plain"]
    assert "speed: denoised over token by token" in capsys.readouterr().out
