"""The random list tasks as distributions: all right answers, each as likely as the task makes it.

For selectors that choose positions by what the distributions look like (entropy, margin), which positions are drawn
together depends on what was drawn before, so no formula of the partition alone can hold. But at every step that begins
with a right beginning, the chance that it ends with one is known; its complements, summed along the way, are in the
mean the share of wrong answers of a perfect model, and the difference from what was counted is a martingale whose
variance is known too. The choice of a step must not look at what the step draws: that leaves out selectors that go by
the drawn token's own probability.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Answer = tuple[str, ...]
Law = Mapping[Answer, float]


def law_of(task: str, items: Sequence[str], new: str = "") -> dict[Answer, float]:
    """Every right answer of a random task and its probability. Raises KeyError for a task with one answer only."""
    items = tuple(items)
    n = len(items)
    if task == "shuffle":
        answers = [order for order in itertools.permutations(items) if order != items]
    elif task == "replace-random":
        answers = [(*items[:i], new, *items[i + 1 :]) for i in range(n)]
    elif task == "insert-random":
        answers = [(*items[:i], new, *items[i:]) for i in range(n + 1)]
    elif task == "remove-random":
        answers = [items[:i] + items[i + 1 :] for i in range(n)]
    else:
        raise KeyError(task)
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}


@dataclass(frozen=True, slots=True)
class Expectation:
    """Expected accuracy of one case and the variance of the count's difference from it."""

    accuracy: float
    variance: float


def follow(law: Law, partition: Sequence[Sequence[int]], answer: Sequence[str]) -> Expectation:
    """Walk through the steps that really led to `answer` and add up the risks that a perfect model would have run.

    A position that `answer` lacks counts as wrong from its step on, where the walk ends.
    """
    left = dict(law)
    accuracy, variance = 1.0, 0.0
    for step in partition:
        chance = _survival(left, step)
        accuracy -= 1 - chance
        variance += chance * (1 - chance)
        if any(position >= len(answer) for position in step):
            break
        left = {a: w for a, w in left.items() if all(a[p] == answer[p] for p in step)}
        if not left:
            break
    return Expectation(accuracy, variance)


def _survival(law: Law, step: Sequence[int]) -> float:
    """The chance that the positions of `step`, drawn independently of each other, together begin a right answer."""
    total = sum(law.values())
    marginals: list[dict[str, float]] = [{} for _ in step]
    together: set[Answer] = set()
    for answer, weight in law.items():
        together.add(tuple(answer[p] for p in step))
        for marginal, p in zip(marginals, step, strict=True):
            marginal[answer[p]] = marginal.get(answer[p], 0.0) + weight / total
    return sum(math.prod(m[v] for m, v in zip(marginals, values, strict=True)) for values in together)
