"""Connections with bad manners: slow, endless, pipelined, unread, broken, too many; real sockets (S-01 to S-06)."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import threading
import time
from typing import Any

import pytest

from server.api.settings import ApiSettings, Limits, Timeouts
from tests.server.api.fake_engine import MODEL_LEN, byte_tokenizer, endless, says, silent
from tests.server.api.running import PATIENCE_S, Server, serving, wait_until

BODY: dict[str, Any] = {"prompt": "hi", "max_tokens": 5}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def read_all(sock: socket.socket) -> bytes:
    """Until the server closes. A reset is an end too: what came before it counts."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            found += part
    return found


def read_answer(sock: socket.socket) -> bytes:
    """One answer whose body is a JSON line, on a connection that may be kept."""
    found = b""
    while not found.endswith(b"}\n"):
        part = sock.recv(65536)
        assert part, found
        found += part
    return found


def is_closed(sock: socket.socket) -> bool:
    return read_all(sock) == b""


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    """The last answer's status and error object; its head must be complete."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert b"x-request-id: req-" in head
    assert b"x-should-retry: " in head
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split(b"HTTP/1.1 ")[-1][:3]), error


def dribble(sock: socket.socket, data: bytes, gap_s: float) -> bool:
    """Send a byte at a time; True if the server closed before the end."""
    try:
        for i in range(len(data)):
            sock.sendall(data[i : i + 1])
            time.sleep(gap_s)
    except ConnectionError:
        return True
    return False


def test_slow_heads_and_idle_connections_are_cut_while_others_are_served() -> None:
    with serving(says(byte_tokenizer(), "hello"), header_s=1.0, keep_alive_s=1) as server:
        idle = [server.connect() for _ in range(20)]
        slow = [server.connect() for _ in range(20)]
        threads = [threading.Thread(target=dribble, args=(sock, HEAD.encode() * 40, 0.02)) for sock in slow]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert server.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "hello"[:5]
        assert all(map(is_closed, idle))
        kept = server.connect()
        kept.sendall(GET)
        assert b"200 OK" in kept.recv(65536)
        assert dribble(kept, HEAD.encode() * 40, 0.05)
        wait_until(lambda: not server.connections)


def test_bodies_that_do_not_come_are_408_and_hold_nothing() -> None:
    settings = ApiSettings(("tiny",), timeouts=Timeouts(body_s=0.5))
    with serving(settings=settings) as server:
        socks = [server.connect() for _ in range(10)]
        for sock in socks:
            sock.sendall(f"{HEAD}Content-Length: 100000\r\n\r\n{{".encode())
        for sock in socks:
            assert error_of(read_answer(sock))[0] == 408
        assert server.held() == (0, 0, 0)
        assert server.post("/v1/completions", json=BODY).status_code == 200


def test_bodies_that_stop_halfway_cannot_fill_the_memory() -> None:
    settings = ApiSettings(("tiny",), max_body_memory=1 << 20, timeouts=Timeouts(body_s=PATIENCE_S))
    half = b"x" * 100_000
    with serving(settings=settings) as server:
        socks = [server.connect() for _ in range(20)]
        for sock in socks:
            sock.sendall(f"{HEAD}Content-Length: 200000\r\n\r\n".encode() + half)
        bodies = server.app.services.bodies
        wait_until(lambda: len(select.select(socks, [], [], 0)[0]) >= 9)
        assert bodies.held_bytes <= 1 << 20
        for sock in select.select(socks, [], [], 0)[0]:
            status, error = error_of(read_answer(sock))
            assert (status, error["code"]) == (429, "rate_limit_exceeded")
        for sock in socks:
            sock.close()
        wait_until(lambda: bodies.held_bytes == 0)
        assert server.post("/v1/completions", json=BODY).status_code == 200


def test_a_dribbled_body_is_served_in_time_or_408_whatever_the_pieces() -> None:
    raw = json.dumps(BODY).encode()
    with serving(settings=ApiSettings(("tiny",), timeouts=Timeouts(body_s=PATIENCE_S))) as server:
        sock = server.connect()
        sock.sendall(f"{HEAD}Content-Length: {len(raw)}\r\n\r\n".encode())
        assert not dribble(sock, raw, 0.001)
        assert b"200 OK" in sock.recv(65536)


def test_a_body_in_crumbs_is_refused_before_it_costs_the_loop_seconds() -> None:
    with serving() as server:
        sock = server.connect()
        sock.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        before = time.process_time()
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                sock.sendall(b"1\r\nx\r\n" * 8192)
        status, error = error_of(read_all(sock))
        assert (status, error["code"]) == (413, "request_too_large")
        # Of this process, client included; parsing all of it takes five seconds or more.
        assert time.process_time() - before < 3.0
        assert server.held() == (0, 0, 0)


def test_chunks_of_honest_size_are_served() -> None:
    raw = json.dumps({**BODY, "user": "x" * 200_000}).encode()
    with serving() as server:
        pieces = (raw[i : i + 100] for i in range(0, len(raw), 100))
        response = server.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),  # TLS to a plain port
        (b"GET /\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
        (HEAD.encode() + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD.encode() + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (HEAD.encode() + b"Content-Length: 99999999999\r\n\r\n", 413),
        (HEAD.encode() + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (HEAD.encode() + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD.encode() + b"X: " + b"a" * 200_000, 431),
        (HEAD.encode() + b"".join(b"X-%d: 1\r\n" % i for i in range(150)) + b"\r\n", 431),
        (HEAD.encode() + b"".join(b"X-%d: 1\r\n" % i for i in range(200_000)), 431),
    ],
    ids=str,
)
def test_what_is_not_http_gets_the_error_object_and_the_end_of_the_connection(
    request_bytes: bytes, status: int, odd: Server
) -> None:
    sock = odd.connect()
    with contextlib.suppress(ConnectionError):
        sock.sendall(request_bytes)
    if status == 413 or b"X-149" in request_bytes or b"Content-Length: 3" in request_bytes:
        # HTTP as such is right, so the connection stays; its body is never read.
        answer = read_answer(sock)
        sock.close()
    else:
        answer = read_all(sock)
    found, error = error_of(answer)
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert odd.get("/health").status_code == 200


@pytest.fixture(scope="module")
def odd() -> Any:
    with serving() as server:
        yield server


def test_64_mib_in_one_header_do_not_stay_in_memory(odd: Server) -> None:
    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    sock = odd.connect()
    with contextlib.suppress(ConnectionError):
        sock.sendall(HEAD.encode() + b"X: ")
        block = b"a" * 65536
        for _ in range(1024):
            sock.sendall(block)
    assert resident_bytes() - before < 8 << 20
    assert b"431" in read_all(sock)[:20]


def test_http_1_0_is_served_and_closed(odd: Server) -> None:
    sock = odd.connect()
    sock.sendall(b"GET /version HTTP/1.0\r\n\r\n")
    assert b" 200 " in read_all(sock)


def test_pipelined_requests_are_answered_in_order(odd: Server) -> None:
    raw = json.dumps(BODY).encode()
    sock = odd.connect()
    many = GET * 20 + f"{HEAD}Content-Length: {len(raw)}\r\n\r\n".encode() + raw + b"GET /version HTTP/1.1\r\n"
    sock.sendall(many + b"Host: localhost\r\nConnection: close\r\n\r\n")
    answer = read_all(sock)
    assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", answer)] == [200] * 22
    assert answer.index(b"text_completion") < answer.index(b'{"version"')


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_pipelines_and_leaves_is_seen_to_leave(stream: bool) -> None:
    with serving(silent) as server:
        sock = server.post_and_keep("/v1/completions", {**BODY, "stream": stream})
        sock.sendall(GET * 3)
        wait_until(lambda: len(server.engine.in_flight) == 1)
        sock.close()
        wait_until(lambda: server.held() == (0, 0, 0))
        assert len(server.engine.aborted) == 1


def test_what_a_client_pipelines_does_not_pile_up() -> None:
    with serving(silent) as server:
        sock = server.post_and_keep("/v1/completions", BODY)
        wait_until(lambda: len(server.engine.in_flight) == 1)
        sock.settimeout(2.0)
        with pytest.raises(TimeoutError):  # the server has stopped reading, and the sockets are full
            sock.sendall(GET * 1_000_000)
        (connection,) = server.connections
        assert len(connection.conn.trailing_data[0]) < 1 << 20
        sock.close()


def test_a_connection_is_kept_after_an_error(odd: Server) -> None:
    with odd.client() as client:
        for body, status in (({}, 400), (BODY, 200), ({"prompt": []}, 400), (BODY, 200)):
            response = client.post("/v1/completions", json=body)
            assert response.status_code == status
            assert response.headers.get("connection") != "close"
    wait_until(lambda: not odd.connections)


def test_connections_too_many_get_503_and_probes_do_not() -> None:
    with serving(max_connections=3) as server:
        held = [server.connect() for _ in range(3)]
        wait_until(lambda: len(server.connections) == 3)
        refused = server.post("/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "2"
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert server.get("/health/live").status_code == 200
        # Those who are in stay in.
        raw = json.dumps(BODY).encode()
        held[0].sendall(f"{HEAD}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        assert b"200 OK" in held[0].recv(65536)
        for sock in held:
            sock.close()
        wait_until(lambda: not server.connections)
        assert server.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_readers_that_do_not_read_lose_their_request_and_their_connection(stream: bool) -> None:
    """Streams stop when the socket is full; a whole answer waits in memory. Either is given up after `write_s`."""
    tokenizer = byte_tokenizer()
    script = endless(pause_s=0.0) if stream else says(tokenizer, "x" * 400)
    timeouts = Timeouts(write_s=1.0, request_s=PATIENCE_S)
    settings = ApiSettings(("tiny",), timeouts=timeouts, limits=Limits(max_n=128, max_choices=128))
    num_readers, n = (3, 8) if stream else (1, 16)
    body = {**BODY, "stream": stream, "n": n, "max_tokens": 400, "logprobs": 20}
    with serving(script, settings, max_seqs=128, queue=512, send_buffer=1 << 14) as server:
        socks = []
        for _ in range(num_readers):
            sock = socket.socket()
            # Small buffers, so that "full" is soon; set before connecting, or they do not count.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            raw = json.dumps(body).encode()
            sock.sendall(f"{HEAD}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            socks.append(sock)
        wait_until(lambda: len(server.engine.requests) == num_readers * n)
        assert server.get("/health").status_code == 200
        wait_until(lambda: server.held() == (0, 0, 0))
        wait_until(lambda: not server.connections)
        if stream:
            assert len(server.engine.aborted) == 3 * 8
            wait_until(lambda: 'cause="slow_reader",model_name="tiny",stage="running"} 3.0' in metrics_of(server))
        for sock in socks:
            sock.close()


def metrics_of(server: Server) -> str:
    return server.get("/metrics").text


def test_a_slow_reader_that_goes_on_reading_gets_everything() -> None:
    timeouts = Timeouts(write_s=2.0, request_s=PATIENCE_S)
    text = "x" * 400
    with serving(
        says(byte_tokenizer(), text), ApiSettings(("tiny",), timeouts=timeouts), 128, 512, send_buffer=1 << 14
    ) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        raw = json.dumps({**BODY, "n": 16, "max_tokens": 401, "logprobs": 2}).encode()
        sock.sendall(f"{HEAD}Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        answer = b""
        while part := sock.recv(32768):
            answer += part
            time.sleep(0.01)
        choices = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]
        assert [choice["text"] for choice in choices] == [text] * 16
        assert MODEL_LEN > 402


def test_a_half_closed_connection_is_a_client_that_left() -> None:
    with serving(silent) as server:
        sock = server.post_and_keep("/v1/completions", BODY)
        wait_until(lambda: len(server.engine.in_flight) == 1)
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: server.held() == (0, 0, 0))
        assert len(server.engine.aborted) == 1
