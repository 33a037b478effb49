"""Two models behind one address: the embedded model and, beside it, its draft model. Real processes, float32, HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.test_main import PATIENCE_S, Running, children_of, run, running

NAMES = ("braid-tiny", "small")
ASKED = (*NAMES, "small-diffusion")
"""The last is the second model denoising: one autoregressive and one diffusion model under one target."""
FLAGS = ("--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory", "32MiB")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    pair = ("--also-serve", "small=braid-tiny-draft", "--kv-shares", "3,1")
    with running(*FLAGS, *pair, "--drain-timeout", str(PATIENCE_S)) as started:
        yield started


def ask(server: Running, model: str | None, path: str = "/v1/completions", **fields: Any) -> Any:
    body = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "ignore_eos": True, **fields}
    body |= {} if model is None else {"model": model}
    with server.open(path, body) as answer:
        return json.load(answer)


def refused(server: Running, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.open(path, body or None)
    return caught.value.code, json.load(caught.value)["error"]


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What each model says in a server of its own."""
    texts = {}
    for name, model in zip(NAMES, ("braid-tiny", "braid-tiny-draft"), strict=True):
        with running(model, *FLAGS) as single:
            texts[name] = ask(single, model)["choices"][0]["text"]
            texts[f"{name}-diffusion"] = ask(single, f"{model}-diffusion")["choices"][0]["text"]
    assert texts["small"] != texts["braid-tiny"]
    return texts


def test_each_name_answers_with_its_model_whoever_else_is_asking(server: Running, alone: dict[str, str]) -> None:
    found: dict[tuple[str, int], Any] = {}

    def call(name: str, index: int) -> None:
        found[name, index] = ask(server, name)

    threads = [threading.Thread(target=call, args=(name, i)) for name in ASKED for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (name, _), answer in found.items():
        assert answer["model"] == name
        assert answer["choices"][0]["text"] == alone[name]
        assert ("decoding" in answer["usage"]) == (name == "small-diffusion")
    assert len(found) == 12
    assert ask(server, None)["model"] == "braid-tiny"


def test_models_are_listed_each_with_its_own_facts(server: Running) -> None:
    with server.open("/v1/models") as answer:
        cards = json.load(answer)["data"]
    # Each can denoise, too, under a second name.
    assert [card["id"] for card in cards] == [name + end for name in NAMES for end in ("", "-diffusion")]
    assert [card["root"] for card in cards] == [name for name in NAMES for _ in range(2)]
    lengths = [card["max_model_len"] for card in cards]
    # The flag is the first model's; the other has its own context, as far as its pages go.
    assert lengths[:2] == [512, 512]
    assert lengths[2] == lengths[3] > 512
    with server.open("/v1/models/small") as answer:
        assert json.load(answer)["max_model_len"] == lengths[2]
    assert refused(server, "/v1/models/none")[0] == 404
    long = list(range(5, 5 + 600))
    assert ask(server, "small", prompt=long, max_tokens=1)["usage"]["prompt_tokens"] == 600
    code, error = refused(server, "/v1/completions", model="braid-tiny", prompt=long, max_tokens=1)
    assert (code, error["code"]) == (400, "context_length_exceeded")


def test_an_unknown_name_is_a_404_on_every_route(server: Running) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        code, error = refused(server, path, model="braid-tiny-draft", **body)
        assert (code, error["code"]) == (404, "model_not_found")
        assert "this server has braid-tiny, braid-tiny-diffusion, small, small-diffusion" in error["message"]


def test_chats_and_tokens_are_those_of_the_model_asked(server: Running) -> None:
    messages = [{"role": "user", "content": "sort: 3 1 2"}]
    for name in NAMES:
        answer = ask(server, name, "/v1/chat/completions", messages=messages, prompt=None, max_tokens=8)
        assert answer["model"] == name
        counted = ask(server, name, "/tokenize", prompt="a b c", max_tokens=None, temperature=None)
        assert ask(server, name, "/detokenize", tokens=counted["tokens"], prompt=None)["prompt"] == "a b c"
        with server.open("/v1/models/" + name) as card:
            assert counted["max_model_len"] == json.load(card)["max_model_len"]


def test_metrics_and_health_are_of_both(server: Running) -> None:
    for name in NAMES:
        ask(server, name)
    with server.open("/health/generate") as answer:
        assert answer.status == 200
    with server.open("/metrics") as answer:
        text = answer.read().decode()
    for name in NAMES:
        for metric, least in (
            ("braid_steps_total", 5),
            ("vllm:generation_tokens_total", 60),
            ("braid_engine_ready", 1),
            ("braid_kv_pages", 1),
            ("vllm:time_to_first_token_seconds_count", 1),
        ):
            values = re.findall(rf'^{metric}{{[^}}]*model_name="{name}"[^}}]*}} (\S+)$', text, re.MULTILINE)
            assert values, (metric, name)
            assert max(map(float, values)) >= least
    assert len(re.findall("^braid_event_loop_lag_seconds_count", text, re.MULTILINE)) == 1
    pages = [int(float(count)) for count in re.findall(r'^braid_kv_pages{.*state="total"} (\S+)$', text, re.MULTILINE)]
    assert len(pages) == 2


def test_streams_of_both_go_on_after_a_kill_and_a_drain_lets_both_finish(
    server: Running, alone: dict[str, str]
) -> None:
    texts: dict[tuple[str, str], str] = {}
    started = threading.Barrier(3, timeout=PATIENCE_S)

    def stream(name: str, kind: str, max_tokens: int) -> None:
        body = {"model": name, "prompt": "Once upon a time", "max_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        text = ""
        with server.open("/v1/completions", body) as events:
            for number, line in enumerate(events):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += event["choices"][0]["text"]
                if number == 2:
                    started.wait()
        texts[name, kind] = text

    def both(kind: str, max_tokens: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=stream, args=(name, kind, max_tokens)) for name in NAMES]
        for thread in threads:
            thread.start()
        started.wait()
        return threads

    for thread in both("whole", 400):
        thread.join()
    threads = both("killed", 400)
    engine = children_of(server.process.pid)[0]
    os.kill(engine, signal.SIGKILL)
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + PATIENCE_S
    while engine in children_of(server.process.pid) or not server.is_ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    threads = both("drained", 400)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    for name in NAMES:
        assert texts[name, "whole"].startswith(alone[name])
        assert texts[name, "killed"] == texts[name, "whole"]
        assert texts[name, "drained"] == texts[name, "whole"]
    code, out, err = server.end()
    assert code == 0, err
    assert "model     small: " in out


def test_a_name_that_the_first_model_has_for_denoising_is_refused() -> None:
    code, output = run(*FLAGS, "--also-serve", "braid-tiny-diffusion=braid-tiny-draft", "--port", "0")
    assert code == 1, output
    assert "error: " in output
    assert "braid-tiny-diffusion" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--also-serve", "braid-tiny"], 2, "'braid-tiny' is the name of two models"),
        (["--also-serve", "=x"], 2, "also-serve is '=x': expected NAME=MODEL"),
        (["--also-serve", "b=braid-tiny-draft", "--kv-shares", "1"], 2, "kv-shares has 1 parts, but models are 2"),
        (["--kv-shares", "1,0"], 2, "expected whole numbers above 0"),
        (["--also-serve", "b=/no/such/folder", "--port", "0"], 1, "model '/no/such/folder' is neither a folder here"),
    ],
)
def test_a_pair_that_cannot_be_says_why(arguments: list[str], code: int, message: str) -> None:
    result, output = run(*arguments)
    assert result == code, output
    assert message in output
    assert "Traceback" not in output
