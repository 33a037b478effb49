"""Raw bodies that break JSON servers: every one is a 4xx error object that names what it is about."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.api.running import Server, serving, wait_until

GOOD: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 2}

BROKEN_JSON = [
    b"", b" ", b"null", b"[]", b'"x"', b"1", b"true", b"{", b'{"prompt": "a"', b'{"prompt": "a",}', b"{'prompt': 'a'}",
    b'\xef\xbb\xbf{"prompt": "a"}', '{"prompt": "a"}'.encode("utf-16"), b'{"prompt": "\xff\xfe"}', b'{"prompt": "a"} x',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": \x00}', b"undefined",
]  # fmt: skip

BAD_FRAGMENTS = [
    ("temperature", "NaN"), ("temperature", "Infinity"), ("temperature", "-Infinity"), ("temperature", "1e999"),
    ("top_p", "NaN"), ("min_p", "-1e999"), ("prompt", '"\\ud800"'), ("prompt", '["ok", "\\udfff"]'),
    ("max_tokens", "9" * 5000), ("max_tokens", "1" + "0" * 400), ("seed", "-" + "9" * 6000), ("stop", '"a\\ud83d"'),
    ("prompt", "[" * 70 + "1" + "]" * 70), ("logit_bias", '{"1": NaN}'), ("logit_bias", '{"\\ud800": 1}'),
    ("user", '"\\udc00"'), ("prompt", "[" + "9" * 5000 + "]"),
]  # fmt: skip

WRONG: list[Any] = [
    True, 0.5, -1, 1e308, "", "x", [], {}, [None], [[1]], [1, "a"], 2**63, 2**64, -(2**63) - 1, ["x", 1], {"a": {}},
]  # fmt: skip

# What is legal among WRONG, by field. The rest must be refused.
LEGAL: dict[str, list[Any]] = {
    "model": [],
    "prompt": ["x", [[1]]],
    "max_tokens": [],
    "temperature": [0.5],
    "top_p": [0.5],
    "top_k": [-1],
    "min_p": [0.5],
    "n": [],
    "best_of": [],
    "stream": [True],
    "stop": ["x", []],
    "stop_token_ids": [[]],
    "min_tokens": [],
    "presence_penalty": [0.5, -1],
    "frequency_penalty": [0.5, -1],
    "repetition_penalty": [0.5],
    "logit_bias": [{}],
    "allowed_token_ids": [],
    "bad_words": [[]],
    "seed": [-1],
    "logprobs": [],
    "prompt_logprobs": [],
    "echo": [True],
    "cache_salt": ["x"],
    "stream_options": [],
    "ignore_eos": [True],
    "truncate_prompt_tokens": [-1],
    "response_format": [],
    "structured_outputs": [{}],
    "guided_choice": [],
    "guided_regex": ["x"],
    "priority": [-1],
    "suffix": [""],
    "prediction": [],
    "decoding": [],
    "speculation": [{}],
    "kv_transfer_params": [],
    "prompt_embeds": [],
    "use_beam_search": [],
}


def is_legal(field: str, value: Any) -> bool:
    return any(type(value) is type(item) and value == item for item in LEGAL[field])


TYPED = [(field, value) for field in LEGAL for value in WRONG if not is_legal(field, value)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def post(server: Server, raw: bytes, path: str = "/v1/completions") -> httpx.Response:
    return server.post(path, content=raw, headers={"content-type": "application/json"})


def check_refusal(response: httpx.Response, param: str | None) -> None:
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(error["message"]) < 700
    assert response.headers["x-request-id"]
    assert response.headers["x-should-retry"] == "false"
    if param is not None:
        assert error["param"] == param, error


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_what_is_not_a_json_object_is_refused_on_every_route(server: Server, path: str) -> None:
    for raw in BROKEN_JSON:
        check_refusal(post(server, raw, path), None)


@pytest.mark.parametrize(
    ("field", "fragment"), BAD_FRAGMENTS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(BAD_FRAGMENTS)]
)
def test_numbers_and_text_that_json_does_not_have_name_their_field(server: Server, field: str, fragment: str) -> None:
    body = {key: value for key, value in GOOD.items() if key != field}
    raw = json.dumps(body)[:-1] + f', "{field}": {fragment}}}'
    check_refusal(post(server, raw.encode()), field)


def test_the_corpus_is_large_enough() -> None:
    assert len(BROKEN_JSON) * 4 + len(BAD_FRAGMENTS) + len(TYPED) >= 150


def test_every_wrong_value_of_every_field_is_refused_by_name_streamed_or_not(server: Server) -> None:
    with server.client() as client:
        for field, value in TYPED:
            body = {**GOOD, field: value}
            response = client.post("/v1/completions", json=body)
            check_refusal(response, field)
            if field not in ("stream", "stream_options"):  # these two depend on streaming itself
                streamed = client.post("/v1/completions", json={**body, "stream": True})
                assert streamed.status_code == response.status_code, (field, value)


def test_null_means_the_default(server: Server) -> None:
    body = {**GOOD, **{field: None for field in LEGAL if field not in GOOD}}
    assert post(server, json.dumps(body).encode()).status_code == 200


def test_unknown_fields_are_ignored_and_of_duplicate_keys_the_last_wins(server: Server) -> None:
    raw = b'{"model": "nope", "prompt": "hi", "max_tokens": 2, "made_up": {"x": [1]}, "model": "tiny"}'
    assert post(server, raw).status_code == 200


def test_a_missing_content_type_gets_the_curl_hint(server: Server) -> None:
    response = server.post(
        "/v1/completions", content=json.dumps(GOOD), headers={"content-type": "application/x-www-form-urlencoded"}
    )
    check_refusal(response, None)
    assert response.status_code == 415
    assert "-H 'Content-Type: application/json'" in response.json()["error"]["message"]
    gzip = server.post(
        "/v1/completions", content=b"x", headers={"content-type": "application/json", "content-encoding": "gzip"}
    )
    assert gzip.status_code == 415


def test_bodies_over_the_limit_are_413_declared_or_not(server: Server) -> None:
    big = json.dumps({**GOOD, "prompt": "x" * (3 << 20)}).encode()

    def chunks() -> Iterator[bytes]:
        yield from (big[i : i + 65536] for i in range(0, len(big), 65536))

    headers = {"content-type": "application/json"}
    with server.client() as client:
        for content in (big, chunks()):
            # The server may close before the client has written everything.
            with contextlib.suppress(httpx.WriteError):
                assert client.post("/v1/completions", content=content, headers=headers).status_code == 413


def test_a_prompt_that_cannot_fit_is_refused_without_tokenizing(server: Server) -> None:
    response = post(server, json.dumps({**GOOD, "prompt": "x" * (1 << 20)}).encode())
    check_refusal(response, "prompt")
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens. However, " in error["message"]


def test_all_text_survives_or_is_refused(server: Server) -> None:
    for text in ("\x00", "\x1b[31m", "\u202e", "😀" * 20, "e" + "\u0301" * 100, "\ufffd", "\U0010ffff", "<eos>"):
        assert post(server, json.dumps({**GOOD, "prompt": text}).encode()).status_code == 200
        ids = server.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert server.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text


def test_nothing_is_held_after_the_corpus(server: Server) -> None:
    wait_until(lambda: not server.engine.in_flight)
    assert server.app.services.admission.num_requests == 0
    assert server.app.services.admission.num_tokens == 0
