import asyncio

import pytest

from server.bench.client import Sample
from server.bench.load import closed_loop, open_loop
from server.bench.workload import Server, Workload, arrival_times, make_prompts
from tests.server.bench.fake_server import FakeServer

SERVER = Server("fake", takes_token_ids=True, tokens_per_word=1.0)
WORK = Workload(input_len=8, output_len=3)


def test_the_closed_loop_keeps_exactly_the_asked_number_in_flight() -> None:
    fake = FakeServer(gap_s=0.01)

    async def run() -> list[Sample]:
        async with fake.running() as target:
            return await closed_loop(target, WORK, SERVER, make_prompts(WORK, SERVER, 20), 4, 10.0)

    samples = asyncio.run(run())
    assert len(samples) == 20
    assert all(sample.is_complete for sample in samples)
    assert fake.most_in_flight == 4


def test_the_open_loop_sends_on_time_whether_or_not_answers_came() -> None:
    fake = FakeServer(gap_s=0.2)
    prompts = make_prompts(WORK, SERVER, 20)

    async def run() -> list[Sample]:
        async with fake.running() as target:
            return await open_loop(target, WORK, SERVER, prompts, 100.0, 10.0)

    samples = asyncio.run(run())
    assert all(sample.is_complete for sample in samples)
    assert fake.most_in_flight > 15, "a slow server must not slow the sending"
    sent = sorted(sample.sent for sample in samples)
    due = arrival_times(20, 100.0, WORK.seed)
    assert sent[-1] - sent[0] == pytest.approx(due[-1], abs=0.1)


def test_refused_requests_do_not_stop_the_others() -> None:
    fake = FakeServer(refuse={1: 429, 2: 503})

    async def run() -> list[Sample]:
        async with fake.running() as target:
            return await closed_loop(target, WORK, SERVER, make_prompts(WORK, SERVER, 6), 1, 10.0)

    assert [sample.status for sample in asyncio.run(run())] == [200, 429, 503, 200, 200, 200]


def test_an_interrupted_run_keeps_what_it_measured() -> None:
    fake = FakeServer(gap_s=0.02)

    async def run() -> list[Sample]:
        async with fake.running() as target:
            prompts = make_prompts(WORK, SERVER, 10_000)
            task = asyncio.create_task(closed_loop(target, WORK, SERVER, prompts, 2, 10.0))
            while len(fake.bodies) < 7:  # noqa: ASYNC110 - polls a plain list, no event to wait on
                await asyncio.sleep(0.005)
            task.cancel()
            return await task

    assert 4 <= len(asyncio.run(run())) <= 8
