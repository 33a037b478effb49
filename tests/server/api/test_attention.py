"""`attention`: what reaches the engine, what is refused, what `usage` and the metrics tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from scheduler.types import Attention, AttentionMethod, AttentionOffer
from tests.server.api.denoising import DUAL, denoising
from tests.server.api.running import Server, serving

OFFERS = (AttentionOffer(AttentionMethod.QUEST, 192), AttentionOffer(AttentionMethod.TIDAL, 69))
DRAFTERS = (("suffix", False), ("sparse_attention", True))
PATHS = ("/v1/completions", "/v1/chat/completions")

LOSSLESS = {"method": "quest", "lossless": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(denoising, diffusion=DUAL) as running:
        running.engine.info = replace(running.engine.info, attention=OFFERS, attention_budget=256, drafters=DRAFTERS)
        yield running


def ask(server: Server, path: str = "/v1/completions", **fields: Any) -> Any:
    body = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    return server.post(path, json={"model": "tiny", "max_tokens": 5, **body, **fields})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"method": "quest"}, Attention(AttentionMethod.QUEST, 256)),
        ({"method": "tidal", "budget": 69}, Attention(AttentionMethod.TIDAL, 69)),
        ({"method": "tidal", "lossless": True}, Attention(AttentionMethod.TIDAL, 256, True)),
        ({"method": "tidal", "correct_every": 64}, Attention(AttentionMethod.TIDAL, 256, correct_every=64)),
        ({"method": "tidal", "correct_every": 0}, Attention(AttentionMethod.TIDAL, 256)),
        ({"method": "dense"}, None),
    ],
)
def test_what_is_asked_reaches_the_engine_and_is_reported(
    server: Server, path: str, fields: dict[str, Any], wanted: Attention | None
) -> None:
    answer = ask(server, path, attention=fields)
    assert answer.status_code == 200, answer.text
    assert server.engine.requests[-1].attention == wanted
    shown: dict[str, Any] = {"method": "dense"}
    if wanted is not None:
        shown = {"method": wanted.method, "budget": wanted.budget} | ({"lossless": True} if wanted.lossless else {})
        shown |= {"correct_every": wanted.correct_every} if wanted.correct_every else {}
    assert answer.json()["usage"]["attention"] == shown


def test_who_says_nothing_gets_the_servers_method_and_no_report(server: Server) -> None:
    info = server.engine.info
    assert "attention" not in ask(server).json()["usage"]
    assert server.engine.requests[-1].attention is None
    try:
        server.engine.info = replace(info, default_attention=Attention(AttentionMethod.TIDAL, 300))
        assert "attention" not in ask(server).json()["usage"]
        assert server.engine.requests[-1].attention == Attention(AttentionMethod.TIDAL, 300)
        ask(server, attention={"method": "dense"})
        assert server.engine.requests[-1].attention is None
        assert ask(server, model="tiny-diffusion").status_code == 200
        assert server.engine.requests[-1].attention is None
    finally:
        server.engine.info = info


def test_who_does_not_say_is_corrected_as_often_as_the_server_says(server: Server) -> None:
    info = server.engine.info
    try:
        server.engine.info = replace(info, attention_correct_every=32)
        for fields, every in (({}, 32), ({"correct_every": 8}, 8), ({"correct_every": 0}, 0), ({"lossless": True}, 0)):
            assert ask(server, attention={"method": "quest", **fields}).status_code == 200
            asked = server.engine.requests[-1].attention
            assert asked is not None
            assert asked.correct_every == every
    finally:
        server.engine.info = info


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"attention": {"method": "quest", "budget": 191}}, "attention.budget", "is 191, but quest needs at least 192"),
        ({"attention": {"method": "quest", "budget": -1}}, "attention.budget", "is -1, but quest needs at least 192"),
        ({"attention": {"method": "double_sparsity"}}, "attention.method", "this server has dense and quest, tidal"),
        ({"attention": {"method": "lsh"}}, "attention.method", "is lsh, but must be one of dense, quest"),
        ({"attention": {"method": "dense", "budget": 512}}, "attention.budget", "dense reads every key"),
        ({"attention": {"method": "dense", "correct_every": 8}}, "attention.correct_every", "dense reads every key"),
        ({"attention": {"method": "quest", "correct_every": -1}}, "attention.correct_every", "is -1, but must be 0"),
        ({"attention": LOSSLESS | {"correct_every": 8}}, "attention.correct_every", "with lossless no key or value"),
        ({"attention": {"budget": 512}}, "attention", ""),
        ({"attention": {"method": "quest", "pages": 3}}, "attention", ""),
        ({"attention": "quest"}, "attention", ""),
        ({"attention": {"method": "quest"}, "model": "tiny-diffusion"}, "attention", "denoises"),
        ({"attention": {"method": "quest"}, "speculation": {"tree": True}}, "speculation", "cannot verify trees"),
        ({"attention": {"method": "dense", "lossless": True}}, "attention.lossless", "dense loses nothing"),
        ({"attention": LOSSLESS, "speculation": {"mode": "off"}}, "speculation", "rules it out"),
        ({"attention": LOSSLESS, "speculation": {"drafter": "suffix"}}, "speculation", "rules it out"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_is_a_400_that_names_the_field(
    server: Server, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    before = len(server.engine.requests)
    answer = ask(server, path, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]
    assert len(server.engine.requests) == before


def test_a_server_without_sparse_attention_says_so(server: Server) -> None:
    info = server.engine.info
    try:
        server.engine.info = replace(info, attention=())
        answer = ask(server, attention={"method": "quest"})
        assert answer.status_code == 400
        assert "dense attention alone" in answer.json()["error"]["message"]
        server.engine.info = replace(info, drafters=(("suffix", False),))
        answer = ask(server, attention=LOSSLESS)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "attention.lossless")
        assert ask(server, attention={"method": "dense"}).status_code == 200
    finally:
        server.engine.info = info


def test_calls_are_counted_by_method(server: Server) -> None:
    def count(method: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        line = next(line for line in lines if line.startswith("braid_attention_requests_total") and method in line)
        return float(line.split()[-1])

    before = count('"quest"'), count('"dense"')
    ask(server, attention={"method": "quest"})
    assert (count('"quest"'), count('"dense"')) == (before[0] + 1, before[1])
