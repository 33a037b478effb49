"""The signature with every way of decoding in one batch: 64 requests, autoregressive, speculative and denoised by
different policies, give the same tokens alone as in a crowd, in small steps, preempted, and with the engine killed
midway. Real engine processes, the embedded dual-mode model, float32 on a CPU (R4, R5)."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import replace

import pytest

from scheduler.policies import make_diffusion
from scheduler.types import Request, Sampling, Speculation, SpeculationMode, StepStats, Topology
from server.engine.client import EngineClient
from tests.server.test_exactness import BYTES_PER_PAGE, CONFIG, PLAIN, engine, tokens

CROWD = replace(CONFIG, max_seqs=64, max_queued_tokens=8192)
POLICIES = (
    *("auto", "threshold", "sequential", "low_confidence", "random", "origin", "maskgit_plus", "factor", "localleap"),
    *("dparallel", "entropy_bounded", "sdar_dynamic", "hierarchy", "wino", "prophet", "adablock", "dsb"),
    *("fast_dllm_v2", "fast_dllm_v2_cache"),
)
NUM_OUT = 28
DRAFTED = Speculation(SpeculationMode.ON)
PLAINLY = Speculation(SpeculationMode.OFF)


def requests() -> list[Request]:
    """A third is generated token by token, half of that with drafts; the rest is denoised. Some share two pages."""
    rng = random.Random(11)
    shared = tuple(rng.randrange(5, 4000) for _ in range(70))
    kinds = (Sampling(temperature=0.0), Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.9, top_k=50))
    penalised = Sampling(temperature=1.2, min_p=0.02, repetition_penalty=1.1, frequency_penalty=0.5)
    made = []
    for i in range(64):
        own = tuple(rng.randrange(5, 4000) for _ in range(rng.randrange(1, 60)))
        policy = None if i % 3 == 0 else POLICIES[i % len(POLICIES)]
        decoding = None
        if policy is not None:
            decoding = make_diffusion(
                policy, Topology.BLOCK_CAUSAL, delimiters=(203, 10) if policy == "adablock" else ()
            )
        made.append(
            Request(
                f"r{i}",
                shared + own[:20] if i % 5 == 0 else own,
                NUM_OUT,
                replace((*kinds, penalised)[i % 4], seed=rng.getrandbits(63), sample_index=i % 3),
                speculation=DRAFTED if i % 2 else PLAINLY,
                decoding=decoding,
            )
        )
    return made


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


def were_mixed(steps: list[StepStats]) -> bool:
    """Some step held decodes, denoise rows and drafts at once."""
    return any(stats.decode_tokens and stats.denoise_tokens and stats.draft_tokens for stats in steps)


def test_a_mixed_crowd_changes_no_token_and_neither_does_an_engine_killed_midway(alone: list[tuple[int, ...]]) -> None:
    async def run() -> None:
        async with engine(replace(CROWD, tbt_slo_s=5.0)) as (client, steps):
            assert await crowd(client, "crowd") == alone
            assert max(stats.num_running for stats in steps) == 64
            assert were_mixed(steps)
            before = client.stats.step
            going = asyncio.create_task(crowd(client, "killed"))
            async with asyncio.timeout(300):
                while client.stats.step < before + 6:  # noqa: ASYNC110 -- steps come by callback
                    await asyncio.sleep(0.002)
            assert not going.done()
            os.kill(client.info.pid, signal.SIGKILL)
            assert await going == alone
            assert client.restarts == 1

    asyncio.run(run())


def test_small_steps_change_no_token_of_a_mixed_crowd(alone: list[tuple[int, ...]]) -> None:
    async def run() -> None:
        async with engine(replace(CROWD, max_seqs=16, max_batched_tokens=24)) as (client, steps):
            assert await crowd(client, "small") == alone
            assert max(stats.prefill_tokens for stats in steps) <= 24

    asyncio.run(run())


def test_preemption_changes_no_token_of_a_mixed_crowd(alone: list[tuple[int, ...]]) -> None:
    async def run() -> None:
        async with engine(replace(CROWD, kv_cache_bytes=24 * BYTES_PER_PAGE)) as (client, steps):
            assert await crowd(client, "preempted") == alone
            assert sum(stats.num_preempted for stats in steps) > 0
            assert were_mixed(steps)

    asyncio.run(run())
