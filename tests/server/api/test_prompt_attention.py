"""`attention.prefill`: what reaches the engine, what is refused, what `usage` and the metrics tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from scheduler.types import Attention, AttentionMethod, AttentionOffer, PromptAttention, PromptMethod
from tests.server.api.denoising import DUAL, denoising
from tests.server.api.running import Server, serving
from tests.server.api.test_attention import DRAFTERS, PATHS, ask

X, P = (PromptAttention(method, 0.8, 1024) for method in PromptMethod)
QUEST = Attention(AttentionMethod.QUEST, 256)
SHOWN_QUEST = {"method": "quest", "budget": 256}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(denoising, diffusion=DUAL) as running:
        running.engine.info = replace(
            running.engine.info,
            attention=(AttentionOffer(AttentionMethod.QUEST, 192),),
            attention_budget=256,
            prompt_attention=(X,),
            drafters=DRAFTERS,
        )
        yield running


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "wanted", "shown"),
    [
        ({"prefill": "xattention"}, (X, None), {"prefill": "xattention", "prefill_threshold": 0.8}),
        (
            {"prefill": "xattention", "prefill_threshold": 0.5, "method": "quest"},
            (replace(X, threshold=0.5), QUEST),
            {"method": "quest", "budget": 256, "prefill": "xattention", "prefill_threshold": 0.5},
        ),
        # Everything kept is a dense prompt, whose pages are everybody's.
        ({"prefill": "xattention", "prefill_threshold": 1}, (None, None), {"prefill": "dense"}),
        (
            {"prefill": "dense", "method": "quest"},
            (None, QUEST),
            {"method": "quest", "budget": 256, "prefill": "dense"},
        ),
        ({"method": "quest"}, (None, QUEST), {"method": "quest", "budget": 256}),
    ],
)
def test_what_is_asked_reaches_the_engine_and_is_reported(
    server: Server,
    path: str,
    fields: dict[str, Any],
    wanted: tuple[PromptAttention | None, Attention | None],
    shown: dict[str, Any],
) -> None:
    answer = ask(server, path, attention=fields)
    assert answer.status_code == 200, answer.text
    request = server.engine.requests[-1]
    assert (request.prompt_attention, request.attention) == wanted
    assert answer.json()["usage"]["attention"] == {"method": "dense", **shown}


def test_who_says_nothing_gets_the_servers_method_unless_the_prompt_must_be_dense(server: Server) -> None:
    info = server.engine.info
    asked: list[tuple[dict[str, Any], PromptAttention | None]] = [
        ({}, X),
        ({"attention": {"method": "quest"}}, X),
        ({"attention": {"prefill": "dense"}}, None),
        ({"attention": {"method": "quest", "lossless": True}}, None),
        ({"prompt_logprobs": 1}, None),
        ({"echo": True, "logprobs": 1}, None),
        ({"model": "tiny-diffusion"}, None),
    ]
    try:
        server.engine.info = replace(info, default_prompt_attention=X)
        for fields, wanted in asked:
            answer = ask(server, **fields)
            assert answer.status_code == 200, answer.text
            assert server.engine.requests[-1].prompt_attention == wanted
            assert "prefill" not in answer.json()["usage"].get("attention", {}) or "prefill" in fields["attention"]
    finally:
        server.engine.info = info


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"attention": {"prefill": "pbs"}}, "attention.prefill", "this server has dense and xattention"),
        ({"attention": {"prefill": "minference"}}, "attention.prefill", "must be one of dense, xattention, pbs"),
        *(
            (
                {"attention": {"prefill": "xattention", "prefill_threshold": threshold}},
                "attention.prefill_threshold",
                "must lie above 0 and at most at 1",
            )
            for threshold in (0, -0.5, 1.01)
        ),
        ({"attention": {"prefill": "xattention", "prefill_threshold": "0.9"}}, "attention", ""),
        ({"attention": {"prefill": "dense", "prefill_threshold": 0.9}}, "attention.prefill_threshold", "dense keeps"),
        ({"attention": {"method": "quest", "prefill_threshold": 0.9}}, "attention.prefill_threshold", "without"),
        ({"attention": {"prefill": "xattention", "budget": 512}}, "attention.budget", "attention.method is not"),
        ({"attention": {"prefill": "xattention", "lossless": True}}, "attention.lossless", "attention.method is not"),
        ({"attention": {"prefill": "xattention", "correct_every": 8}}, "attention.correct_every", "method is not"),
        ({"attention": {}}, "attention", "neither method nor prefill"),
        (
            {"attention": {"prefill": "xattention", "method": "quest", "lossless": True}},
            "attention.lossless",
            "promises the text of dense attention",
        ),
        ({"attention": {"prefill": "xattention"}, "prompt_logprobs": 1}, "attention.prefill", "log-probabilities"),
        ({"attention": {"prefill": "xattention"}, "model": "tiny-diffusion"}, "attention", "denoises"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(
    server: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    before = len(server.engine.requests)
    answer = ask(server, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]
    assert len(server.engine.requests) == before


def test_a_server_without_such_methods_says_so(server: Server) -> None:
    info = server.engine.info
    try:
        server.engine.info = replace(info, prompt_attention=())
        answer = ask(server, attention={"prefill": "xattention"})
        assert answer.status_code == 400
        assert "reads prompts densely (sparse-attention)" in answer.json()["error"]["message"]
    finally:
        server.engine.info = info


def test_calls_are_counted_by_method(server: Server) -> None:
    def count(method: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        found = (line for line in lines if line.startswith("braid_prompt_attention_requests_total") and method in line)
        return float(next(found).split()[-1])

    before = count('"xattention"'), count('"dense"')
    ask(server, attention={"prefill": "xattention"})
    ask(server)
    assert (count('"xattention"'), count('"dense"')) == (before[0] + 1, before[1] + 1)
