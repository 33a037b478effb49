"""The event loop of a real server stays free while clients do their worst (S-40, R-07): 2 MiB prompts, bodies that are
slow to parse, readers that do not read. Measured by the server's own lag metric.

A neighbour on the same cores delays the loop too, which is not the server's doing: beside the server a process of our
own sleeps and wakes just as often, and what it suffers is granted. The best of three rounds counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from urllib.parse import urlsplit

from server.bench.spawn import spawned_server

SIZE = (2 << 20) - 100
ROUND_S, ROUNDS = 4.0, 3
TARGET_S = 0.05

CONTROL = """
import sys, time
lags = []
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    before = time.monotonic()
    time.sleep(0.05)
    lags.append(time.monotonic() - before - 0.05)
print(sorted(lags)[int(0.99 * len(lags))])
"""


def filled(item: str) -> bytes:
    return ('{"prompt":[' + ",".join([item] * (SIZE // (len(item) + 1))) + "]}").encode()


def with_field(**fields: object) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 2, **fields}).encode()


BODIES = (
    with_field(prompt="word " * (SIZE // 5)),
    with_field(prompt="def f(x): return [12] " * (SIZE // 25), truncate_prompt_tokens=50),
    with_field(prompt="a" * SIZE, truncate_prompt_tokens=50),
    *map(filled, ("1", "0.1", '"a"', "[]", "null", '{"a":1}')),
    filled("1")[:-2] + b",NaN]}",
    b'{"a":' * (SIZE // 5),
    with_field(logit_bias={str(i): 1 for i in range(100_000)}),
    with_field(bad_words=["x"] * 300_000),
    with_field(messages=[{"role": "user", "content": "x"}] * 30_000),
)


async def send(host: str, port: int, body: bytes) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        status = int((await reader.readline()).split()[1])
        await reader.read()
    finally:
        writer.close()
    return status


async def never_read(host: str, port: int) -> None:
    """Streams whose client takes nothing."""
    body = with_field(prompt="a", max_tokens=1500, n=4, ignore_eos=True, stream=True, logprobs=5)
    reader, writer = await asyncio.open_connection(host, port, limit=1)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    try:
        await asyncio.sleep(600)
    finally:
        writer.close()


async def attack(url: str) -> set[int]:
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 0
    end = asyncio.get_running_loop().time() + ROUND_S
    bodies = iter(BODIES * 1000)
    statuses = set()

    async def one() -> None:
        while asyncio.get_running_loop().time() < end:
            statuses.add(await send(host, port, next(bodies)))

    readers = [asyncio.create_task(never_read(host, port)) for _ in range(4)]
    await asyncio.gather(*(one() for _ in range(8)))
    for task in readers:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return statuses


def lag_buckets(url: str) -> dict[float, float]:
    """Upper bound in seconds -> observations up to it."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        page = response.read().decode()
    found = re.findall(r'^braid_event_loop_lag_seconds_bucket{le="([^"]+)"[^}]*} (\S+)$', page, re.M)
    return {float(bound): float(count) for bound, count in found}


def round_of_attack(url: str) -> tuple[float, float]:
    """(p99 of the server's lag, rounded up to a bucket's bound; p99 of the control's)"""
    with subprocess.Popen([sys.executable, "-c", CONTROL, str(ROUND_S)], stdout=subprocess.PIPE, text=True) as control:
        before = lag_buckets(url)
        statuses = asyncio.run(attack(url))
        after = lag_buckets(url)
        granted = float(control.communicate()[0])
    assert statuses <= {200, 400, 429}, statuses
    counts = {bound: after[bound] - before[bound] for bound in after}
    total = counts[float("inf")]
    return min(bound for bound in counts if counts[bound] >= 0.99 * total - 1), granted


def test_the_event_loop_is_never_late_while_clients_do_their_worst() -> None:
    rounds = []
    with spawned_server("--speculation off") as url:
        for _ in range(ROUNDS):
            lag_s, granted_s = round_of_attack(url)
            rounds.append((lag_s, granted_s))
            # The control is idle between its wakes, the loop is not: under a crowded machine it waits for its turn too.
            if lag_s <= TARGET_S + 20 * granted_s:
                break
        else:
            raise AssertionError(f"p99 of the lag, and of the control's, in seconds: {rounds}")
        body = json.dumps({"prompt": "sort: 7 3 9 ->", "max_tokens": 12, "temperature": 0}).encode()
        address = urlsplit(url)
        assert asyncio.run(send(address.hostname or "", address.port or 0, body)) == 200
    print(f"p99 of the event loop's lag under attack <= {lag_s * 1000:g} ms (control: {granted_s * 1000:.2g} ms)")
