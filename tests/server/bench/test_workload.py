import asyncio
import itertools
import statistics

import pytest

from server.bench.client import BenchError
from server.bench.workload import Server, Workload, arrival_times, make_prompts, probe, request_body
from tests.server.bench.fake_server import FakeServer

IDS = Server("m", takes_token_ids=True, tokens_per_word=1.0)


def probed(fake: FakeServer, workload: Workload | None = None, model: str | None = None) -> Server:
    async def run() -> Server:
        async with fake.running() as target:
            return await probe(target, workload or Workload(), model)

    return asyncio.run(run())


def test_the_probe_finds_model_context_and_that_token_ids_are_taken() -> None:
    assert probed(FakeServer()) == Server("fake", True, 1.0, 4096)


def test_the_probe_measures_tokens_per_word_where_only_text_is_taken() -> None:
    server = probed(FakeServer(takes_token_ids=False))
    assert not server.takes_token_ids
    assert server.tokens_per_word == pytest.approx(2.0)
    (prompt,) = make_prompts(Workload(input_len=100), server, 1)
    assert isinstance(prompt, str)
    assert len(prompt.split()) == 50


def test_chat_prompts_are_text() -> None:
    assert not probed(FakeServer(), Workload(is_chat=True)).takes_token_ids
    body = request_body(Workload(is_chat=True), "m", "hello")
    assert body["messages"] == [{"role": "user", "content": "hello"}]


def test_a_server_that_refuses_everything_is_reported_in_its_own_words() -> None:
    with pytest.raises(BenchError, match="refused with 404"):
        probed(FakeServer(refuse=dict.fromkeys(range(9), 404)))


def test_prompts_have_the_asked_length_and_share_only_the_asked_prefix() -> None:
    prompts = make_prompts(Workload(input_len=100, prefix_share=0.4), IDS, 3)
    assert [len(prompt) for prompt in prompts] == [100] * 3
    assert prompts[0][:40] == prompts[1][:40] == prompts[2][:40]
    assert prompts[0][40:60] != prompts[1][40:60]


def test_one_seed_gives_one_workload() -> None:
    assert make_prompts(Workload(seed=7), IDS, 4) == make_prompts(Workload(seed=7), IDS, 4)
    assert make_prompts(Workload(seed=7), IDS, 1) != make_prompts(Workload(seed=8), IDS, 1)
    assert arrival_times(5, 2.0, 7) == arrival_times(5, 2.0, 7)


def test_poisson_arrivals_have_the_asked_rate_and_the_exponential_spread() -> None:
    times = arrival_times(20_000, rate=50.0, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)


def test_extra_fields_of_the_body_win() -> None:
    body = request_body(Workload(extra=(("top_k", 5), ("temperature", 0.5))), "m", [1])
    assert (body["top_k"], body["temperature"], body["ignore_eos"]) == (5, 0.5, True)
    assert "ignore_eos" not in request_body(Workload(ignore_eos=False), "m", [1])
