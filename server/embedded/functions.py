"""Short Python functions, written for this project, and their variations: the part of the data that teaches code.

`functions.txt` is plain Python text, one function after another. `draw_function` renames a function and its arguments
and keeps or drops the docstring, so that `def fibonacci(n):` and `def fib(num):` both complete. Nothing is executed.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Sequence
from pathlib import Path

from server.embedded.tasks import IM_END, Example, chat_prompt

SOURCE = Path(__file__).with_name("functions.txt")
"""Python text; not a module, so that it reads as a person writes it, without annotations."""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "fibonacci": ("fib",), "factorial": ("fact",), "gcd": ("greatest_common_divisor",), "reverse_string": ("reverse",),
    "is_prime": ("prime",), "quick_sort": ("quicksort",), "merge_sort": ("mergesort",), "average": ("mean",),
    "find_max": ("max_value",), "find_min": ("min_value",), "remove_duplicates": ("unique",), "power": ("pow",),
    "is_palindrome": ("palindrome",), "sum_list": ("total",), "hello": ("greet",), "absolute": ("abs_value",),
}  # fmt: skip

OTHER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "n": ("number", "num", "x"), "items": ("numbers", "values", "lst", "arr"), "text": ("s", "string"),
    "target": ("value", "key"), "a": ("x",), "b": ("y",), "first": ("a",), "second": ("b",),
}  # fmt: skip

PLAIN_SHARE = 0.6
"""Share of draws that keep the names as they stand in the file: what a person is most likely to type."""


def parse_functions() -> dict[str, str]:
    """The text of each function of `SOURCE`, by name, each ending in one newline."""
    source = SOURCE.read_text(encoding="utf-8")
    tree = ast.parse(source)
    texts = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            texts[node.name] = (ast.get_source_segment(source, node) or "") + "\n"
    return texts


def _rename(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


def _arguments(text: str) -> list[str]:
    inside = text[text.index("(") + 1 : text.index(")")]
    return [name.strip() for name in inside.split(",") if name.strip()]


def drop_docstring(text: str) -> str:
    """The function without its one-line docstring."""
    return re.sub(r'    """.*?"""\n', "", text)


def vary(text: str, rng: random.Random) -> str:
    """One variation of a function: names (kept in `PLAIN_SHARE` of the draws), then the docstring kept or dropped."""
    name = text[len("def ") : text.index("(")]
    if rng.random() > PLAIN_SHARE:
        text = _rename(text, name, rng.choice((name, *OTHER_NAMES.get(name, ()))))
        for argument in _arguments(text):
            new = rng.choice((argument, *OTHER_ARGUMENTS.get(argument, ())))
            if not re.search(rf"\b{new}\b", text):
                text = _rename(text, argument, new)
    if rng.random() < 0.7:
        text = drop_docstring(text)
    return text


def draw_function(texts: Sequence[str], rng: random.Random) -> Example:
    """A function as an example: usually the `def` line (or less of it) as the prompt, sometimes asked for in a chat."""
    text = vary(rng.choice(texts), rng)
    head, body = text.split("\n", 1)
    draw = rng.random()
    if draw < 0.6:
        return Example("function", head, f"\n{body}")
    if draw < 0.75:
        return Example("function", f"{head}\n", body)
    if draw < 0.9:
        name = head[: head.index("(")]
        return Example("function", name, f"{text.removeprefix(name)}")
    wanted = head[len("def ") : head.index("(")].replace("_", " ")
    return Example("function", chat_prompt(f"Write a Python function: {wanted}"), f"{text.rstrip()}{IM_END}")
