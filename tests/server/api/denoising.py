"""What the tests of denoised answers share: models, a script that denoises, ways to ask and be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scheduler.types import (
    DecodingUsage,
    Delta,
    Diffusion,
    DiffusionModel,
    FinishReason,
    Request,
    Snapshot,
    Topology,
)
from tests.server.api.fake_engine import byte_tokenizer
from tests.server.api.running import Server

MASK = 259
HELLO = tuple(byte_tokenizer().encode("hello", add_special_tokens=False))
BC, FB = Topology.BLOCK_CAUSAL, Topology.BIDIRECTIONAL
DUAL = DiffusionModel(MASK, 8, is_dual=True, learnt_block=8)
ONLY = DiffusionModel(MASK, 8)
CANVAS = DiffusionModel(MASK, 8, FB, learnt_block=8)
PATHS = ("/v1/completions", "/v1/chat/completions")


def denoising(request: Request) -> Iterator[Delta | float]:
    """`hello` in two forwards and a commit pass; `hel` comes with the first. Autoregressive requests get it plainly."""
    tokens = HELLO[: request.max_tokens]
    usages: list[DecodingUsage | None] = [DecodingUsage(1, 0, 8), DecodingUsage(1, 1, 16)]
    snapshots: list[Snapshot | None] = [None, None]
    if request.decoding is None:
        usages = [None, None]
    elif request.decoding.snapshots:
        start = len(request.prompt) // 8 * 8
        head = request.prompt[start:]
        snapshots = [
            Snapshot(start, (*head, *HELLO[:3], MASK, HELLO[4]), 1),
            Snapshot(start, (*head, *HELLO), 2),
        ]
    yield Delta(request.id, cached_tokens=0)
    yield Delta(request.id, tokens[:3], decoding=usages[0], snapshot=snapshots[0])
    yield Delta(request.id, tokens[3:], finish_reason=FinishReason.LENGTH, decoding=usages[1], snapshot=snapshots[1])


def ask(server: Server, path: str = "/v1/completions", **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    return server.post(path, json={"max_tokens": 5, **body, **fields})


def submitted(server: Server, **fields: Any) -> Request:
    """What the engine was told."""
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    return server.engine.requests[-1]


def denoised(server: Server, **fields: Any) -> Diffusion:
    decoding = submitted(server, **fields).decoding
    assert decoding is not None
    return decoding


def refused(server: Server, path: str = "/v1/completions", **fields: Any) -> tuple[str, str]:
    """(param, message) of a 400."""
    before = len(server.engine.requests)
    response = ask(server, path, **fields)
    assert response.status_code == 400, response.text
    assert len(server.engine.requests) == before
    error = response.json()["error"]
    return error["param"], error["message"]
