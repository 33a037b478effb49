"""The signature, in one place: 32 seeded requests give the same tokens alone and without drafts as with drafts in a
crowd, cut into chunks of 16, preempted, and with the engine killed midway. Real engine processes, the embedded model,
float32 on a CPU (R4, R5)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from scheduler.types import Request, Sampling, Speculation, SpeculationMode, StepStats
from server.engine.client import EngineClient
from server.engine.config import EngineConfig, SpeculationConfig

CONFIG = EngineConfig(
    model="braid-tiny",
    dtype="float32",
    max_model_len=256,
    max_seqs=32,
    progress=False,
    speculation=SpeculationConfig(mode="on"),
)
PLAIN = replace(CONFIG, enable_prefix_caching=False, speculation=SpeculationConfig(mode="off"))
NUM_OUT = 40
BYTES_PER_PAGE = 4 * 2 * 2 * 64 * 4 * 32  # layers x (K and V) x KV heads x head_dim x float32 x tokens of a page


def requests() -> list[Request]:
    """Greedy, sampled, truncated, penalised; prompts of 1 to 90 tokens, some sharing a prefix of two pages."""
    rng = random.Random(3)
    shared = tuple(rng.randrange(5, 4000) for _ in range(70))
    kinds = (
        Sampling(temperature=0.0),
        Sampling(temperature=1.0),
        Sampling(temperature=0.8, top_p=0.9, top_k=50),
        Sampling(temperature=1.2, min_p=0.02, repetition_penalty=1.1, frequency_penalty=0.5),
    )
    made = []
    for i in range(32):
        own = tuple(rng.randrange(5, 4000) for _ in range(rng.randrange(1, 91)))
        prompt = shared + own[:20] if i % 5 == 0 else own
        made.append(
            Request(
                f"r{i}",
                prompt,
                NUM_OUT,
                replace(kinds[i % 4], seed=rng.getrandbits(63), sample_index=i % 3),
                # All that is offered: what pays depends on the machine, and drafts must be met here.
                speculation=Speculation(SpeculationMode.ON),
            )
        )
    return made


@contextlib.asynccontextmanager
async def engine(config: EngineConfig) -> AsyncIterator[tuple[EngineClient, list[StepStats]]]:
    steps: list[StepStats] = []
    client = await EngineClient.start(config, steps.append)
    try:
        yield client, steps
    finally:
        await client.shutdown(0)


async def tokens(client: EngineClient, request: Request, run: str) -> tuple[int, ...]:
    deltas = [delta async for delta in client.generate(replace(request, id=f"{run}-{request.id}"))]
    assert deltas[-1].fault is None
    return tuple(token for delta in deltas for token in delta.tokens)


async def crowd(client: EngineClient, run: str) -> list[tuple[int, ...]]:
    return list(await asyncio.gather(*(tokens(client, request, run) for request in requests())))


@pytest.fixture(scope="module")
def alone() -> list[tuple[int, ...]]:
    async def run() -> list[tuple[int, ...]]:
        async with engine(PLAIN) as (client, _):
            return [await tokens(client, request, "alone") for request in requests()]

    found = asyncio.run(run())
    assert all(len(output) == NUM_OUT for output in found)
    assert len(set(found)) == len(found)
    return found


def test_a_crowd_changes_no_token_and_neither_does_an_engine_killed_midway(alone: list[tuple[int, ...]]) -> None:
    async def run() -> None:
        # A loose target lets all prompts in within a few steps, so that the crowd really is one.
        async with engine(replace(CONFIG, tbt_slo_s=5.0)) as (client, steps):
            assert await crowd(client, "crowd") == alone
            assert max(stats.num_running for stats in steps) == 32
            assert sum(stats.accepted_tokens for stats in steps) > 0
            assert await crowd(client, "hits") == alone
            assert sum(stats.prefix_hits for stats in steps) > 0
            before = client.stats.step
            going = asyncio.create_task(crowd(client, "killed"))
            # No later: drafts from what the runs before wrote may end the whole crowd in eight steps.
            async with asyncio.timeout(300):
                while client.stats.step < before + 4:  # noqa: ASYNC110 -- steps come by callback
                    await asyncio.sleep(0.002)
            assert not going.done()
            os.kill(client.info.pid, signal.SIGKILL)
            assert await going == alone
            assert client.restarts == 1

    asyncio.run(run())


def test_chunks_of_16_change_no_token(alone: list[tuple[int, ...]]) -> None:
    async def run() -> None:
        async with engine(replace(CONFIG, max_seqs=8, max_batched_tokens=16)) as (client, steps):
            assert await crowd(client, "chunks") == alone
            assert max(stats.prefill_tokens for stats in steps) <= 16
            assert sum(stats.accepted_tokens for stats in steps) > 0

    asyncio.run(run())


def test_preemption_changes_no_token(alone: list[tuple[int, ...]]) -> None:
    async def run() -> None:
        async with engine(replace(CONFIG, kv_cache_bytes=20 * BYTES_PER_PAGE)) as (client, steps):
            assert await crowd(client, "preempted") == alone
            assert sum(stats.num_preempted for stats in steps) > 0

    asyncio.run(run())
