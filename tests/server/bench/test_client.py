import asyncio

import pytest

from server.bench.client import BenchError, Sample, Target, get_json, stream
from tests.server.bench.fake_server import FakeServer

BODY = {"prompt": [1, 2, 3], "max_tokens": 5}


def one(fake: FakeServer, body: dict[str, object] | None = None, timeout_s: float = 10.0) -> Sample:
    async def run() -> Sample:
        async with fake.running() as target:
            return await stream(target, "/v1/completions", body or BODY, timeout_s)

    return asyncio.run(run())


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_stream_is_timed_token_by_token_under_either_framing(is_chunked: bool) -> None:
    sample = one(FakeServer(gap_s=0.02, is_chunked=is_chunked))
    assert sample.is_complete
    assert (sample.prompt_tokens, sample.output_tokens, sample.finish_reason) == (3, 5, "length")
    assert len(sample.event_times) == 5
    assert len(sample.gaps) == 4
    assert sample.ttft >= 0.02
    assert all(gap > 0.01 for gap in sample.gaps)
    assert sample.tpot == pytest.approx(sum(sample.gaps) / 4)


def test_events_are_counted_when_the_server_reports_no_usage() -> None:
    sample = one(FakeServer(counts_tokens=False))
    assert (sample.output_tokens, sample.is_counted) == (5, False)


@pytest.mark.parametrize(("counts_tokens", "counts"), [(True, [2, 4, 5]), (False, [1, 2, 3])])
def test_it_is_known_how_many_tokens_had_arrived_when(counts_tokens: bool, counts: list[int]) -> None:
    sample = one(FakeServer(counts_tokens=counts_tokens, bursts={"m": 2}), BODY | {"model": "m"})
    assert sample.event_tokens == counts
    first, second, _ = sample.event_times
    moments = [sample.sent, first, second, (first + second) / 2, sample.finished]
    assert [sample.tokens_by(moment) for moment in moments] == [0, counts[0], counts[1], counts[0], counts[-1]]


def test_a_refusal_keeps_its_status_and_the_servers_words() -> None:
    sample = one(FakeServer(refuse={0: 429}))
    assert (sample.status, sample.error, sample.is_complete) == (429, "refused with 429", False)


def test_a_stream_cut_midway_is_an_error_and_never_a_short_answer() -> None:
    for is_chunked in (True, False):
        sample = one(FakeServer(cut_after=2, is_chunked=is_chunked))
        assert sample.status == 200
        assert not sample.is_complete
        assert sample.error


def test_a_server_that_stops_talking_is_a_timeout() -> None:
    sample = one(FakeServer(gap_s=30.0), timeout_s=0.2)
    assert sample.error == "no complete answer within 0.2 s"


def test_nobody_listening_is_a_failed_sample_and_a_plain_sentence_from_get() -> None:
    target = Target("127.0.0.1", 9)
    sample = asyncio.run(stream(target, "/v1/completions", BODY, 5.0))
    assert sample.status == 0
    assert "Connect" in (sample.error or "")
    with pytest.raises(BenchError, match=r"nothing answers at http://127\.0\.0\.1:9"):
        asyncio.run(get_json(target, "/v1/models"))


def test_urls_are_read_as_openai_clients_write_them() -> None:
    assert Target.parse("http://127.0.0.1:8000/v1") == Target("127.0.0.1", 8000)
    assert Target.parse("localhost:81/engine/v1/") == Target("localhost", 81, prefix="/engine")
    assert Target.parse("https://host").port == 443
    with pytest.raises(BenchError, match="--url is 'ftp://x'"):
        Target.parse("ftp://x")


def test_the_key_goes_into_the_request() -> None:
    fake = FakeServer()

    async def run() -> None:
        async with fake.running() as target:
            await stream(Target(target.host, target.port, api_key="secret"), "/v1/completions", BODY, 5.0)

    asyncio.run(run())
    assert "Authorization: Bearer secret" in fake.headers[0]
