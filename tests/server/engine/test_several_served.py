"""Two models in one engine process: each request gets its own model's tokens, also when the process is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.types import Request, Sampling, StepStats
from server.engine.client import EngineClient
from server.engine.config import EngineConfig, EngineState
from server.engine.decoding import default_decoding
from server.engine.offline import Engine
from server.engine.process import COMMAND
from tests.server.engine.fakes import expected, request
from tests.server.engine.test_client import until
from tests.tiny import write_tiny_checkpoint

FAKES = (sys.executable, "-m", "tests.server.engine.fakes")
FAKE_PAIR = EngineConfig(model="ok", step_timeout_s=60.0, also=(EngineConfig(name="b", model="ok"),))


@contextlib.asynccontextmanager
async def engine(
    config: EngineConfig, command: Sequence[str] = FAKES
) -> AsyncIterator[tuple[EngineClient, list[StepStats]]]:
    steps: list[StepStats] = []
    client = await EngineClient.start(config, steps.append, command=command)
    try:
        yield client, steps
    finally:
        await client.shutdown(0)


async def tokens(client: EngineClient, made: Request) -> list[int]:
    deltas = [delta async for delta in client.generate(made)]
    assert deltas[-1].fault is None
    return [token for delta in deltas for token in delta.tokens]


def test_a_killed_engine_comes_back_with_every_stream_at_its_own_model() -> None:
    async def run() -> None:
        async with engine(FAKE_PAIR) as (client, steps):
            assert [model.name for model in client.info.models] == ["", "b"]
            asked = [replace(request(f"r{i}", (i, 3), 60), model="b" if i % 2 else "") for i in range(8)]
            tasks = [asyncio.create_task(tokens(client, made)) for made in asked]
            await until(lambda: {stats.model for stats in steps if stats.step > 8} == {"", "b"})
            assert client.stats.num_running == 8
            assert client.stats.pages_total == 800
            os.kill(client.info.pid, signal.SIGKILL)
            await until(lambda: client.state is EngineState.RESTARTING)
            for made, found in zip(asked, await asyncio.gather(*tasks), strict=True):
                assert found == expected(made.prompt, 60, made.model)
            assert client.restarts == 1

    asyncio.run(run())


def test_an_idle_pair_keeps_its_heart_beating_and_drains() -> None:
    async def run() -> None:
        async with engine(replace(FAKE_PAIR, step_timeout_s=2.0)) as (client, _):
            assert await tokens(client, replace(request("r"), model="b")) == expected((1, 2, 3), 8, "b")
            for _ in range(30):
                await asyncio.sleep(0.1)
                assert client.state is EngineState.READY
            assert client.restarts == 0
            going = [
                asyncio.create_task(tokens(client, replace(request(f"{name}last", (4,), 40), model=name)))
                for name in ("", "b")
            ]
            await asyncio.sleep(0)
            client.begin_drain()
            assert await client.wait_idle(60.0)
            assert [await task for task in going] == [expected((4,), 40, name) for name in ("", "b")]

    asyncio.run(run())


def test_a_model_that_is_not_here_never_leaves_the_front_end() -> None:
    async def run() -> None:
        async with engine(FAKE_PAIR) as (client, _):
            with pytest.raises(ValueError, match="no model 'c'"):
                client.generate(replace(request("r"), model="c"))
            assert client.num_in_flight == 0

    asyncio.run(run())


@pytest.mark.parametrize("family", ["qwen3", "sdar"])
def test_two_real_models_give_the_tokens_that_each_gives_alone(family: str, tmp_path: Path) -> None:
    """Different families and vocabularies, float32, greedy and sampled, prompts in chunks, killed midway. SDAR is not
    autoregressive: one model generates token by token, the other block by block."""
    folders = [
        write_tiny_checkpoint(tmp_path / "llama", "llama"),
        write_tiny_checkpoint(tmp_path / family, family, seed=9, vocab_size=400, num_hidden_layers=3),
    ]
    common = EngineConfig(
        dtype="float32", num_threads=1, max_seqs=8, max_batched_tokens=64, max_model_len=256, progress=False
    )
    first, second = (replace(common, model=str(folder)) for folder in folders)
    pair = replace(first, also=(replace(second, name="b"),), kv_cache_bytes=4 << 20)
    asked = [
        Request(f"r{i}", tuple(range(5 + i, 5 + i + 9 * i + 1)), 24, Sampling(temperature=0.9 * (i % 3), seed=i + 1))
        for i in range(10)
    ]
    alone: dict[str, list[int]] = {}
    for name, config in (("", first), ("b", second)):
        values = {key: getattr(config, key) for key in ("dtype", "num_threads", "max_seqs", "max_model_len")}
        with Engine(config.model, warm_up=False, **values) as offline:
            for made in asked:
                found = offline.generate(
                    [made.prompt],
                    24,
                    stop_ids=(),
                    temperature=made.sampling.temperature,
                    seed=made.sampling.seed,
                )[0]
                alone[f"{name}/{made.id}"] = list(found.tokens)

    async def run() -> None:
        async with engine(pair, COMMAND) as (client, steps):
            assert [model.vocab_size for model in client.info.models] == [320, 400]

            async def everything(kind: str) -> dict[str, list[int]]:
                names = [(name, made) for name in ("", "b") for made in asked]
                how = {model.name: default_decoding(model.diffusion) for model in client.info.models}
                made = [replace(one, id=f"{kind}{name}{one.id}", model=name, decoding=how[name]) for name, one in names]
                found = await asyncio.gather(*(tokens(client, one) for one in made))
                return {f"{name}/{one.id}": out for (name, one), out in zip(names, found, strict=True)}

            assert await everything("crowd") == alone
            both = [stats.model for stats in steps]
            assert min(both.count(""), both.count("b")) > 20
            assert (sum(stats.denoise_tokens for stats in steps if stats.model == "b") > 0) == (family == "sdar")
            assert not any(stats.denoise_tokens for stats in steps if stats.model == "")
            before = len(steps)
            going = asyncio.create_task(everything("killed"))
            deadline = time.monotonic() + 120
            while len(steps) < before + 6:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.002)
            os.kill(client.info.pid, signal.SIGKILL)
            assert await going == alone
            assert client.restarts == 1

    asyncio.run(run())
