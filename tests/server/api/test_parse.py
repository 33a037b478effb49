"""The body parser: JSON as JSON allows it, and no body that stops the interpreter for everybody."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.parse import parse_body

SIZE = 2 << 20


def filled(item: str) -> bytes:
    """A body of 2 MiB that repeats `item` in a list."""
    return ('{"prompt":[' + ",".join([item] * (SIZE // (len(item) + 1))) + "]}").encode()


def refusal(raw: bytes, **limits: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(raw, **limits)
    assert caught.value.status == 400
    return caught.value


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind < 6:
        texts = ["", "a", 'q"uo\\te', "[{:,", "\u00e9\U0001f600", "\x00\x1f", "\\\\", '\\"']
        return (None, True, rng.randrange(-(2**63), 2**63), rng.uniform(-1e300, 1e300), 0, rng.choice(texts))[kind]
    if kind < 8:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice('ab"[{:\\') * rng.randrange(4): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}


@pytest.mark.parametrize("seed", range(300))
def test_what_is_json_comes_out_as_any_parser_reads_it(seed: int) -> None:
    rng = random.Random(seed)
    body = {str(i): random_value(rng) for i in range(rng.randrange(6))}
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
    found = parse_body(raw)
    assert found == json.loads(raw)
    assert json.dumps(found) == json.dumps(json.loads(raw)), "1 and 1.0 and true are different values"


@pytest.mark.parametrize("seed", range(100))
def test_strings_do_not_count_and_structure_does_to_the_last_one(seed: int) -> None:
    rng = random.Random(seed)
    body = {str(i): random_value(rng) for i in range(1, 6)}
    raw = json.dumps(body).encode()

    def items(value: Any) -> int:
        if isinstance(value, list):
            return 1 + sum(map(items, value))
        if isinstance(value, dict):
            return 1 + len(value) + sum(map(items, value.values()))
        return 0

    assert parse_body(raw, max_items=items(body)) == body
    assert f"more than {items(body) - 1} lists" in refusal(raw, max_items=items(body) - 1).message


@pytest.mark.parametrize("item", ["[]", "{}", '{"a":1}', "[[]]", '{"a":[]}'])
def test_a_million_lists_or_objects_are_refused_before_they_are_built(item: str) -> None:
    raw = filled(item)
    before = time.thread_time()
    assert "lists, objects and names" in refusal(raw).message
    # Building them takes a second; counting, a few milliseconds. Processor time, not the clock.
    assert time.thread_time() - before < 0.3


@pytest.mark.parametrize("item", ["1", "0.1", '"a"', "null", "true", json.dumps('[{:\\"[{:' * 9)])
def test_long_lists_of_plain_values_and_code_are_welcome(item: str) -> None:
    prompt = parse_body(filled(item))["prompt"]
    assert len(prompt) == SIZE // (len(item) + 1)
    assert prompt[-1] == json.loads(item)


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e999", '"\\ud800"', "9" * 5000, str(2**65)])
@pytest.mark.parametrize("others", ["1", "0.5", '"a"', "null", "[1]"])
def test_the_field_of_a_bad_value_is_named_wherever_it_stands(bad: str, others: str) -> None:
    items = [others] * 20_000
    items[random.Random(bad).randrange(20_000)] = bad
    assert refusal(('{"model": "m", "stop": [' + ",".join(items) + "]}").encode()).param == "stop"


def test_a_huge_broken_body_is_refused_without_a_second_look() -> None:
    raw = filled("1")[:-2] + b",NaN]}"
    before = time.thread_time()
    assert "not valid JSON" in refusal(raw).message
    assert time.thread_time() - before < 0.3


def test_depth_is_bounded_and_never_recursed_into() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * depth + b"]" * depth + b"}"

    assert parse_body(nested(63))
    assert "nested deeper than 64" in refusal(nested(64)).message
    assert "nested too deeply" in refusal(nested(16_000)).message
