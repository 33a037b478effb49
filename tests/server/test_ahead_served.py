"""Steps launched ahead in real engine processes, on a CPU, where they gain nothing: the tokens are those of `off`, in a
crowd of requests of all kinds, preempted, and with the engine killed midway. The embedded model, float32."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import replace

import pytest

from scheduler.policies import make_diffusion
from scheduler.types import (
    Grammar,
    GrammarKind,
    Request,
    Sampling,
    Speculation,
    SpeculationMode,
    StepStats,
    Topology,
)
from server.engine.client import EngineClient
from server.engine.config import SpeculationConfig
from server.engine.offline import Engine
from tests.server.test_exactness import BYTES_PER_PAGE, CONFIG, PLAIN, engine, tokens

AHEAD = replace(CONFIG, async_scheduling="on", speculation=SpeculationConfig(mode="auto"))
NUM_OUT = 24
KINDS = (Sampling(temperature=0.0), Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.9, top_k=50))
DIGITS = Grammar(GrammarKind.REGEX, "[0-9]{40}")


def plain_requests() -> list[Request]:
    """Half of them end by a stop id that the model likes, and some share two pages."""
    rng = random.Random(21)
    shared = tuple(rng.randrange(5, 4000) for _ in range(70))
    made = []
    for i in range(16):
        own = tuple(rng.randrange(5, 4000) for _ in range(rng.randrange(1, 60)))
        sampling = replace(KINDS[i % 3], seed=rng.getrandbits(63), sample_index=i % 3)
        stops = tuple(rng.randrange(5, 4000) for _ in range(200)) if i % 2 else ()
        made.append(Request(f"r{i}", shared + own[:20] if i % 5 == 0 else own, NUM_OUT, sampling, stops))
    return made


def mixed_requests() -> list[Request]:
    """With drafts, denoised, penalised, constrained, with log-probabilities; the plain ones outlive them."""
    drafted = Speculation(SpeculationMode.ON)
    denoised = make_diffusion("threshold", Topology.BLOCK_CAUSAL)
    few = [replace(request, id=f"m{i}", max_tokens=NUM_OUT // 3) for i, request in enumerate(plain_requests()[:5])]
    penalised = replace(few[2].sampling, repetition_penalty=1.2, frequency_penalty=0.5)
    return [
        replace(few[0], speculation=drafted),
        replace(few[1], decoding=denoised, stop_ids=()),
        replace(few[2], sampling=penalised),
        replace(few[3], sampling=replace(few[3].sampling, grammar=DIGITS)),
        replace(few[4], sampling=replace(few[4].sampling, logprobs=3)),
        *plain_requests()[5:9],
    ]


async def crowd(client: EngineClient, asked: list[Request], run: str) -> list[tuple[int, ...]]:
    return list(await asyncio.gather(*(tokens(client, request, run) for request in asked)))


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[int, ...]]:
    async def run() -> dict[str, tuple[int, ...]]:
        async with engine(replace(PLAIN, async_scheduling="off")) as (client, steps):
            every = [*plain_requests(), *mixed_requests()]
            found = {request.id: await tokens(client, request, "alone") for request in every}
            assert not any(stats.is_ahead for stats in steps)
            return found

    return asyncio.run(run())


def share(steps: list[StepStats]) -> float:
    return sum(stats.is_ahead for stats in steps) / len(steps)


def test_launched_ahead_no_token_changes_and_neither_with_an_engine_killed_midway(
    alone: dict[str, tuple[int, ...]],
) -> None:
    asked = plain_requests()
    right = [alone[request.id] for request in asked]
    assert len({len(output) for output in right}) > 2, "nobody was stopped early"

    async def run() -> None:
        async with engine(AHEAD) as (client, steps):
            assert await crowd(client, asked, "crowd") == right
            assert share(steps) > 0.3
            assert sum(stats.num_surplus for stats in steps) > 0
            before = client.stats.step
            going = asyncio.create_task(crowd(client, asked, "killed"))
            async with asyncio.timeout(300):
                while client.stats.step < before + 6:  # noqa: ASYNC110 -- steps come by callback
                    await asyncio.sleep(0.002)
            assert not going.done()
            os.kill(client.info.pid, signal.SIGKILL)
            assert await going == right
            assert client.restarts == 1

    asyncio.run(run())


def test_preemption_changes_no_token_of_steps_launched_ahead(alone: dict[str, tuple[int, ...]]) -> None:
    asked = plain_requests()

    async def run() -> None:
        async with engine(replace(AHEAD, kv_cache_bytes=12 * BYTES_PER_PAGE)) as (client, steps):
            assert await crowd(client, asked, "preempted") == [alone[request.id] for request in asked]
            assert sum(stats.num_preempted for stats in steps) > 0
            assert share(steps) > 0.1

    asyncio.run(run())


def test_a_mixed_crowd_falls_back_step_by_step_and_changes_no_token(alone: dict[str, tuple[int, ...]]) -> None:
    asked = mixed_requests()

    async def run() -> None:
        async with engine(replace(AHEAD, speculation=SpeculationConfig(mode="on"))) as (client, steps):
            assert await crowd(client, asked, "mixed") == [alone[request.id] for request in asked]
            assert sum(stats.denoise_tokens for stats in steps) > 0
            assert 0 < share(steps) < 1

    asyncio.run(run())


def test_in_this_process_the_same_text_comes_step_by_step() -> None:
    prompts = ["sort: 7 3 9 ->", "def f(n):", "1 2 3 4"]
    texts = []
    for switch in ("off", "on"):
        with Engine(dtype="float32", max_seqs=4, async_scheduling=switch) as offline:
            found = offline.generate(prompts, 12, temperature=1.0, seeds=[1, 2, 3])
            stopped = offline.generate(prompts, 12, [found[0].text[3:5]], temperature=1.0, seeds=[1, 2, 3])
            texts.append([choice.text for choice in (*found, *stopped)])
            assert offline._core.stats().pages_used == 0
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="async-scheduling is 'maybe'"):
        Engine(async_scheduling="maybe")
