"""The benchmarks against our own server: the whole path, from flags to a report."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bench.cli import main
from server.bench.client import BenchError
from server.bench.spawn import spawned_server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with spawned_server("") as address:
        yield address


@pytest.mark.parametrize("route", [[], ["--chat"]])
def test_serve_measures_our_server_on_both_routes(url: str, route: list[str], tmp_path: Path) -> None:
    arguments = ["serve", "--url", url, "--num-requests", "6", "--concurrency", "3", "--no-progress", *route]
    lengths = ["--input-len", "32", "--output-len", "8", "--json", str(tmp_path / "r.json")]
    assert main([*arguments, *lengths]) == 0
    report = json.loads((tmp_path / "r.json").read_text())["report"]
    assert report["completed"] == 6
    assert report["errors"] == {}
    assert report["is_counted"], "our server counts tokens with each event"
    assert report["output_tokens"] == 6 * 8, "ignore_eos lets every output reach its length"
    if not route:
        assert report["prompt_tokens"] == 6 * 32, "token-id prompts have exactly the asked length"


def test_stall_measures_our_server(url: str, tmp_path: Path) -> None:
    arguments = [
        "stall",
        "--url",
        url,
        "--streams",
        "2",
        "--prompt-len",
        "200",
        "--num-prompts",
        "12",
        "--seconds",
        "0.5",
    ]
    assert main([*arguments, "--no-progress", "--json", str(tmp_path / "s.json")]) == 0
    report = json.loads((tmp_path / "s.json").read_text())["report"]
    assert report["prompt_tokens"] == 200
    assert report["stall_ratio"] > 0


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(BenchError, match="exited with status 2") as caught, spawned_server("--no-such-flag"):
        pass
    assert "no-such-flag" in str(caught.value)


def test_steps_compares_the_engine_with_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "hidden=64,layers=2,heads=4,kv_heads=2,mlp=128,vocab=512"
    arguments = ["steps", "--random-weights", shape, "--streams", "1", "4", "--input-len", "16", "--output-len", "12"]
    assert main([*arguments, "--prompt-len", "64", "--json", str(tmp_path / "t.json")]) == 0
    report = json.loads((tmp_path / "t.json").read_text())["report"]
    assert [figures["streams"] for figures in report["decode"]] == [1, 4]
    assert all(figures["steps"] >= 4 for figures in report["decode"])
    assert report["read_mib"] * (1 << 20) < 2 * (2 * 64 * (64 * 3 + 128 * 3) + 512 * 64 + 8192), "one table, not two"
    assert "x floor" in capsys.readouterr().out
