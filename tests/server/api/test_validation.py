"""What a valid body becomes for the engine, and what a combination of fields is refused for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from scheduler.types import GrammarKind, Request
from server.api.schema import REFUSED
from tests.server.api.fake_engine import MODEL_LEN, FakeEngine
from tests.server.api.running import make_app

BASE: dict[str, Any] = {"prompt": "hi"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def ask(
    body: dict[str, Any], path: str = "/v1/completions", template: str | None = "default"
) -> tuple[Any, FakeEngine]:
    app, engine, _ = make_app(chat_template=template)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post(path, json=body)

    return asyncio.run(post()), engine


def accepted(body: dict[str, Any], path: str = "/v1/completions") -> Request:
    response, engine = ask(body, path)
    assert response.status_code == 200, response.text
    return engine.requests[0]


def test_defaults_are_those_of_the_official_api() -> None:
    request = accepted(BASE)
    assert request.max_tokens == 16
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.logprobs) == (1.0, 1.0, None)
    assert len(request.stop_ids) == 1
    assert accepted(CHAT, "/v1/chat/completions").max_tokens == MODEL_LEN - 20


def test_the_default_length_shrinks_to_the_context_but_an_asked_one_does_not() -> None:
    long = [1] * (MODEL_LEN - 3)
    assert accepted({"prompt": long}).max_tokens == 3
    response, _ = ask({"prompt": long, "max_tokens": 16})
    message = response.json()["error"]["message"]
    assert message.startswith(
        f"This model's maximum context length is {MODEL_LEN} tokens. However, you requested 525 tokens"
    )
    assert ask({"prompt": [1] * MODEL_LEN})[0].json()["error"]["param"] == "prompt"


def test_options_reach_the_engine_as_given() -> None:
    body = {
        **BASE, "temperature": 0.001, "top_k": -1, "seed": -5, "stop_token_ids": [9, 9], "ignore_eos": True,
        "min_tokens": 2, "logit_bias": {"7": -100}, "allowed_token_ids": [7, 8], "bad_words": ["no"], "priority": 3,
    }  # fmt: skip
    request = accepted(body)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.min_tokens) == (0.0, 0, -5, 2)
    assert (request.stop_ids, request.priority) == ((9,), 3)
    assert (sampling.logit_bias, sampling.allowed_token_ids) == (((7, -100.0),), (7, 8))
    assert len(sampling.bad_words) == 2


def test_truncation_keeps_the_last_tokens() -> None:
    assert accepted({"prompt": [1, 2, 3, 4], "truncate_prompt_tokens": 2}).prompt == (3, 4)
    assert len(accepted({"prompt": [1] * 900, "truncate_prompt_tokens": -1, "max_tokens": 12}).prompt) == MODEL_LEN - 12


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("response_format", {"type": "json_object"}, GrammarKind.JSON_OBJECT),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
            GrammarKind.JSON_SCHEMA,
        ),
        ("guided_json", '{"type": "object"}', GrammarKind.JSON_SCHEMA),
        ("guided_regex", "a+", GrammarKind.REGEX),
        ("guided_choice", ["a", "b"], GrammarKind.CHOICE),
        ("guided_grammar", "start: A", GrammarKind.LARK),
        ("structured_outputs", {"regex": "a+"}, GrammarKind.REGEX),
    ],
)
def test_each_spelling_of_a_constraint_becomes_a_grammar(field: str, value: Any, kind: GrammarKind) -> None:
    grammar = accepted({**BASE, field: value}).sampling.grammar
    assert grammar is not None
    assert grammar.kind is kind


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(40):
    DEEP = {"oneOf": [DEEP]}

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": 4, "prompt": [1] * (MODEL_LEN - 3)}, "min_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"n": 129}, "n"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 20, "n": 20}, "n"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ["a" * 257]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"foo": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1e9}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"cache_salt": "a/b"}, "cache_salt"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"guided_json": DEEP}, "guided_json"),
    ({"guided_regex": "a" * 9000}, "guided_regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"bad_words": ["x" * 2000]}, "bad_words"),
    ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=[f"{p}-{i}" for i, (_, p) in enumerate(REFUSALS)])
def test_what_exceeds_a_limit_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    response, engine = ask({**BASE, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_fields_of_other_engines_are_refused_not_dropped(field: str) -> None:
    response, _ = ask({**BASE, field: {"x": 1}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


CHAT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools"),
    ({"tools": "x"}, "tools"),
    ({"tool_choice": 1}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"min_tokens": MODEL_LEN}, "min_tokens"),
    ({"prompt": "hi"}, "prompt"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": {"chat_template": "x"}}}, "chat_template_kwargs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_REFUSALS, ids=[f"{p}-{i}" for i, (_, p) in enumerate(CHAT_REFUSALS)])
def test_chat_bodies_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    response, _ = ask({**CHAT, **fields}, "/v1/chat/completions")
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_load_generators_may_say_the_length_twice() -> None:
    assert accepted({**BASE, "max_tokens": 5, "max_completion_tokens": 5, "stop": None}).max_tokens == 5


def test_tools_that_may_not_be_called_change_nothing() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert accepted({**CHAT, "tools": tools, "tool_choice": "none"}, "/v1/chat/completions")


def test_a_model_without_a_template_says_so() -> None:
    response, _ = ask(CHAT, "/v1/chat/completions", template=None)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_token_ids_can_be_asked_for() -> None:
    response, _ = ask(
        {**BASE, "return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0, "max_tokens": 2}
    )
    choice = json.loads(response.text)["choices"][0]
    assert choice["prompt_token_ids"] == [71, 72]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
