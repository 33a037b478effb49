"""Denoised answers: usage, streams, the official client, blocks that are watched, metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from scheduler.policies import make_diffusion
from tests.server.api.denoising import BC, DUAL, PATHS, ask, denoising, refused
from tests.server.api.running import Server, serving


@pytest.fixture(scope="module")
def dual() -> Iterator[Server]:
    with serving(denoising, diffusion=DUAL) as running:
        yield running


def test_usage_counts_forwards_over_all_choices(dual: Server) -> None:
    usage = ask(dual, model="tiny-diffusion", n=3).json()["usage"]
    assert usage["completion_tokens"] == 15
    assert usage["decoding"] == {"forwards": 6, "tokens_per_forward": 2.5, "commit_passes": 3}
    assert "decoding" not in ask(dual, n=3).json()["usage"]


def test_the_typed_client_reads_both_ways_alike(dual: Server) -> None:
    strict = openai.OpenAI(base_url=f"{dual.url}/v1", api_key="none", _strict_response_validation=True)
    lenient = openai.OpenAI(base_url=f"{dual.url}/v1", api_key="none")
    asked: dict[str, Any] = {"model": "tiny-diffusion", "max_tokens": 5, "extra_body": {"decoding": {"threshold": 0.8}}}
    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    whole = strict.completions.create(prompt="hi", **asked)
    chunks = list(lenient.completions.create(prompt="hi", **asked, **streaming))
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["hel", "lo"]
    assert whole.choices[0].text == "hello"
    assert whole.usage == chunks[-1].usage
    assert whole.usage is not None
    assert whole.usage.model_extra == {"decoding": {"forwards": 2, "tokens_per_forward": 2.5, "commit_passes": 1}}
    assert {chunk.model for chunk in chunks} == {"tiny-diffusion"}
    messages: Any = [{"role": "user", "content": "hi"}]
    chat = strict.chat.completions.create(messages=messages, **asked)
    parts = list(strict.chat.completions.create(messages=messages, **asked, **streaming))
    assert chat.choices[0].message.content == "hello"
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == "hello"
    assert parts[-1].usage == chat.usage
    assert [model.id for model in strict.models.list()] == ["tiny", "tiny-diffusion"]


def events(text: str) -> list[tuple[str, Any]]:
    """(type, data) of each server-sent event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        data = lines["data"]
        found.append((lines.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return found


@pytest.mark.parametrize("name", ["tiny", "tiny-diffusion"])
def test_a_block_can_be_watched_while_it_fills(dual: Server, name: str) -> None:
    options = {"include_snapshots": True, "include_usage": True}
    response = ask(dual, "/v1/denoise/stream", model=name, stream_options=options)
    assert response.headers["content-type"].startswith("text/event-stream")
    seen = events(response.text)
    assert [kind for kind, _ in seen] == ["snapshot", "message", "snapshot", "message", "message", "message"]
    assert seen[0][1] == {"index": 0, "block_start": 0, "step": 1, "pieces": ["h", "e", "l", None, "o"]}
    assert seen[2][1] == {"index": 0, "block_start": 0, "step": 2, "pieces": ["h", "e", "l", "l", "o"]}
    chunks = [data for kind, data in seen if kind == "message"]
    assert [chunk["choices"][0]["text"] for chunk in chunks[:2]] == ["hel", "lo"]
    assert chunks[2]["usage"]["decoding"]["forwards"] == 2
    assert chunks[3] == "[DONE]"


def test_without_the_option_nobody_is_shown_blocks(dual: Server) -> None:
    seen = events(ask(dual, "/v1/denoise/stream").text)
    assert [kind for kind, _ in seen] == ["message", "message", "message"]
    assert dual.engine.requests[-1].decoding == make_diffusion("auto", BC)


def test_watching_is_for_its_own_route(dual: Server) -> None:
    for path in PATHS:
        options = {"include_snapshots": True}
        param, message = refused(dual, path, model="tiny-diffusion", stream=True, stream_options=options)
        assert param == "stream_options.include_snapshots"
        assert "/v1/denoise/stream" in message
    assert refused(dual, "/v1/denoise/stream", stream=False)[0] == "stream"
    assert refused(dual, "/v1/denoise/stream", decoding={"policy": "autoregressive"})[0] == "decoding.policy"
    assert refused(dual, "/v1/denoise/stream", messages=[{"role": "user", "content": "x"}])[0] == "messages"


def test_what_denoising_took_is_counted(dual: Server) -> None:
    def value(name: str) -> float:
        registry = dual.app.services.metrics.registry
        return registry.get_sample_value(name, {"model_name": "tiny"}) or 0.0

    names = ("forwards", "commit_passes", "rows", "tokens", "requests")
    before = [value(f"braid_denoise_{name}_total") for name in names]
    assert ask(dual, model="tiny-diffusion").status_code == ask(dual).status_code == 200
    after = [value(f"braid_denoise_{name}_total") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1, 24, 5, 1]
