"""Debian's Prometheus, with the configuration that is shipped, scrapes a server and evaluates every query and rule.

Skips where there is no `prometheus` on the machine (Debian, Ubuntu: apt-get install prometheus).
"""

import http.client
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.scrape import real_scrape
from tests.docker.test_monitoring import RULES, expressions

PROMETHEUS_FILES = Path(__file__).resolve().parents[2] / "docker" / "prometheus"

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus on this machine (apt-get install prometheus)",
)


def free_port() -> int:
    """Prometheus does not say which port it got for 0, so it is told one (which another could take before it does)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@contextmanager
def exporter() -> Iterator[int]:
    """Our metrics over HTTP, as the server's /metrics serves them."""
    content = real_scrape().encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def prometheus(folder: Path, target_port: int) -> Iterator[int]:
    """A running Prometheus with our files; only the targets' addresses differ. Yields its port."""
    port = free_port()
    config = yaml.safe_load((PROMETHEUS_FILES / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    for job, target in zip(config["scrape_configs"], (target_port, port), strict=True):
        job["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS_FILES / "alerts.yml", folder / "alerts.yml")
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            yield port
        finally:
            process.terminate()
            process.wait(120)


def braid_target(port: int) -> dict[str, Any] | None:
    try:
        targets = get(port, "/api/v1/targets")["data"]["activeTargets"]
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return next((target for target in targets if target["labels"]["job"] == "braid"), None)


def await_up(port: int, folder: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        target = braid_target(port)
        if target and target["health"] == "up":
            return
        time.sleep(0.1)
    pytest.fail(f"not scraped: {braid_target(port)}\n{(folder / 'log').read_text()[-2000:]}")


def assert_every_query_works(port: int) -> None:
    for where, expression in expressions():
        if expression.startswith("label_values"):
            continue
        query = expression.replace("$__rate_interval", "30s").replace("$model", ".*").replace("$instance", ".*")
        answer = get(port, "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
        assert answer["status"] == "success", f"{where}: {answer}"
    # A scrape that took too long on a busy machine leaves a gap; the next one fills it.
    deadline = time.monotonic() + 300
    while len(get(port, "/api/v1/query?query=braid_engine_ready")["data"]["result"]) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rules = get(port, "/api/v1/rules")["data"]["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert not [rule["name"] for rule in rules if rule["health"] == "err"]


def test_the_shipped_files_pass_promtool(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(PROMETHEUS_FILES / name, tmp_path / name)
    for check in (["config", "prometheus.yml"], ["rules", "alerts.yml"]):
        result = subprocess.run(
            ["promtool", "check", *check], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_can_parse_the_scrape() -> None:
    """Exit code 3 is about style (vLLM's names hold colons); 1 would be a scrape that no Prometheus can read."""
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=real_scrape(), capture_output=True, text=True, timeout=30
    )
    assert result.returncode in (0, 3), result.stderr


def test_prometheus_scrapes_our_metrics_and_evaluates_every_query_and_rule(tmp_path: Path) -> None:
    with exporter() as target_port, prometheus(tmp_path, target_port) as port:
        await_up(port, tmp_path)
        assert_every_query_works(port)
