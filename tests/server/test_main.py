"""`python -m server` as a person runs it: starts, answers, drains, and fails fast with one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
PATIENCE_S = 300.0
"""How long a test waits for what must happen: only a broken server takes so long, however slow the machine is."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def run(*arguments: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "server", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return result.returncode, result.stdout + result.stderr


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Running:
    """One server process on a port that the system chose; its start-up report says which."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "server", *arguments, "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.banner: list[str] = []
        self.port = 0

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=PATIENCE_S)

    def is_ready(self) -> bool:
        try:
            with self.open("/health") as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.banner.append(line)
            if found := re.match(r"  curl http://127.0.0.1:(\d+)/v1/completions", line):
                self.port = int(found[1])
                break
        assert self.port, self.process.communicate()[1]
        assert self.is_ready()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, "".join(self.banner) + out, err


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
    flags = ("--dtype", "float32", "--served-model-name", "tiny", "--drain-timeout", str(PATIENCE_S))
    with running(str(checkpoint), *flags) as server:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        with server.open("/v1/completions", body) as answer:
            reference = json.load(answer)["choices"][0]["text"]
        engine = children_of(server.process.pid)[0]
        text = ""
        with server.open("/v1/completions", {**body, "stream": True}) as stream:
            for number, line in enumerate(stream):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += event["choices"][0]["text"]
                if number == 4:
                    os.kill(engine, signal.SIGKILL)
        assert text == reference
        deadline = time.monotonic() + PATIENCE_S
        while engine in children_of(server.process.pid) or not server.is_ready():
            assert time.monotonic() < deadline
            time.sleep(0.05)
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
    shape = "hidden=256,layers=8,heads=4,kv_heads=2,mlp=1024,vocab=4096"
    with running(str(checkpoint), "--random-weights", shape, "--drain-timeout", str(PATIENCE_S)) as server:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 3900, "ignore_eos": True, "stream": True}
        with server.open("/v1/completions", body) as stream:
            stream.readline()
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_S
            while server.is_ready():
                assert time.monotonic() < deadline
            server.process.send_signal(signal.SIGTERM)
            code, _, err = server.end()
            # Nobody waited for the last token.
            assert b'finish_reason":"length' not in stream.read()
        assert code == 0, err


def test_an_engine_that_is_killed_too_often_ends_the_server_with_a_failure(checkpoint: Path) -> None:
    with running(str(checkpoint), "--dtype", "float32") as server:
        killed: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
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
    result, output = run(*arguments)
    assert result == code, output
    assert message in output
    assert "Traceback" not in output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == (arguments[0] != "bench")


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, output = run("--port", str(port))
    assert code == 2
    assert (
        output.strip() == f"error: port {port} on 127.0.0.1 is in use; stop what listens there or choose another --port"
    )


def test_print_config_and_help_start_nothing() -> None:
    code, output = run("--max-model-len", "2k", "--print-config")
    assert code == 0
    assert "max-model-len: 2000" in output
    code, output = run("serve", "--help")
    assert code == 0
    assert "--tbt-slo-ms" in output
