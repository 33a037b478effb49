"""Diffusion through the whole program: real processes, the embedded model in float32, HTTP. A denoised text is a
function of its request alone: streamed or whole, alone or in a crowd, also when the engine is killed midway."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scheduler.policies import POLICIES
from scheduler.types import Topology
from tests.server.test_main import Running, children_of, running

CODE = "def fibonacci(n):"
LIST = "copy: Anna Ben Clara David Emma Felix ->"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running("--dtype", "float32", "--max-model-len", "512") as started:
        yield started


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "braid-tiny-diffusion", "prompt": CODE, "max_tokens": 48, "temperature": 0, "seed": 7, **fields}


def ask(server: Running, **fields: Any) -> Any:
    with server.open("/v1/completions", body(**fields)) as answer:
        return json.load(answer)


def events(lines: Any) -> Iterator[tuple[str, Any]]:
    """(type, data) of each event but the last."""
    kind = "message"
    for line in lines:
        if line.startswith(b"event: "):
            kind = line[7:].decode().strip()
        elif line.startswith(b"data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            yield kind, event
            kind = "message"


def test_both_names_answer_and_the_banner_says_so(server: Running) -> None:
    with server.open("/v1/models") as answer:
        assert [card["id"] for card in json.load(answer)["data"]] == ["braid-tiny", "braid-tiny-diffusion"]
    assert any("block-causal diffusion, blocks of 8 tokens, policy auto" in line for line in server.banner)
    plain, denoised = ask(server, model="braid-tiny"), ask(server)
    assert "decoding" not in plain["usage"]
    assert denoised["model"] == "braid-tiny-diffusion"
    assert plain["choices"][0]["text"].endswith("return a\n")
    assert denoised["choices"][0]["text"].endswith("return a\n")
    usage = denoised["usage"]
    assert usage["decoding"]["tokens_per_forward"] == round(
        usage["completion_tokens"] / usage["decoding"]["forwards"], 3
    )
    assert usage["decoding"]["tokens_per_forward"] > 1.5
    same = ask(server, model="braid-tiny", decoding={"policy": "autoregressive"})
    assert same["choices"] == plain["choices"]


REQUESTS: list[dict[str, Any]] = [
    {},
    {"prompt": LIST, "logprobs": 2},
    {"decoding": {"policy": "sequential"}},
    {"decoding": {"policy": "threshold", "threshold": 0.7, "eos": "never"}, "ignore_eos": True, "max_tokens": 29},
    {"decoding": {"policy": "low_confidence", "steps": 4}, "temperature": 0.9, "n": 2},
    {"decoding": {"policy": "adablock"}, "stop": ["for"]},
    {"decoding": {"policy": "wino"}},
    {"decoding": {"policy": "random"}, "temperature": 1.0, "max_tokens": 5, "repetition_penalty": 1.2},
    {"guided_regex": "( (Anna|Ben|Clara)){3}\n", "prompt": LIST},
    {"prompt": LIST, "max_tokens": 1},
]


def test_a_stream_is_the_whole_answer_in_pieces_and_the_crowd_changes_nothing(server: Running) -> None:
    alone = [ask(server, **fields) for fields in REQUESTS]
    with ThreadPoolExecutor(len(REQUESTS) + 3) as pool:
        others = [pool.submit(ask, server, model="braid-tiny", prompt=f"sort: {i} 7 3 ->") for i in range(3)]
        crowd = list(pool.map(lambda fields: ask(server, **fields), REQUESTS))
        assert all(one.result()["choices"] for one in others)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for fields, one, other in zip(REQUESTS, alone, crowd, strict=True):
        assert one["choices"] == other["choices"], fields
        texts = [""] * len(one["choices"])
        reasons: list[Any] = [None] * len(texts)
        usage = None
        with server.open("/v1/completions", body(**fields, **options)) as answer:
            for _, event in events(answer):
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"]
                    reasons[choice["index"]] = choice["finish_reason"]
        assert texts == [choice["text"] for choice in one["choices"]], fields
        assert reasons == [choice["finish_reason"] for choice in one["choices"]]
        assert usage is not None
        assert usage["completion_tokens"] == one["usage"]["completion_tokens"]
        assert usage["decoding"]["forwards"] >= 1


def test_stop_rules_and_lengths_hold(server: Running) -> None:
    stopped = ask(server, stop=["for"])["choices"][0]
    whole = ask(server)["choices"][0]["text"]
    assert stopped["text"] == whole[: whole.index("for")]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "for")
    for length in (1, 7, 8, 9):
        cut = ask(server, max_tokens=length, ignore_eos=True, decoding={"eos": "never"})
        assert cut["usage"]["completion_tokens"] == length
        assert cut["choices"][0]["finish_reason"] == "length"
    assert re.fullmatch("( (Anna|Ben|Clara)){3}\n", ask(server, **REQUESTS[8])["choices"][0]["text"])
    judged = ask(server, **REQUESTS[1])
    assert len(judged["choices"][0]["logprobs"]["tokens"]) == judged["usage"]["completion_tokens"]


def answer_or_refusal(server: Running, **fields: Any) -> tuple[int, Any]:
    try:
        return 200, ask(server, **fields)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def test_every_policy_of_the_catalogue_answers_or_says_why_not(server: Running) -> None:
    refused = set()
    for name, policy in POLICIES.items():
        status, answer = answer_or_refusal(server, decoding={"policy": name}, max_tokens=12)
        if status == 200:
            assert answer["usage"]["decoding"]["forwards"] >= 1, name
            continue
        assert (status, answer["param"].split(".")[0]) == (400, "decoding"), (name, answer)
        if policy.topology is not Topology.BIDIRECTIONAL:
            refused.add(name)
    # A model that also generates token by token was not trained to judge its own tokens, and has no filter.
    assert refused == {"llada2_edit"}


def test_what_a_watched_block_shows_is_the_text_to_come(server: Running) -> None:
    asked = body(decoding={"policy": "low_confidence"}, logprobs=0, stream_options={"include_snapshots": True})
    shown: list[tuple[int, str | None, int]] = []
    tokens: list[str] = []
    with server.open("/v1/denoise/stream", asked) as answer:
        for kind, event in events(answer):
            if kind == "snapshot":
                shown += [(i, piece, len(tokens)) for i, piece in enumerate(event["pieces"], event["block_start"])]
            else:
                tokens += event["choices"][0]["logprobs"]["tokens"]
    # A reader who is slow misses snapshots, so only what is shown is judged.
    known = [(i, piece, sent) for i, piece, sent in shown if piece is not None and i < len(tokens)]
    assert all(piece == tokens[i] for i, piece, _ in known)
    assert any(i >= sent for i, _, sent in known), "some tokens are seen before they are sent"
    assert any(piece is None for _, piece, _ in shown)
    whole = ask(server, decoding={"policy": "low_confidence"}, logprobs=0)["choices"][0]
    assert tokens == whole["logprobs"]["tokens"]


def test_an_engine_killed_midway_changes_no_token(server: Running) -> None:
    fields = {"prompt": "def f(", "ignore_eos": True, "max_tokens": 300, "decoding": {"policy": "sequential"}}
    whole = ask(server, **fields)["choices"][0]["text"]
    text, is_killed = "", False
    with server.open("/v1/completions", body(**fields, stream=True)) as answer:
        for _, event in events(answer):
            text += "".join(choice["text"] for choice in event["choices"])
            if not is_killed and len(text) > 10:
                os.kill(children_of(server.process.pid)[0], signal.SIGKILL)
                is_killed = True
    assert is_killed
    assert text == whole


def test_the_metrics_tell_what_usage_tells(server: Running) -> None:
    def counted() -> list[float]:
        with server.open("/metrics") as answer:
            scrape = answer.read().decode()
        names = ("forwards", "commit_passes", "tokens", "requests")
        found = [re.search(rf"^braid_denoise_{name}_total{{[^}}]*}} (\S+)$", scrape, re.M) for name in names]
        return [float(one[1]) for one in found if one is not None]

    before = counted()
    usage = ask(server, n=2)["usage"]
    decoding = usage["decoding"]
    wanted = [decoding["forwards"], decoding["commit_passes"], usage["completion_tokens"], 2]
    assert [b - a for a, b in zip(before, counted(), strict=True)] == wanted
