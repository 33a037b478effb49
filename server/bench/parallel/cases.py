"""The cases: list tasks of the embedded models, cut so that theory applies to them, and how an answer is judged.

An item is one token (a digit or a name, with the space before it) and no list has an item twice, so that position j of
an answer is its token j, and a distribution over tokens is one over items. Prompts and the checker are those of
`server/embedded/tasks.py`, which the models are trained on. The same seed gives the same cases.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from server.bench.client import BenchError
from server.bench.parallel.closed_forms import answer_length
from server.embedded import tasks

DETERMINISTIC = ("copy", "reverse", "sort", "insert", "remove", "replace")
RANDOM = ("shuffle", "insert-random", "remove-random", "replace-random")
TASKS = (*DETERMINISTIC, *RANDOM)
LENGTHS = range(3, 7)
MAX_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Case:
    """One question. `items` are those of the list, `new` the one that is put in, "" if none; `seed` is of its noise."""

    example: tasks.Example
    items: tuple[str, ...]
    new: str
    seed: int

    @property
    def task(self) -> str:
        return self.example.task

    @property
    def answer_len(self) -> int:
        """Items of a right answer: its first so many tokens."""
        return answer_length(self.task, len(self.items))

    def is_right(self, text: str) -> bool:
        """Strictly: the whole text, but for white space around it, is an answer."""
        return tasks.check(self.example, text)


def make_cases(task: str, count: int, seed: int, num_tokens: Callable[[str], int]) -> list[Case]:
    """`count` cases of lists of 3, 4, 5, 6, 3, ... items. num_tokens: of a text, by the model's tokenizer.

    Raises BenchError if such lists cannot be had from this tokenizer.
    """
    return [
        _make_case(task, LENGTHS[i % len(LENGTHS)], f"parallel:{seed}:{task}:{i}", num_tokens) for i in range(count)
    ]


def _make_case(task: str, length: int, key: str, num_tokens: Callable[[str], int]) -> Case:
    rng = random.Random(key)
    for _ in range(MAX_DRAWS):
        example = tasks.make_example(task, rng)
        head, _, rest = example.prompt.removesuffix(" ->").partition(": ")
        items, new = tuple(rest.split(" ")), _new_item(head.split(" "))
        words = [*items, new] if new else list(items)
        if len(items) == length and len(set(words)) == len(words) and all(num_tokens(f" {w}") == 1 for w in words):
            return Case(example, items, new, rng.getrandbits(62))
    raise BenchError(
        f"no {task} list of {length} different items with one token each was found; "
        "parallel needs the tokenizer of the embedded models"
    )


def _new_item(head: list[str]) -> str:
    """Of `insert ITEM [at PLACE]` and `replace [PLACE] by ITEM`; "" of the other operations."""
    return {"insert": head[1:2], "replace": head[-1:]}.get(head[0], [""])[0]
