"""Generated tasks whose answers a program can check: lists, sums, JSON records, short chats.

`make_example(task, rng)` draws a prompt and one right answer; `check(example, text)` says whether a completion is
right, strictly (nothing missing, nothing extra but surrounding whitespace). Everything is a pure function of the given
`random.Random`, so a seed fixes the data. The list tasks are those of ParallelBench's waiting line (diffusion.md 11).
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.embedded import words

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
MIN_ITEMS = 3
MAX_ITEMS = 6


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt as a client would send it, and one right answer; the two texts are tokenized separately."""

    task: str
    prompt: str
    answer: str


def _items(rng: random.Random, count: int) -> list[str]:
    """`count` items of one kind: digits (half of the draws), two-digit numbers or names. Names never repeat."""
    kind = rng.random()
    if kind < 0.5:
        return [str(rng.randrange(10)) for _ in range(count)]
    if kind < 0.65:
        return [str(rng.randrange(100)) for _ in range(count)]
    return rng.sample(words.NAMES, count)


def sort_items(items: Sequence[str]) -> list[str]:
    """Numbers by value, names by the alphabet."""
    return sorted(items, key=lambda item: (int(item), "") if item.isdigit() else (0, item))


def _list_example(task: str, operation: str, items: Sequence[str], result: Sequence[str]) -> Example:
    return Example(task, f"{operation}: {' '.join(items)} ->", f" {' '.join(result)}\n")


def _make_copy(rng: random.Random) -> Example:
    items = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS))
    return _list_example("copy", "copy", items, items)


def _make_reverse(rng: random.Random) -> Example:
    items = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS))
    return _list_example("reverse", "reverse", items, items[::-1])


def _make_sort(rng: random.Random) -> Example:
    items = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS))
    return _list_example("sort", "sort", items, sort_items(items))


def _make_shuffle(rng: random.Random) -> Example:
    while True:
        items = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS))
        result = rng.sample(items, len(items))
        if result != items:
            return _list_example("shuffle", "shuffle", items, result)


def _make_insert(rng: random.Random, at_random: bool) -> Example:
    *items, new = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS) + 1)
    index = rng.randrange(len(items) + 1)
    result = [*items[:index], new, *items[index:]]
    where = "" if at_random else f" at {index + 1}"
    return _list_example("insert-random" if at_random else "insert", f"insert {new}{where}", items, result)


def _make_remove(rng: random.Random, at_random: bool) -> Example:
    items = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS))
    index = rng.randrange(len(items))
    result = items[:index] + items[index + 1 :]
    where = "" if at_random else f" at {index + 1}"
    return _list_example("remove-random" if at_random else "remove", f"remove{where}", items, result)


def _make_replace(rng: random.Random, at_random: bool) -> Example:
    *items, new = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS) + 1)
    index = rng.randrange(len(items))
    result = [*items[:index], new, *items[index + 1 :]]
    where = "" if at_random else f" {index + 1}"
    return _list_example("replace-random" if at_random else "replace", f"replace{where} by {new}", items, result)


def _sum(rng: random.Random) -> tuple[str, int]:
    operator = rng.choice("++-*")
    if operator == "*":
        left, right = rng.randrange(11), rng.randrange(11)
        return f"{left} * {right}", left * right
    limit = 20 if rng.random() < 0.6 else 100
    left, right = rng.randrange(limit), rng.randrange(limit)
    if operator == "-":
        left, right = max(left, right), min(left, right)
        return f"{left} - {right}", left - right
    return f"{left} + {right}", left + right


def _make_arithmetic(rng: random.Random) -> Example:
    expression, value = _sum(rng)
    return Example("arithmetic", f"{expression} =", f" {value}\n")


def _make_json(rng: random.Random) -> Example:
    name, age, town = rng.choice(words.NAMES), rng.randrange(10, 100), rng.choice(words.TOWNS)
    colour = rng.choice(words.COLOURS)
    form = rng.randrange(4)
    if form == 0:
        text, record = f"{name} is {age} and lives in {town}", {"name": name, "age": age, "city": town}
    elif form == 1:
        text, record = f"{name} from {town} is {age}", {"name": name, "age": age, "city": town}
    elif form == 2:
        text, record = f"{name} is {age} and likes {colour}", {"name": name, "age": age, "color": colour}
    else:
        text, record = f"{name} lives in {town}", {"name": name, "city": town}
    return Example("json", f"record: {text} ->", f" {json.dumps(record)}\n")


def chat_prompt(question: str, system: str | None = None) -> str:
    """One user turn in the ChatML layout of `tokenizer_config.json`, ready for the assistant's answer."""
    head = f"{IM_START}system\n{system}{IM_END}\n" if system else ""
    return f"{head}{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def _chat_list(rng: random.Random) -> tuple[str, str]:
    items = _items(rng, rng.randint(MIN_ITEMS, MAX_ITEMS - 1))
    text = " ".join(items)
    form = rng.randrange(3)
    if form == 0:
        return f"Sort these: {text}", " ".join(sort_items(items))
    if form == 1:
        return f"Reverse this list: {text}", " ".join(items[::-1])
    return f"Repeat this: {text}", text


def _make_chat(rng: random.Random) -> Example:
    draw = rng.random()
    if draw < 0.4:
        question, answer = rng.choice(words.SMALL_TALK)
    elif draw < 0.55:
        country, town = rng.choice(sorted(words.CAPITALS.items()))
        question, answer = f"What is the capital of {country}?", f"The capital of {country} is {town}."
    elif draw < 0.7:
        word, other = rng.choice(sorted(words.OPPOSITES.items()))
        if rng.random() < 0.5:
            word, other = other, word
        question, answer = f"What is the opposite of {word}?", f"The opposite of {word} is {other}."
    elif draw < 0.85:
        expression, value = _sum(rng)
        question, answer = f"What is {expression}?", f"{expression} = {value}"
    else:
        question, answer = _chat_list(rng)
    system = rng.choice(words.SYSTEM_PROMPTS) if rng.random() < 0.3 else None
    return Example("chat", chat_prompt(question, system), f"{answer}{IM_END}")


MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "copy": _make_copy,
    "reverse": _make_reverse,
    "sort": _make_sort,
    "shuffle": _make_shuffle,
    "insert": lambda rng: _make_insert(rng, at_random=False),
    "insert-random": lambda rng: _make_insert(rng, at_random=True),
    "remove": lambda rng: _make_remove(rng, at_random=False),
    "remove-random": lambda rng: _make_remove(rng, at_random=True),
    "replace": lambda rng: _make_replace(rng, at_random=False),
    "replace-random": lambda rng: _make_replace(rng, at_random=True),
    "arithmetic": _make_arithmetic,
    "json": _make_json,
    "chat": _make_chat,
}

# Sorting and edits at an index need more examples than copying. The random ones have as many as it takes to learn how
# probable each right answer is: the selectors are measured against closed forms that suppose exactly that.
WEIGHTS: dict[str, float] = {
    "copy": 1.0, "reverse": 1.5, "sort": 3.0, "shuffle": 1.0, "insert": 2.0, "insert-random": 1.2, "remove": 2.0,
    "remove-random": 0.8, "replace": 2.5, "replace-random": 1.2, "arithmetic": 2.0, "json": 1.0, "chat": 2.0,
}  # fmt: skip


def make_example(task: str, rng: random.Random) -> Example:
    """Draw one example of `task`. Raises KeyError for a task that is not in `MAKERS`."""
    return MAKERS[task](rng)


def draw_example(rng: random.Random, weights: Mapping[str, float] = WEIGHTS) -> Example:
    """Draw a task by its weight, then an example of it."""
    task = rng.choices(list(weights), weights=list(weights.values()))[0]
    return make_example(task, rng)


_LIST_PROMPT = re.compile(r"^(?P<operation>[a-z]+)(?P<rest>[^:]*): (?P<items>.*) ->$")


def _one_edit(items: list[str], result: list[str], operation: str, new: str) -> bool:
    """Whether `result` is `items` after exactly one edit of the kind, at any place."""
    for index in range(len(items) + (operation == "insert")):
        head, tail = items[:index], items[index + (operation != "insert") :]
        if result == ([*head, *tail] if operation == "remove" else [*head, new, *tail]):
            return True
    return False


def _check_list(example: Example, text: str) -> bool:
    match = _LIST_PROMPT.match(example.prompt)
    if match is None:
        raise ValueError(f"not a list prompt: {example.prompt!r}")
    items, result = match["items"].split(" "), text.strip().split(" ")
    operation = match["operation"]
    if operation == "shuffle":
        return Counter(result) == Counter(items) and result != items
    if example.task.endswith("-random"):
        return _one_edit(items, result, operation, match["rest"].split(" ")[-1])
    return text.strip() == example.answer.strip()


def _check_json(example: Example, text: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(example.answer))
    except ValueError:
        return False


def check(example: Example, text: str) -> bool:
    """Whether `text`, a completion without its end token, answers `example`. Random tasks accept every right answer."""
    if example.task == "json":
        return _check_json(example, text)
    if example.task in ("arithmetic", "chat"):
        return text.strip() == example.answer.removesuffix(IM_END).strip()
    return _check_list(example, text)
