"""Clients that leave, overload, keys and hosts: with real sockets where it matters."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from scheduler.types import Delta, Fault, FinishReason, Request
from server.api.middleware import GUARDED_PATHS, OPEN_PATHS
from server.api.settings import ApiSettings, Limits, Timeouts
from server.engine.config import EngineState
from tests.server.api.fake_engine import endless, silent
from tests.server.api.running import PATIENCE_S, Server, make_app, serving, wait_until

BODY: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 400}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [endless(), silent], ids=["decoding", "queued"])
def test_a_closed_connection_aborts_its_request(stream: bool, script: Any) -> None:
    with serving(script) as server:
        sock = server.post_and_keep("/v1/completions", {**BODY, "stream": stream, "n": 2})
        wait_until(lambda: len(server.engine.in_flight) == 2)
        if script is not silent:
            # Its prompt tokens no longer wait: the first token has come.
            wait_until(lambda: server.held() == (2, 2, 0))
        if stream and script is not silent:
            assert b"200 OK" in sock.recv(65536)
        sock.close()
        wait_until(lambda: server.held() == (0, 0, 0))
        assert len(server.engine.aborted) == 2
        stage = "waiting" if script is silent else "running"
        wait_until(lambda: f'cause="client",model_name="tiny",stage="{stage}"}} 1.0' in server.get("/metrics").text)


def test_many_clients_cut_at_random_times_leave_nothing() -> None:
    with serving(endless(pause_s=0.002), max_seqs=32, queue=96) as server:

        def one(i: int) -> None:
            sock = server.post_and_keep("/v1/completions", {**BODY, "stream": i % 2 == 0})
            sock.settimeout((i % 13) * 0.004 + 0.001)
            with contextlib.suppress(TimeoutError):
                sock.recv(1024)
            sock.close()

        for start in range(0, 100, 25):
            threads = [threading.Thread(target=one, args=(start + i,)) for i in range(25)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        wait_until(lambda: server.held() == (0, 0, 0))


def test_sse_events_are_separated_by_blank_lines_and_end_with_done() -> None:
    with serving() as server:
        response = server.post("/v1/completions", json={**BODY, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert response.text.endswith("data: [DONE]\n\n")
        events = response.text.split("\n\n")[:-1]
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        assert events[-1] == "data: [DONE]"
        assert all(json.loads(event[6:])["object"] == "text_completion" for event in events[:-1])


def test_padded_events_have_nearly_equal_sizes() -> None:
    with serving() as server:
        options = {"include_obfuscation": True}
        response = server.post("/v1/completions", json={**BODY, "stream": True, "stream_options": options})
        sizes = [len(event) for event in response.text.split("\n\n")[:-2]]
        assert max(sizes) - min(sizes) < 70
        assert len(set(sizes)) <= 2


def test_a_silent_stream_is_kept_alive_with_comments_and_ends_at_its_deadline() -> None:
    settings = ApiSettings(("tiny",), timeouts=Timeouts(first_token_s=0.05, keep_alive_s=0.05, request_s=0.4))
    with serving(silent, settings) as server:
        response = server.post("/v1/completions", json={**BODY, "stream": True})
        assert response.text.startswith(": keep-alive\n\n")
        assert '"code":"timeout"' in response.text
        assert response.text.endswith("data: [DONE]\n\n")
        whole = server.post("/v1/completions", json=BODY)
        assert whole.status_code == 504
        assert whole.headers["x-should-retry"] == "false"
        wait_until(lambda: server.held() == (0, 0, 0))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waited_too_long_is_503_and_says_when_to_return(stream: bool) -> None:
    def waits(request: Request) -> Iterator[Delta | float]:
        yield 0.3
        fault = Fault(503, "no place was free within 30 s; try again later", None, "timeout")
        yield Delta(request.id, finish_reason=FinishReason.ERROR, fault=fault)

    with serving(waits) as server:
        answer = server.post("/v1/completions", json={**BODY, "stream": stream, "n": 3})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "timeout"
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert answer.headers["x-should-retry"] == "true"
        wait_until(lambda: server.held() == (0, 0, 0))
        assert 'cause="timeout",model_name="tiny",stage="waiting"} 1.0' in server.get("/metrics").text
    settings = ApiSettings(("tiny",), timeouts=Timeouts(first_token_s=0.05))
    with serving(waits, settings) as server:
        answer = server.post("/v1/completions", json={**BODY, "stream": True})
        assert answer.text.startswith(": keep-alive\n\n")
        assert '"code":"timeout"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
        wait_until(lambda: server.held() == (0, 0, 0))


def test_too_many_requests_are_429_with_retry_after_and_all_or_nothing() -> None:
    with serving(silent, max_seqs=2, queue=2) as server:
        sock = server.post_and_keep("/v1/completions", {**BODY, "n": 3})
        wait_until(lambda: len(server.engine.in_flight) == 3)
        refused = server.post("/v1/completions", json={**BODY, "n": 2})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-should-retry"] == "true"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert len(server.engine.in_flight) == 3
        never = server.post("/v1/completions", json={**BODY, "n": 5})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        sock.close()
        wait_until(lambda: server.held() == (0, 0, 0))


def test_log_probabilities_have_a_budget_for_a_call_and_for_all() -> None:
    """One call of 128 samples with 20 alternatives each would hold more than a gigabyte until its answer is written."""
    settings = ApiSettings(("tiny",), limits=Limits(max_logprob_entries=400 * 21))
    body = {**BODY, "logprobs": 20}
    with serving(silent, settings) as server:
        for fields, param in (
            ({"n": 2}, "logprobs"),
            ({"logprobs": None, "prompt": [[1] * 100] * 5, "prompt_logprobs": 20}, "prompt_logprobs"),
        ):
            refused = server.post("/v1/completions", json={**body, **fields})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        socks = [server.post_and_keep("/v1/completions", body) for _ in range(4)]
        wait_until(lambda: len(server.engine.in_flight) == 4)
        refused = server.post("/v1/completions", json={**body, "max_tokens": 1})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert 'reason="max_logprob_entries"} 1.0' in server.get("/metrics").text
        for sock in socks:
            sock.close()
        wait_until(lambda: server.held() == (0, 0, 0))
        assert server.app.services.admission.num_logprobs == 0


def test_an_engine_that_is_away_is_503_everywhere() -> None:
    with serving() as server:
        for state in (EngineState.LOADING, EngineState.RESTARTING, EngineState.DEAD, EngineState.DRAINING):
            server.engine.state = state
            assert server.get("/health").status_code == 503
            assert server.get("/health/live").status_code == 200
            assert server.get("/health/generate").status_code == 503
            answer = server.post("/v1/completions", json=BODY)
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "server_error"
            server.engine.state = EngineState.READY
        assert server.get("/health").status_code == 200


KEYS = ApiSettings(("tiny",), api_keys=("first-key", "second-key"))


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with serving(settings=KEYS) as server:
        yield server


def test_every_route_is_on_exactly_one_list() -> None:
    app, _, _ = make_app()
    paths = {getattr(route, "path", "") for route in app.api.routes}
    assert paths == OPEN_PATHS | GUARDED_PATHS | {"/metrics"}
    assert not OPEN_PATHS & GUARDED_PATHS


def test_guarded_routes_need_a_key_and_open_ones_do_not(guarded: Server) -> None:
    with guarded.client() as client:
        for path in sorted(GUARDED_PATHS | {"/nope", "//v1/models", "/v1/models/", "/V1/models", "/v1/%6dodels"}):
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "first-key"},
                {"host": "x/health?"},
            ):
                for method in ("GET", "POST", "OPTIONS"):
                    response = client.request(method, path, headers=headers)
                    assert response.status_code == 401, (method, path)
                    assert response.json()["error"]["code"] == "invalid_api_key"
        for path in sorted(OPEN_PATHS | {"/metrics"}):
            assert client.get(path).status_code == 200
        for key in KEYS.api_keys:
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert "braid_auth_failures_total" in client.get("/metrics").text
        assert "first-key" not in client.get("/metrics").text


def test_a_body_without_a_key_is_not_read(guarded: Server) -> None:
    sock = guarded.connect()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    )
    sock.sendall(head.encode())
    assert b"401" in sock.recv(1024).split(b"\r\n")[0]
    sock.close()


def test_each_key_has_its_own_cache(guarded: Server) -> None:
    salts = []
    for key in KEYS.api_keys:
        headers = {"authorization": f"Bearer {key}"}
        for salt in (None, "mine"):
            guarded.post("/v1/completions", json={**BODY, "cache_salt": salt}, headers=headers)
            salts.append(guarded.engine.requests[-1].cache_salt)
    assert len(set(salts)) == 4


def test_unknown_hosts_are_refused_where_hosts_are_listed() -> None:
    with serving(settings=ApiSettings(("tiny",), allowed_hosts=("localhost", "127.0.0.1", "[::1]"))) as server:
        for host, status in (("localhost", 200), ("127.0.0.1:9", 200), ("[::1]:80", 200), ("evil.example", 400)):
            assert server.get("/health", headers={"host": host}).status_code == status


def test_every_answer_has_an_id_and_odd_ones_are_replaced(guarded: Server) -> None:
    assert guarded.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("a" * 200, "a b", "é"):
        headers = [(b"x-request-id", odd.encode())]
        assert re.fullmatch("req-[0-9a-f]{24}", guarded.get("/nope", headers=headers).headers["x-request-id"])


def test_head_is_get_without_the_body() -> None:
    with serving() as server, server.client() as client:
        for path in (
            "/health",
            "/health/live",
            "/ping",
            "/version",
            "/v1/models",
            "/v1/models/tiny",
            "/nope",
            "/metrics",
        ):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert set(head.headers) == set(get.headers)
            if path != "/metrics":
                assert head.headers.get("content-length") == get.headers.get("content-length")
        assert client.head("/v1/completions").status_code == 405
        assert 'method="HEAD",status="200"' in client.get("/metrics").text


def test_header_floods_are_refused(guarded: Server) -> None:
    headers = [(f"x-{i}", "1") for i in range(150)]
    assert guarded.get("/health", headers=headers).status_code == 431


def test_junk_makes_no_new_series_and_metrics_stay_small() -> None:
    with serving() as server, server.client() as client:

        def junk(i: int) -> None:
            client.get(f"/junk/{i}")
            client.post("/v1/completions", json={**BODY, "model": f"m{i}", "user": f"u{i}"})
            client.get(f"/v1/models/x{i}")
            client.request(f"BREW{i}", "/v1/models")

        junk(0)
        before = [line.split(" ")[0] for line in client.get("/metrics").text.splitlines()]
        for i in range(1, 30):
            junk(i)
        text = client.get("/metrics").text
        after = [line.split(" ")[0] for line in text.splitlines()]
        assert set(after) - set(before) <= {line for line in after if 'handler="/metrics"' in line}
        assert len(text) < 200_000


@pytest.mark.parametrize(("fresh_s", "num_probes"), [(600.0, 1), (0.0, 5)])
def test_health_generate_asks_the_engine_once_for_many(fresh_s: float, num_probes: int) -> None:
    settings = ApiSettings(("tiny",), timeouts=Timeouts(health_generate_s=PATIENCE_S, health_cache_s=fresh_s))
    with serving(settings=settings) as server:
        for _ in range(5):
            assert server.get("/health/generate").status_code == 200
        assert len(server.engine.requests) == num_probes


def test_an_aborted_request_is_never_a_stop() -> None:
    def aborted(request: Request) -> Iterator[Delta | float]:
        yield Delta(request.id, (65,))
        yield Delta(request.id, finish_reason=FinishReason.ABORT)

    with serving(aborted) as server:
        answer = server.post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert "stop" not in answer.text
