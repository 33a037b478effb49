"""Speculation through the whole program: real processes, the embedded model in float32, HTTP. Drafts change no token,
no logprob and no end of a text, streamed or whole, also when the engine is killed midway; usage and metrics agree."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from server.bench.speculation_work import WORKLOADS
from tests.server.test_main import Running, children_of, run, running

LIST = "copy: Anna Ben Clara David Emma Felix ->"
LOOP = "".join(f"x{i} = x{i} + 1\n" for i in range(4)) * 3


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running("--dtype", "float32", "--speculation", "on", "--max-model-len", "512") as started:
        yield started


def ask(server: Running, **fields: Any) -> Any:
    body = {"model": "braid-tiny", "max_tokens": 48, "temperature": 0, "seed": 7, "return_token_ids": True, **fields}
    with server.open("/v1/completions", body) as answer:
        return json.load(answer)


def streamed(server: Running, **fields: Any) -> tuple[list[list[int]], str, dict[str, Any]]:
    """Token ids of each event, the text, and the usage of the end."""
    body = {"model": "braid-tiny", "max_tokens": 48, "temperature": 0, "seed": 7, "return_token_ids": True, **fields}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    ids: list[list[int]] = []
    text = ""
    usage: dict[str, Any] = {}
    with server.open("/v1/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    ids.append(choice["token_ids"])
                    text += choice["text"]
    return ids, text, usage


def off(**fields: Any) -> dict[str, Any]:
    return {**fields, "speculation": {"mode": "off"}}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choice.items() if name != "logprobs"}


def requests() -> list[dict[str, Any]]:
    rng = random.Random(1)
    edits = [WORKLOADS["code-edit"](rng) for _ in range(4)]
    asked: list[dict[str, Any]] = [{"prompt": edit.prompt} for edit in edits]
    asked += [{"prompt": edit.prompt, "temperature": 0.8, "logprobs": 2} for edit in edits[:2]]
    asked += [
        {"prompt": edits[0].prompt, "prediction": {"type": "content", "content": edits[0].expected}},
        {"prompt": LOOP, "ignore_eos": True, "logprobs": 0},
        {"prompt": LOOP, "n": 2, "temperature": 1.0, "ignore_eos": True, "repetition_penalty": 1.1},
        {"prompt": LOOP, "ignore_eos": True, "min_tokens": 30, "stop": ["4 = x"]},
        {"prompt": LIST, "guided_regex": "( (Anna|Ben|Clara|David|Emma|Felix)){6}\n"},
    ]
    return asked


def test_drafts_change_nothing_that_a_client_sees(server: Running) -> None:
    accepted = 0
    for fields in requests():
        with_drafts, without = ask(server, **fields), ask(server, **off(**fields))
        assert without["usage"]["speculation"] == {"drafted": 0, "accepted": 0, "steps": 0}
        assert [without_ids(choice) for choice in with_drafts["choices"]] == [
            without_ids(choice) for choice in without["choices"]
        ], fields
        for choice, other in zip(with_drafts["choices"], without["choices"], strict=True):
            if choice["logprobs"] is not None:
                assert choice["logprobs"]["tokens"] == other["logprobs"]["tokens"]
                assert choice["logprobs"]["text_offset"] == other["logprobs"]["text_offset"]
                assert choice["logprobs"]["token_logprobs"] == pytest.approx(
                    other["logprobs"]["token_logprobs"], abs=1e-4
                )
        usage = with_drafts["usage"]["speculation"]
        assert usage["accepted"] <= usage["drafted"]
        assert usage["steps"] <= usage["drafted"]
        accepted += usage["accepted"]
    assert accepted > 50, "drafts of repeated text are accepted"


def test_a_prediction_is_used_and_counted(server: Running) -> None:
    text = ask(server, prompt="def fibonacci(n):", **off())["choices"][0]["text"]
    asked = {"prompt": "def fibonacci(n):", "speculation": {"drafter": "prediction"}}
    usage = ask(server, **asked, prediction={"type": "content", "content": text})["usage"]
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == usage["speculation"]["accepted"] > 20
    assert details["rejected_prediction_tokens"] == usage["speculation"]["drafted"] - usage["speculation"]["accepted"]
    wrong = ask(server, **asked, prediction={"type": "content", "content": "nothing of the kind"})
    assert wrong["choices"][0]["text"] == text


def test_a_stream_brings_the_same_tokens_several_at_a_time(server: Running) -> None:
    fields = {"prompt": LOOP, "ignore_eos": True}
    whole = ask(server, **off(**fields))["choices"][0]
    ids, text, usage = streamed(server, **fields)
    assert [token for event in ids for token in event] == whole["token_ids"]
    assert text == whole["text"]
    assert usage["speculation"]["accepted"] > 10
    assert max(map(len, ids)) > 1


def test_the_metrics_tell_what_usage_tells(server: Running) -> None:
    def counted() -> dict[str, float]:
        with server.open("/metrics") as answer:
            scrape = answer.read().decode()
        names = ("num_draft_tokens", "num_accepted_tokens", "num_drafts")
        return {
            name: float(found[1])
            for name in names
            if (found := re.search(rf"^vllm:spec_decode_{name}_total{{[^}}]*}} (\S+)$", scrape, re.M))
        }

    before = counted()
    usage = ask(server, prompt=LOOP, ignore_eos=True, n=2)["usage"]["speculation"]
    after = counted()
    assert {name: after[name] - before[name] for name in after} == {
        "num_draft_tokens": usage["drafted"],
        "num_accepted_tokens": usage["accepted"],
        "num_drafts": usage["steps"],
    }
    with server.open("/metrics") as answer:
        by_drafter = re.findall(r"^braid_spec_accepted_tokens_total{.*} (\S+)$", answer.read().decode(), re.M)
    assert sum(map(float, by_drafter)) == after["num_accepted_tokens"]


def test_an_engine_killed_midway_changes_no_token_and_loses_no_count(server: Running) -> None:
    fields = {"prompt": LOOP, "ignore_eos": True, "max_tokens": 300}
    whole = ask(server, **off(**fields))["choices"][0]["text"]
    body = {"model": "braid-tiny", "temperature": 0, "seed": 7, **fields, "stream": True}
    body["stream_options"] = {"include_usage": True}
    usage: dict[str, Any] = {}
    text, is_killed = "", False
    with server.open("/v1/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                usage = event.get("usage") or usage
                text += "".join(choice["text"] for choice in event["choices"])
                if not is_killed and text:
                    os.kill(children_of(server.process.pid)[0], signal.SIGKILL)
                    is_killed = True
    assert text == whole
    assert usage["speculation"]["accepted"] > 0


def test_a_start_that_cannot_draft_says_why() -> None:
    code, said = run("serve", "--draft-model", "/nowhere/draft", "--port", "0")
    assert code != 0
    assert "/nowhere/draft" in said
    assert len(said.strip().splitlines()) == 1
