"""A server of our own for the length of a measurement: `--spawn '--random-weights ... --tbt-slo-ms 50'`."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from server.bench.client import BenchError

TREE = Path(__file__).resolve().parents[2]


@contextmanager
def spawned_server(flags: str, timeout_s: float = 180.0) -> Iterator[str]:
    """Run `python -m server serve FLAGS` on a loopback port of the system's choice and yield its URL once it is ready.

    Raises BenchError with the end of the server's own output if it exits or is not ready in time. On leaving, the
    server gets SIGTERM, and SIGKILL after 20 s.
    """
    command = [sys.executable, "-m", "server", "serve", *shlex.split(flags), "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, "--no-quiet"], cwd=TREE, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _await_ready(process, output, time.monotonic() + timeout_s)
        except BenchError as problem:
            raise BenchError(f"{problem}; it said:\n{_said(output)[-2000:]}") from None
        finally:
            _stop(process)


def _await_ready(process: subprocess.Popen[bytes], output: IO[bytes], deadline: float) -> str:
    """The URL of the start-up report, which is printed when the server serves. A port found free beforehand and handed
    over could be anybody's by the time it is bound."""
    while time.monotonic() < deadline:
        if found := re.search(r"^API +(http://\S+)/v1 ", _said(output), re.M):
            return found[1]
        if process.poll() is not None:
            raise BenchError(f"the spawned server exited with status {process.returncode}")
        time.sleep(0.05)
    raise BenchError("the spawned server was not ready in time")


def _said(output: IO[bytes]) -> str:
    """All that the server wrote. By position: it shares our file offset, which must stay where it writes."""
    return os.pread(output.fileno(), 1 << 20, 0).decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
