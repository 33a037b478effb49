"""Requests for the diffusion benchmark: the tasks of the embedded model that have one right answer.

lists      copy, reverse, sort; insert, remove, replace at a place: about 6 tokens
records    a sentence as JSON: about 20 tokens
functions  the first line of a short Python function that the model knows by heart: about 35 tokens

The same seed gives the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from server.bench.speculation_work import Ask
from server.embedded import functions, tasks


def list_task(rng: random.Random) -> Ask:
    """A list task in the form the embedded models know; `expected` is its answer."""
    items = [str(digit) for digit in rng.sample(range(10), rng.randint(3, 6) + 1)]
    new = items.pop()
    index = rng.randrange(len(items))
    head, result = rng.choice(
        (
            ("copy", items),
            ("reverse", items[::-1]),
            ("sort", sorted(items)),
            (f"insert {new} at {index + 1}", [*items[:index], new, *items[index:]]),
            (f"remove at {index + 1}", items[:index] + items[index + 1 :]),
            (f"replace {index + 1} by {new}", [*items[:index], new, *items[index + 1 :]]),
        )
    )
    return Ask(f"{head}: {' '.join(items)} ->", 24, f" {' '.join(result)}\n")


def record_task(rng: random.Random) -> Ask:
    example = tasks.make_example("json", rng)
    return Ask(example.prompt, 48, example.answer)


def function_task(rng: random.Random) -> Ask:
    """`expected` is the body as the file has it, without its docstring."""
    texts = list(functions.parse_functions().values())
    head, body = functions.drop_docstring(rng.choice(texts)).split("\n", 1)
    return Ask(head, 96, body)


KINDS: dict[str, tuple[int, Callable[[random.Random], Ask]]] = {
    "lists": (6, list_task),
    "records": (1, record_task),
    "functions": (1, function_task),
}
"""Of each eight requests so many are of a kind: each of the eight tasks comes equally often."""


def make_asks(rng: random.Random, count: int) -> dict[str, list[Ask]]:
    """By kind, `count` in all or the fewest more that keep the shares."""
    eighths = -(-count // sum(share for share, _ in KINDS.values()))
    return {kind: [make(rng) for _ in range(share * eighths)] for kind, (share, make) in KINDS.items()}
