"""EngineClient against a real engine process with a fake worker (tests/server/engine/fakes.py): no torch, fast."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.types import Delta, FinishReason, StepStats
from server.engine.client import EngineClient, EngineStartError, EngineUnavailable
from server.engine.config import EngineConfig, EngineState
from tests.server.engine.fakes import expected, request, tokens_of

COMMAND = (sys.executable, "-m", "tests.server.engine.fakes")


@contextlib.asynccontextmanager
async def engine(
    model: str = "ok", step_timeout_s: float = 60.0, on_step: Callable[[StepStats], None] | None = None
) -> AsyncIterator[EngineClient]:
    config = EngineConfig(model=model, step_timeout_s=step_timeout_s)
    client = await EngineClient.start(config, on_step, command=COMMAND)
    try:
        yield client
    finally:
        await client.shutdown(0)


async def collect(client: EngineClient, name: str, prompt: tuple[int, ...], count: int) -> list[Delta]:
    return [delta async for delta in client.generate(request(name, prompt, count))]


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Looks at every turn of the loop: a state that lasts only for a restart cannot be missed."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sockets() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob(f"braid-{os.getpid()}-*")}


def test_concurrent_requests_stream_their_own_tokens_and_end_once() -> None:
    async def run() -> None:
        steps: list[StepStats] = []
        async with engine(on_step=steps.append) as client:
            assert client.state is EngineState.READY
            results = await asyncio.gather(*(collect(client, f"r{i}", (i, 7), 5 + i) for i in range(20)))
            for i, deltas in enumerate(results):
                assert tokens_of(deltas) == expected((i, 7), 5 + i)
                assert [d.finish_reason for d in deltas if d.finish_reason] == [FinishReason.LENGTH]
                assert deltas[-1].times is not None
            assert client.num_in_flight == 0
            assert sum(stats.generated_tokens for stats in steps) == sum(5 + i for i in range(20))

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_streams_go_on_with_the_same_tokens_when_the_engine_is_killed(number: int) -> None:
    async def run() -> None:
        async with engine() as client:
            tasks = [asyncio.create_task(collect(client, f"r{i}", (i, 3), 60)) for i in range(8)]
            await until(lambda: client.stats.step > 20)
            os.kill(client.info.pid, number)
            await until(lambda: client.state is EngineState.RESTARTING)
            with pytest.raises(EngineUnavailable) as caught:
                client.generate(request("new"))
            assert caught.value.retry_after_s
            for i, deltas in enumerate(await asyncio.gather(*tasks)):
                assert tokens_of(deltas) == expected((i, 3), 60)
                assert sum(delta.cached_tokens is not None for delta in deltas) == 1
                assert sum(delta.finish_reason is not None for delta in deltas) == 1
            assert client.restarts == 1
            assert client.state is EngineState.READY

    asyncio.run(run())


def test_a_full_queue_survives_a_crash_whole() -> None:
    """All were accepted over time; the new engine gets them at once, with nothing running yet."""

    async def run() -> None:
        config = EngineConfig(model="slow-50ms", max_seqs=4, max_batched_tokens=64, max_queued_requests=40)
        config = replace(config, max_queued_tokens=64 * 40, queue_timeout_s=None)
        steps: list[StepStats] = []
        client = await EngineClient.start(config, steps.append, command=COMMAND)
        try:
            counts = [20] * 4 + [2] * 40
            tasks = [asyncio.create_task(collect(client, f"r{i}", (i,) * 64, counts[i])) for i in range(4)]
            await until(lambda: any(stats.num_running == 4 and not stats.num_waiting for stats in steps))
            tasks += [asyncio.create_task(collect(client, f"r{i}", (i,) * 64, counts[i])) for i in range(4, 44)]
            await until(lambda: any(stats.num_waiting > 20 for stats in steps))
            os.kill(client.info.pid, signal.SIGKILL)
            for i, deltas in enumerate(await asyncio.gather(*tasks)):
                assert deltas[-1].fault is None
                assert tokens_of(deltas) == expected((i,) * 64, counts[i])
        finally:
            await client.shutdown(0)

    asyncio.run(run())


def test_waiting_too_long_ends_a_stream_with_its_reason() -> None:
    async def run() -> None:
        config = EngineConfig(model="slow-50ms", max_seqs=1, queue_timeout_s=0.3)
        client = await EngineClient.start(config, command=COMMAND)
        try:
            first = asyncio.create_task(collect(client, "first", (1,), 400))
            await until(lambda: client.stats.num_running == 1)
            deltas = await collect(client, "second", (2,), 3)
            assert deltas[-1].fault is not None
            assert deltas[-1].fault.code == "timeout"
            assert not first.done()
            first.cancel()
        finally:
            await client.shutdown(0)

    asyncio.run(run())


def test_a_request_that_was_there_in_three_crashes_fails_and_the_engine_serves_on() -> None:
    async def run() -> None:
        async with engine("slow-200ms") as client:
            task = asyncio.create_task(collect(client, "suspect", (1,), 400))
            for crash in range(3):
                await until(lambda n=crash: client.restarts == n and client.state is EngineState.READY)  # type: ignore[misc]
                os.kill(client.info.pid, signal.SIGKILL)
            deltas = await task
            assert deltas[-1].fault is not None
            assert deltas[-1].fault.status == 500
            await until(lambda: client.state is EngineState.READY)
            assert tokens_of(await collect(client, "next", (5,), 4)) == expected((5,), 4)

    asyncio.run(run())


def test_an_engine_that_keeps_crashing_is_given_up() -> None:
    async def run() -> None:
        async with engine("device-error") as client:

            async def keep_asking() -> None:
                for n in itertools.count():
                    with contextlib.suppress(EngineUnavailable):
                        await collect(client, f"r{n}", (n,), 50)
                    await asyncio.sleep(0.01)

            asking = asyncio.create_task(keep_asking())
            await asyncio.wait_for(client.dead.wait(), 120)
            asking.cancel()
            assert client.state is EngineState.DEAD
            assert "6 engine failures" in client.death_cause
            with pytest.raises(EngineUnavailable):
                client.generate(request("late"))

    asyncio.run(run())


def test_a_silent_loop_is_hung_then_killed_and_its_requests_go_to_a_new_engine() -> None:
    async def run() -> None:
        async with engine("hang", step_timeout_s=1.0) as client:
            pid = client.info.pid
            task = asyncio.create_task(collect(client, "r", (1,), 3 + 3 + 3))
            await until(lambda: client.state is EngineState.HUNG)
            # Its step would take an hour.
            await until(lambda: client.restarts >= 1)
            assert not is_alive(pid)
            task.cancel()

    asyncio.run(run())


def test_closing_cancelling_and_dropping_a_stream_abort_it() -> None:
    async def run() -> None:
        async with engine("slow-50ms") as client:
            closed = client.generate(request("closed", max_tokens=400))
            await closed.__anext__()
            await closed.aclose()
            await closed.aclose()
            task = asyncio.create_task(collect(client, "cancelled", (1,), 400))
            await until(lambda: client.stats.num_running == 1)
            task.cancel()
            queued = [client.generate(request(f"q{i}", (i,), 400)) for i in range(100)]
            for stream in queued:
                stream.close()
            dropped = client.generate(request("dropped", max_tokens=400))
            del dropped
            assert await client.wait_idle(60)
            await collect(client, "last", (9,), 3)
            await until(lambda: client.stats.num_running == client.stats.num_waiting == 0)
            assert client.stats.pages_used == 0

    asyncio.run(run())


def test_a_slow_consumer_gets_everything_merged_and_delays_nobody() -> None:
    async def run() -> None:
        async with engine() as client:
            slow = client.generate(request("slow", (4,), 80))
            fast = await collect(client, "fast", (5,), 100)
            assert tokens_of(fast) == expected((5,), 100)
            deltas = [delta async for delta in slow]
            assert tokens_of(deltas) == expected((4,), 80)
            assert len(deltas) == 1

    asyncio.run(run())


def test_shutdown_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async def run() -> None:
        steps: list[StepStats] = []
        async with engine(on_step=steps.append) as client:
            pid = client.info.pid
            task = asyncio.create_task(collect(client, "r", (1,), 60))
            await until(lambda: len(steps) > 0)
            client.begin_drain()
            assert client.state is EngineState.DRAINING
            with pytest.raises(EngineUnavailable):
                client.generate(request("new"))
            await client.shutdown(60)
            assert tokens_of(await task) == expected((1,), 60)
            assert not is_alive(pid)
            assert not sockets()

    asyncio.run(run())


def test_shutdown_without_patience_ends_streams_with_a_fault() -> None:
    async def run() -> None:
        async with engine("slow-200ms") as client:
            task = asyncio.create_task(collect(client, "r", (1,), 400))
            await until(lambda: client.stats.num_running == 1)
            started_at = time.monotonic()
            await client.shutdown(0)
            assert time.monotonic() - started_at < 0.2 * 400 / 2
            fault = (await task)[-1].fault
            assert fault is not None
            assert fault.status == 503

    asyncio.run(run())


@pytest.mark.parametrize(
    ("model", "message"),
    [("bad-start", "no such model 'bad-start'"), ("die-at-start", "the engine process ended with code 9")],
)
def test_a_failed_start_is_one_line_and_leaves_nothing_behind(model: str, message: str) -> None:
    async def run() -> None:
        with pytest.raises(EngineStartError, match=message):
            await asyncio.wait_for(EngineClient.start(EngineConfig(model=model), command=COMMAND), 60)
        assert not sockets()

    asyncio.run(run())


PARENT = """
import asyncio, sys
from server.engine.client import EngineClient
from server.engine.config import EngineConfig
async def main():
    client = await EngineClient.start(EngineConfig(model="ok"), command={command!r})
    print(client.info.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_the_engine_ends_when_its_parent_is_killed() -> None:
    async def run() -> None:
        code = PARENT.format(command=COMMAND)
        parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
        assert parent.stdout is not None
        pid = int(await parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        await parent.wait()
        await until(lambda: not is_alive(pid))

    asyncio.run(run())
