"""Bodies made from our own OpenAPI document and then spoilt (S-34): never a 5xx, every refusal names its field, what is
answered has the declared shape, and nothing that reaches the engine is out of range. Seeded: a failure prints its body.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from scheduler.policies import PARTS, POLICIES
from scheduler.types import Delta, Diffusion, DiffusionModel, Request, SpeculationMode, Topology
from server.api.app import Application
from server.api.schema import REFUSED
from tests.server.api.fake_engine import FakeEngine, byte_tokenizer, says
from tests.server.api.running import make_app

NUM_BODIES = 1300
"""For each route."""

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/denoise/stream": {"prompt": "hi", "max_tokens": 3},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [71, 72]},
}
# Each route meets a model that can denoise: in two ways, with a canvas alone, in blocks alone.
MODELS = {
    "/v1/completions": DiffusionModel(259, 8, is_dual=True),
    "/v1/chat/completions": DiffusionModel(259, 8, Topology.BIDIRECTIONAL),
    "/v1/denoise/stream": DiffusionModel(259, 8),
}
SHAPE = {
    "/v1/completions": {"id", "object", "created", "model", "choices", "usage"},
    "/v1/chat/completions": {"id", "object", "created", "model", "choices", "usage"},
    "/tokenize": {"count", "max_model_len", "tokens"},
    "/detokenize": {"prompt"},
}
INTS = (0, 1, -1, 2, 16, 20, 21, 128, 129, 255, 511, 512, 1025, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, -2.0, 2.0, 2.5, 1e-300, 1e308, -1e308, 100.0)
TEXTS = ("", "x", "hi there", " ", "\x00", "\u202e", "\U0001f600", "e\u0301", "<eos>", "a/b", "x" * 300, "1", "text")
WORDS = (
    *POLICIES, "autoregressive", "fixed", "eotp", "exact", "filtered", "last", "tiny-diffusion", "selector.threshold",
    "none", "auto", "json_object", "json_schema", "user", "tool", "wizard", "text", "tiny", "regex", "grammar",
)  # fmt: skip


class Maker:
    """Random bodies of one route. `schema` is the route's in the OpenAPI document."""

    def __init__(self, rng: random.Random, schema: dict[str, Any], good: dict[str, Any]) -> None:
        self._rng, self._good = rng, good
        self._defs = schema.get("$defs", {})
        self.fields: dict[str, Any] = schema["properties"]

    def body(self) -> dict[str, Any]:
        rng = self._rng
        body = dict(self._good)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
            name = rng.choice([*self.fields, *REFUSED]) if rng.random() < 0.95 else rng.choice(TEXTS)
            if rng.random() < 0.05:
                body.pop(name, None)
            elif name in self.fields and rng.random() < 0.6:
                body[name] = self.typed(self.fields[name])
            else:
                body[name] = self.junk()
        return body

    def typed(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """A value of the declared type, in range or not."""
        rng = self._rng
        if "$ref" in schema:
            schema = self._defs[schema["$ref"].rsplit("/", 1)[1]]
        if "anyOf" in schema:
            return self.typed(rng.choice(schema["anyOf"]), depth)
        if "enum" in schema or "const" in schema:
            return rng.choice(schema.get("enum") or [schema["const"]])
        kind = schema.get("type")
        if kind == "integer":
            return rng.choice(INTS)
        if kind == "number":
            return rng.choice((*FLOATS, *INTS[:6]))
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "string":
            return rng.choice((*TEXTS, *WORDS))
        if kind == "array" and depth < 5:
            return [self.typed(schema.get("items", {}), depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 5, 130)))]
        if kind == "object" and depth < 5:
            if "properties" not in schema:
                inner = schema.get("additionalProperties")
                inner = inner if isinstance(inner, dict) else {}
                return {
                    rng.choice((*WORDS, "7", "-1", "type", "regex")): self.typed(inner, depth + 1) for _ in range(2)
                }
            names = [name for name in schema["properties"] if rng.random() < 0.7 or name in schema.get("required", ())]
            return {name: self.typed(schema["properties"][name], depth + 1) for name in names}
        return None if kind == "null" else self.junk(depth)

    def junk(self, depth: int = 0) -> Any:
        rng = self._rng
        kind = rng.randrange(9 if depth < 4 else 6)
        if kind < 6:
            return rng.choice(((None,), (True, False), INTS, FLOATS, TEXTS, WORDS)[kind])
        if kind < 8:
            return [self.junk(depth + 1) for _ in range(rng.choice((0, 1, 2, 3, 40)))]
        return {rng.choice((*TEXTS, *WORDS)): self.junk(depth + 1) for _ in range(rng.randrange(4))}

    def spoilt(self, raw: bytes) -> bytes:
        """Bytes that are probably no JSON any more."""
        rng = self._rng
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw) + 1)
            cut = rng.choice((0, 0, 1, 5, len(raw)))
            piece = rng.choice(
                (b"NaN", b"\\ud800", b"\xff", b"[", b"{", b'"', b",", b"9" * 400, b"-", b"1e999", b"\x00", b"")
            )
            raw = raw[:at] + piece + raw[at + cut :]
        return raw


def judged(script: Any) -> Any:
    """The engine's own check of what it is given: an AssertionError here is a 500, which fails the test."""

    def run(request: Request) -> Iterator[Delta | float]:
        sampling = request.sampling
        ids = (*request.prompt, *request.stop_ids, *(sampling.allowed_token_ids or ()), *dict(sampling.logit_bias))
        assert request.prompt
        assert all(type(token) is int and 0 <= token < 260 for token in ids)
        assert request.max_tokens >= 0
        assert len(request.prompt) + request.max_tokens <= 512
        assert 0 <= sampling.temperature <= 2
        assert 0 < sampling.top_p <= 1
        assert 0 <= sampling.top_k < 260
        assert 0 <= sampling.min_p <= 1
        assert all(map(math.isfinite, (sampling.repetition_penalty, *dict(sampling.logit_bias).values())))
        assert sampling.repetition_penalty > 0
        assert -(2**63) <= sampling.seed < 2**63
        assert (sampling.logprobs or 0) <= 20
        assert (sampling.prompt_logprobs or 0) <= 20
        assert 0 <= sampling.min_tokens <= request.max_tokens
        assert len(request.cache_salt) < 260
        if (decoding := request.decoding) is not None:
            check_decoding(request, decoding)
        yield from script(request)

    return run


def check_decoding(request: Request, decoding: Diffusion) -> None:
    """Within the bounds of the catalogue, and of the canvas."""
    for part, choice in zip(
        PARTS, (decoding.selector, decoding.planner, decoding.cache, decoding.stopper), strict=True
    ):
        rules = PARTS[part][choice.name]
        assert [name for name, _ in choice.values] == list(rules)
        assert all(rules[name].low <= value <= rules[name].high for name, value in choice.values)
    assert decoding.policy in POLICIES
    assert request.max_tokens > 0
    assert request.sampling.prompt_logprobs is None
    assert request.sampling.grammar is None or decoding.selector.name == "sequential"
    assert request.speculation.mode is SpeculationMode.OFF
    length, block = decoding.gen_length, decoding.block_size or 8
    assert decoding.steps is None or 1 <= decoding.steps <= block
    if length is not None:
        assert length % block == 0
        assert request.max_tokens <= length
    if decoding.cache.name not in ("exact", "sub_block"):
        canvas = length or math.ceil(request.max_tokens / block) * block
        assert len(request.prompt) + canvas <= 256


async def call(app: Application, path: str, raw: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request straight into the application: no sockets, no client library."""
    incoming = [{"type": "http.request", "body": raw, "more_body": False}]
    sent: list[Any] = []
    gone = asyncio.Event()

    async def receive() -> Any:
        if not incoming:
            await gone.wait()
            return {"type": "http.disconnect"}
        return incoming.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    await app(
        {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "",
            "scheme": "http", "query_string": b"", "headers": headers, "http_version": "1.1",
            "client": None, "server": None,
        },
        receive,
        send,
    )  # fmt: skip
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def check_stream(body: bytes) -> None:
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        assert "error" not in chunk
        assert {"id", "object", "created", "model", "choices"} <= set(chunk)


def check(path: str, raw: bytes, is_json: bool, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
    if status == 200 and headers[b"content-type"].startswith(b"text/event-stream"):
        check_stream(body)
        return
    answer = json.loads(body)
    if status == 200:
        assert SHAPE[path] <= set(answer)
        return
    assert status in (400, 404), status
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 700
    assert headers[b"x-should-retry"] == b"false"
    if is_json:
        assert isinstance(error["param"], str), error
        assert error["param"].isprintable()


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 11))])
def test_bodies_made_from_the_openapi_document_never_fail_the_server(seed: int, path: str) -> None:
    tokenizer = byte_tokenizer()
    model = MODELS.get(path)
    app, engine, _ = make_app(judged(says(tokenizer, "hello")), max_seqs=256, queue=1024, diffusion=model)
    schema = app.api.openapi()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    rng = random.Random(f"{path} {seed}")
    maker = Maker(rng, schema, GOOD[path])
    statuses: Counter[int] = Counter()

    async def run(engine: FakeEngine) -> None:
        for i in range(NUM_BODIES):
            body = maker.body()
            raw = json.dumps(body).encode()
            is_json = rng.random() < 0.9
            raw = raw if is_json else maker.spoilt(raw)
            try:
                status, headers, answer = await asyncio.wait_for(call(app, path, raw), 60)
                check(path, raw, is_json, status, headers, answer)
            except Exception as error:
                raise AssertionError(f"body {i}: {raw[:2000]!r}") from error
            statuses[status] += 1
        assert not engine.in_flight

    asyncio.run(run(engine))
    # Both sides of the fence were visited.
    assert statuses[200] > NUM_BODIES // 20, statuses
    assert statuses[400] > NUM_BODIES // 4, statuses
    assert app.services.admission.num_requests == app.services.admission.num_tokens == 0
