"""A server of our own for the length of a measurement: `--spawn '--random-weights ... --tbt-slo-ms 50'`."""

from __future__ import annotations

import http.client
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.bench.client import BenchError

TREE = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def spawned_server(flags: str, timeout_s: float = 180.0) -> Iterator[str]:
    """Run `python -m server serve FLAGS` on a free loopback port and yield its URL once /health answers 200.

    Raises BenchError with the end of the server's own output if it exits or is not ready in time. On leaving, the
    server gets SIGTERM, and SIGKILL after 20 s.
    """
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", *shlex.split(flags), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=TREE, stdout=output, stderr=subprocess.STDOUT)
        try:
            _await_ready(process, port, time.monotonic() + timeout_s)
            yield f"http://127.0.0.1:{port}"
        except BenchError as problem:
            output.seek(0)
            raise BenchError(f"{problem}; it said:\n{output.read()[-2000:]}") from None
        finally:
            _stop(process)


def _await_ready(process: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the spawned server exited with status {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.05)
    raise BenchError("the spawned server was not ready in time")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
