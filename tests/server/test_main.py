"""`python -m server` as a person runs it: starts, answers, drains, and fails fast with one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(*arguments: str) -> tuple[int, str, float]:
    started_at = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "server", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stdout + result.stderr, time.monotonic() - started_at


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Running:
    """One server process on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "server", *arguments, "--port", str(self.port), "--threads", "1"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=30)

    def is_ready(self) -> bool:
        try:
            with self.open("/health") as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not self.is_ready():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "the server does not get ready"
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Running]:
    server = Running(*arguments)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def test_it_answers_says_what_it_holds_survives_an_engine_kill_and_drains(checkpoint: Path) -> None:
    with running(str(checkpoint), "--dtype", "float32", "--served-model-name", "tiny") as server:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        with server.open("/v1/completions", body) as answer:
            reference = json.load(answer)["choices"][0]["text"]
        engine = children_of(server.process.pid)[0]
        text = ""
        with server.open("/v1/completions", {**body, "stream": True}) as stream:
            for number, line in enumerate(stream):
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                if number == 4:
                    os.kill(engine, signal.SIGKILL)
        assert text == reference
        assert children_of(server.process.pid)[0] != engine
        engine = children_of(server.process.pid)[0]
        with server.open("/v1/completions", {**body, "max_tokens": 300, "stream": True}) as stream:
            stream.readline()
            server.process.send_signal(signal.SIGTERM)
            rest = stream.read()
        assert rest.rstrip().endswith(b"data: [DONE]")
        assert b'"finish_reason":"length"' in rest
        code, out, err = server.end()
        assert code == 0, err
        assert not is_alive(engine)
        assert 6 <= len(out.splitlines()) <= 12
        assert "room for" in out
        assert f"curl http://127.0.0.1:{server.port}/v1/completions" in out


def test_a_second_signal_stops_at_once(checkpoint: Path) -> None:
    with running(
        str(checkpoint), "--random-weights", "hidden=256,layers=8,heads=4,kv_heads=2,mlp=1024,vocab=4096"
    ) as server:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 3900, "ignore_eos": True, "stream": True}
        with server.open("/v1/completions", body) as stream:
            stream.readline()
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while server.is_ready():
                assert time.monotonic() < deadline
            started_at = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            code, _, err = server.end()
        assert time.monotonic() - started_at < 3.0
        assert code == 0, err


def test_an_engine_that_is_killed_too_often_ends_the_server_with_a_failure(checkpoint: Path) -> None:
    with running(str(checkpoint), "--dtype", "float32") as server:
        killed: set[int] = set()
        deadline = time.monotonic() + 90
        while server.process.poll() is None:
            assert time.monotonic() < deadline
            for child in children_of(server.process.pid):
                if child not in killed and len(killed) < 6:
                    killed.add(child)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        code, _, err = server.end()
        assert code == 1
        assert "engine failures in 10 minutes" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prot", "1"], 2, "error: unknown flag --prot; did you mean --port?"),
        (["--host", "256.1.1.1"], 2, "error: --host 256.1.1.1: "),
        (["serve", "/no/such/folder", "--port", "0"], 1, "error: model '/no/such/folder' is neither a folder here"),
        (["--random-weights", "hidden=7", "--port", "0"], 1, "error: "),
        (["bench", "nonsense"], 2, "nonsense"),
    ],
)
def test_a_bad_start_says_why_in_one_line_and_leaves_nothing(arguments: list[str], code: int, message: str) -> None:
    result, output, _ = run(*arguments)
    assert result == code, output
    assert message in output
    assert "Traceback" not in output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == (arguments[0] != "bench")


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, output, elapsed = run("--port", str(port))
    assert code == 2
    assert (
        output.strip() == f"error: port {port} on 127.0.0.1 is in use; stop what listens there or choose another --port"
    )
    assert elapsed < 10


def test_print_config_and_help_start_nothing() -> None:
    code, output, _ = run("--max-model-len", "2k", "--print-config")
    assert code == 0
    assert "max-model-len: 2000" in output
    code, output, _ = run("serve", "--help")
    assert code == 0
    assert "--tbt-slo-ms" in output
