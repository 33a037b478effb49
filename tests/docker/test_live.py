"""A real server behind the monitoring: what it serves is what Prometheus reads and the dashboard asks for."""

import http.client
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bench.client import Target
from server.bench.spawn import spawned_server
from tests.docker.scrape import metric_names, sample_names
from tests.docker.test_monitoring import expressions
from tests.docker.test_prometheus import assert_every_query_works, await_up, prometheus


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that has answered one completion."""
    with spawned_server("") as url:
        port = Target.parse(url).port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = json.dumps({"model": "braid-tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
        connection.close()
        yield port


def test_every_metric_that_is_queried_exists_in_a_live_scrape(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain")
    names = sample_names(response.read().decode())
    connection.close()
    missing = {name for _, expression in expressions() for name in metric_names(expression)} - names
    assert not missing


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus on this machine (apt-get install prometheus)"
)
def test_prometheus_scrapes_a_live_server(port: int, tmp_path: Path) -> None:
    with prometheus(tmp_path, port) as prometheus_port:
        await_up(prometheus_port, tmp_path)
        assert_every_query_works(prometheus_port)
