"""2,000 requests to a real server, half of the sockets cut at a random moment: nothing may stay behind (R-13)."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import urllib.request
from urllib.parse import urlsplit

from server.bench.spawn import spawned_server

NUM_REQUESTS = 2000
IN_FLIGHT = 48
PATIENCE_S = 300.0
CANARY = {"model": "braid-tiny", "prompt": "sort: 7 3 9 ->", "max_tokens": 12, "temperature": 0}
GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "braid_admission_requests",
)


def post(url: str, body: dict[str, object]) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text


def gauges(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE_S) as response:
        page = response.read().decode()
    found = {name: re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", page, re.M) for name in GAUGES}
    return {name: float(match[1]) for name, match in found.items() if match}


async def call(host: str, port: int, rng: random.Random) -> int:
    """One request; half of them leave after a random time. The status, or 0 for one that left before it had any."""
    body = json.dumps(
        {
            "model": "braid-tiny",
            "prompt": [rng.randrange(5, 4000) for _ in range(rng.randrange(1, 80))],
            "max_tokens": rng.randrange(1, 60),
            "stream": rng.random() < 0.5,
            "n": rng.choice((1, 1, 1, 2)),
            "ignore_eos": True,
        }
    ).encode()
    patience_s = rng.uniform(0.0, 0.6) if rng.random() < 0.5 else PATIENCE_S
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = b""
    try:
        async with asyncio.timeout(patience_s):
            answer = await reader.readline()
            await reader.read()
    except TimeoutError:
        assert patience_s < PATIENCE_S, "a request that stayed was not answered"
    finally:
        writer.close()
    return int(answer.split()[1]) if answer else 0


async def storm(host: str, port: int) -> list[int]:
    rng = random.Random(7)
    seats = asyncio.Semaphore(IN_FLIGHT)

    async def seated(seed: int) -> int:
        async with seats:
            return await call(host, port, random.Random(seed))

    return await asyncio.gather(*(seated(rng.getrandbits(32)) for _ in range(NUM_REQUESTS)))


def test_a_storm_of_cut_sockets_leaves_nothing_behind() -> None:
    with spawned_server("--config configs/embedded.yaml") as url:
        before = post(url, CANARY)
        address = urlsplit(url)
        statuses = asyncio.run(storm(address.hostname or "", address.port or 0))
        assert set(statuses) <= {0, 200, 429}
        assert statuses.count(200) >= NUM_REQUESTS // 3
        deadline = time.monotonic() + PATIENCE_S
        while any(gauges(url).values()) and time.monotonic() < deadline:
            # A gauge moves with the next engine message: one more small request brings it.
            post(url, CANARY)
        left = gauges(url)
        assert set(left) == set(GAUGES)
        assert not any(left.values()), left
        assert post(url, CANARY) == before
