"""Requests for the speculation benchmark: three kinds of text that drafts are found in easily, sometimes and seldom.

code-edit  a function, then the first line of the same function with a name changed: most of the answer was seen
list       copy, sort, reverse or change a short list: part of the answer was seen
free       plain words to go on from: nothing of the answer was seen

The functions, names and lengths of lists are those the embedded model knows; any model can be asked. The same seed
gives the same requests.
Texts that do not end by themselves get lengths of their own: equal ones would end in the same step, and plain decoding,
whose streams all do a token a step, would have all new prompts in one step, which no server sees.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.workload import WORDS

FUNCTIONS = Path(__file__).resolve().parents[1] / "embedded" / "functions.txt"
MIN_LINES = 7
ITEMS = ("Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Gina", "Hugo", "Ivy", "Jack", "Kate", "Leo")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `expected` is what a client might predict of the answer, "" if nothing."""

    prompt: str
    max_tokens: int
    expected: str = ""

    def body(
        self, model: str, temperature: float, seed: int, with_prediction: bool = False, ignore_eos: bool = False
    ) -> dict[str, Any]:
        """The JSON body. Seeded, so that every policy is asked for the same text."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if ignore_eos:
            # End tokens have no text; shown, they bring events to time.
            body |= {"ignore_eos": True, "skip_special_tokens": False}
        if with_prediction and self.expected:
            body["prediction"] = {"type": "content", "content": self.expected}
        return body


def drawn_length(rng: random.Random, mean: int) -> int:
    """Most tokens of an answer: from half of `mean` to half as many again."""
    return rng.randint((mean + 1) // 2, mean + mean // 2)


def code_edit(rng: random.Random) -> Ask:
    text = rng.choice(_functions())
    head, body = text.split("\n", 1)
    name = head[len("def ") : head.index("(")]
    new = rng.choice((f"{name}_of", f"new_{name}", f"my_{name}", f"{name}2"))
    return Ask(f"{text}\n{head.replace(name, new, 1)}\n", 96, body)


def list_task(rng: random.Random) -> Ask:
    operation = rng.choice(("copy", "reverse", "sort"))
    count = rng.randint(4, 6)
    items = rng.sample(ITEMS, count) if rng.random() < 0.5 else [str(rng.randrange(10)) for _ in range(count)]
    return Ask(f"{operation}: {' '.join(items)} ->", drawn_length(rng, 32), f" {' '.join(items)}\n")


def free_text(rng: random.Random) -> Ask:
    return Ask(" ".join(rng.choices(WORDS, k=16)), drawn_length(rng, 64))


WORKLOADS: dict[str, Callable[[random.Random], Ask]] = {"code-edit": code_edit, "list": list_task, "free": free_text}


def _functions() -> list[str]:
    """Those of some length: an answer of a line or two is over before anything can be measured."""
    text = FUNCTIONS.read_text(encoding="utf-8")
    parts = [part.strip() + "\n" for part in re.split(r"\n+(?=def )", text) if part.startswith("def ")]
    return [part for part in parts if part.count("\n") >= MIN_LINES]
