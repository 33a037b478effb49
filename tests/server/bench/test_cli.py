import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bench.cli import main
from tests.server.bench.fake_server import FakeServer


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def url(fake: FakeServer) -> Iterator[str]:
    """The fake server on a loop of its own, because `main` runs its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = fake.running()
    target = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(5)
    yield target.url
    asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


def test_serve_prints_a_table_and_writes_json_and_a_plot(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "serve",
        "--url",
        url,
        "--num-requests",
        "12",
        "--output-len",
        "4",
        "--no-progress",
        "--api-key",
        "hush",
    ]
    files = ["--json", str(tmp_path / "new" / "r.json"), "--slo-ttft-ms", "5000"]
    try:
        import matplotlib  # noqa: F401

        files += ["--plot", str(tmp_path / "r.png")]
    except ImportError:
        pass
    assert main([*arguments, *files]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 completed" in out
    assert "time between tokens" in out
    text = (tmp_path / "new" / "r.json").read_text()
    content = json.loads(text)
    assert content["report"]["output_tokens"] == 48
    assert content["report"]["good_share"] == 1.0
    assert "hush" not in text
    if "--plot" in files:
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_failed_requests_make_the_exit_code_one(url: str, fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refuse = {6: 429}
    assert (
        main(["serve", "--url", url, "--num-requests", "8", "--output-len", "2", "--rate", "200", "--no-progress"]) == 1
    )
    out = capsys.readouterr().out
    assert "429: 1" in out
    assert "refused with 429" in out


def test_stall_reports_gaps_and_prompt_speed(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["stall", "--url", url, "--streams", "3", "--num-prompts", "4", "--seconds", "0.3", "--no-progress"]
    assert main([*arguments, "--json", str(tmp_path / "s.json"), "--max-stall", "1000"]) == 0
    report = json.loads((tmp_path / "s.json").read_text())["report"]
    assert report["prompt_tokens"] == 1500
    assert report["undisturbed"]["p50"] > 1.5, "the fake server's gap is 2 ms"
    assert report["stall_ratio"] == pytest.approx(report["under_load"]["p99"] / report["undisturbed"]["p50"])
    assert "alone" in capsys.readouterr().out


def test_stall_fails_when_the_ratio_is_above_what_was_asked(url: str) -> None:
    arguments = ["stall", "--url", url, "--streams", "2", "--num-prompts", "4", "--seconds", "0.2", "--no-progress"]
    assert main([*arguments, "--max-stall", "0.01"]) == 1


def test_a_context_that_is_too_short_is_said_before_anything_is_measured(
    url: str, fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.max_model_len = 512
    assert main(["stall", "--url", url]) == 2
    assert "--prompt-len is 1500, but the server's context is 512 tokens" in capsys.readouterr().err
    assert main(["serve", "--url", url, "--input-len", "500", "--output-len", "50"]) == 2
    assert "is 550, but the server's context is 512 tokens" in capsys.readouterr().err


def test_no_server_is_one_plain_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "Start a server (make serve)" in capsys.readouterr().err


def test_wrong_arguments_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["serve", "--concurrency", "0"], "--concurrency"),
        (["serve", "--rate", "-1"], "--rate"),
        (["serve", "--prefix-share", "2"], "--prefix-share"),
        (["serve", "--rate", "1", "--concurrency", "2"], "not allowed with"),
        (["stall", "--extra-body", "[]"], "--extra-body"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert complaint in capsys.readouterr().err
