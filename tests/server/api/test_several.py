"""Two models behind one API: each request is judged, counted and admitted by the facts of the model that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from scheduler.types import Delta, Request
from server.api.app import Application, create_app
from server.api.settings import ApiSettings
from server.metrics import Metrics
from tests.server.api.fake_engine import MODEL_LEN, FakeEngine, byte_tokenizer, says, silent

SMALL_LEN = 32


def pair() -> tuple[Application, FakeEngine]:
    """`tiny` with a chat template; `b` without one, with a short context, a place for one request and no queue."""
    tokenizer = byte_tokenizer()
    engine = FakeEngine(tokenizer)
    small = replace(engine.info, name="b", model_len=SMALL_LEN, max_seqs=1, max_queued_requests=0)
    engine.info = replace(engine.info, drafters=(("suffix", False),), also=(small,))
    first = Metrics("tiny", MODEL_LEN)
    others = [("b", byte_tokenizer(None), Metrics("b", SMALL_LEN, beside=first))]
    return create_app(ApiSettings(("tiny", "alias")), engine, tokenizer, first, others), engine


def talk(run: Callable[[httpx.AsyncClient, Application, FakeEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        app, engine = pair()
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await run(client, app, engine)

    asyncio.run(main())


async def complete(client: httpx.AsyncClient, model: str | None, **fields: Any) -> httpx.Response:
    body = {"prompt": "hi", "max_tokens": 4, **fields} | ({} if model is None else {"model": model})
    return await client.post("/v1/completions", json=body)


@pytest.mark.parametrize(
    ("asked", "sent", "echoed"), [("b", "b", "b"), ("tiny", "", "tiny"), ("alias", "", "tiny"), (None, "", "tiny")]
)
def test_the_engine_is_told_which_model_by_its_own_name(asked: str | None, sent: str, echoed: str) -> None:
    async def run(client: httpx.AsyncClient, app: Application, engine: FakeEngine) -> None:
        answer = await complete(client, asked)
        assert (answer.status_code, answer.json()["model"]) == (200, echoed)
        assert [request.model for request in engine.requests] == [sent]
        registry = app.services.metrics.registry
        for name in ("tiny", "b"):
            labels = {"model_name": name, "finished_reason": "length"}
            assert registry.get_sample_value("vllm:request_success_total", labels) == (name == echoed)

    talk(run)


def test_context_template_and_drafters_are_those_of_the_model_named() -> None:
    async def run(client: httpx.AsyncClient, _: Application, engine: FakeEngine) -> None:
        long = "x" * (SMALL_LEN + 1)
        assert (await complete(client, "tiny", prompt=long)).status_code == 200
        refused = await complete(client, "b", prompt=long)
        assert refused.status_code == 400
        assert f"maximum context length is {SMALL_LEN} tokens" in refused.json()["error"]["message"]
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        assert (await client.post("/v1/chat/completions", json={"model": "tiny", **chat})).status_code == 200
        refused = await client.post("/v1/chat/completions", json={"model": "b", **chat})
        assert refused.json()["error"]["code"] == "no_chat_template"
        on = {"speculation": {"mode": "on"}}
        assert (await complete(client, "tiny", **on)).status_code == 200
        assert "without speculation" in (await complete(client, "b", **on)).json()["error"]["message"]
        assert {request.model for request in engine.requests} == {""}

    talk(run)


def test_a_model_at_its_limit_refuses_its_own_requests_only() -> None:
    async def run(client: httpx.AsyncClient, app: Application, engine: FakeEngine) -> None:
        hello = says(byte_tokenizer(), "hello")

        def script(request: Request) -> Iterator[Delta | float]:
            return silent(request) if request.model == "b" else hello(request)

        engine.script = script
        held = asyncio.create_task(complete(client, "b"))
        while not engine.in_flight:  # noqa: ASYNC110 -- the fake says nothing of it
            await asyncio.sleep(0.005)
        refused = await complete(client, "b")
        assert refused.status_code == 429
        assert (await complete(client, "tiny")).status_code == 200
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        while engine.in_flight:  # noqa: ASYNC110 -- the fake says nothing of it
            await asyncio.sleep(0.005)
        assert all(services.admission.num_requests == 0 for services in app.services.all)

    talk(run)


def test_the_health_probe_asks_each_model_for_a_token() -> None:
    async def run(client: httpx.AsyncClient, _: Application, engine: FakeEngine) -> None:
        assert (await client.get("/health/generate")).status_code == 200
        assert [request.model for request in engine.requests] == ["", "b"]

    talk(run)


def test_names_that_would_be_two_models_are_refused() -> None:
    tokenizer = byte_tokenizer()
    engine = FakeEngine(tokenizer)
    engine.info = replace(engine.info, also=(replace(engine.info, name="tiny"),))
    first = Metrics("tiny")
    others = [("tiny", tokenizer, Metrics("tiny2", beside=first))]
    with pytest.raises(ValueError, match="tiny is the name of two models"):
        create_app(ApiSettings(("tiny",)), engine, tokenizer, first, others)
