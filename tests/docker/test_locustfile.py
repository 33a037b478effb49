"""The locustfile, run headless against a scripted server: streamed answers, refusals and broken streams differ."""

import asyncio
import csv
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.bench.fake_server import FakeServer

LOCUSTFILE = Path(__file__).resolve().parents[2] / "docker" / "locustfile.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="no locust (make setup installs it)")


@contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = fake.running()
    target = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(60)
    try:
        yield target.url
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)


def run_locust(url: str, folder: Path) -> dict[str, dict[str, str]]:
    """Statistics by name after three seconds with two users."""
    command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--host", url, "--headless"]
    command += ["--users", "2", "--spawn-rate", "2", "--run-time", "3s", "--csv", str(folder / "out"), "--only-summary"]
    # Requests in flight at the end are let finish: a cut one counts as a failure.
    command += ["--stop-timeout", "60"]
    result = subprocess.run(
        [*command, "--output-tokens", "5"], capture_output=True, text=True, timeout=300, check=False
    )
    assert (folder / "out_stats.csv").exists(), result.stderr
    with (folder / "out_stats.csv").open() as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def test_first_tokens_and_gaps_are_metrics_of_their_own(tmp_path: Path) -> None:
    with serving(FakeServer(gap_s=0.02)) as url:
        rows = run_locust(url, tmp_path)
    answers = int(rows["TTFT"]["Request Count"])
    assert answers >= 2
    assert int(rows["TBT"]["Request Count"]) >= 4 * (answers - 2)
    assert float(rows["tokens"]["Average Content Size"]) == 5
    assert float(rows["TBT"]["Median Response Time"]) > 15
    assert int(rows["Aggregated"]["Failure Count"]) == 0


def test_a_refusal_is_no_failure_but_a_cut_stream_is(tmp_path: Path) -> None:
    with serving(FakeServer(refuse=dict.fromkeys(range(100), 429))) as url:
        rows = run_locust(url, tmp_path)
    assert int(rows["429 refused"]["Request Count"]) >= 2
    assert int(rows["Aggregated"]["Failure Count"]) == 0
    with serving(FakeServer(cut_after=2)) as url:
        rows = run_locust(url, tmp_path)
    assert int(rows["/v1/completions"]["Failure Count"]) >= 2
