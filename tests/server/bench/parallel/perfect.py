"""A decoder that knows each task's law exactly and draws k items at once: for it, theory is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.bench.client import BenchError
from server.bench.parallel.cases import RANDOM, Case
from server.bench.parallel.laws import law_of
from server.bench.parallel.measure import Answer
from server.bench.parallel.sweep import Setting

Steps = Callable[[Setting, int], list[tuple[int, ...]]]


def k_a_step(setting: Setting, length: int) -> list[tuple[int, ...]]:
    """So many positions at once, left to right, as the setting has for a value; one by one where it has none."""
    k = max(1, int(setting.value or 1))
    return [tuple(range(i, min(i + k, length))) for i in range(0, length, k)]


@dataclass
class PerfectDecoder:
    """`slip`: how often it spoils an answer that it would have got right, the model's own error."""

    slip: float = 0.0
    steps: Steps = k_a_step
    refuses: str = ""

    def answer(self, cases: Sequence[Case], setting: Setting) -> list[Answer]:
        if setting.policy == self.refuses:
            raise BenchError(f"{setting.label}: no such file")
        return [self._answer(case, setting) for case in cases]

    def _answer(self, case: Case, setting: Setting) -> Answer:
        rng = random.Random(f"{case.seed} {setting.label}")
        steps = self.steps(setting, case.answer_len)
        if case.task in RANDOM:
            words = draw(law_of(case.task, case.items, case.new), steps, rng)
        else:
            words = case.example.answer.split()
        if rng.random() < self.slip:
            words = [*words[:-1], "?"]
        tokens = (*(f" {word}" for word in words), "\n", "")
        is_plain = setting.decoding is None
        done = () if is_plain else (*steps, (len(words), len(words) + 1))
        return Answer("".join(tokens), tokens, len(tokens) if is_plain else len(steps) + 1, 0, done)


def draw(law: dict[tuple[str, ...], float], steps: Sequence[Sequence[int]], rng: random.Random) -> list[str]:
    """Items of a step independently of each other, each from the exact distribution given what is fixed."""
    found: dict[int, str] = {}
    left = law
    for step in steps:
        pool = left or law  # once wrong, nothing agrees any more and anything may be drawn
        found |= {p: rng.choices(list(pool), list(pool.values()))[0][p] for p in step}
        left = {a: w for a, w in left.items() if all(a[p] == found[p] for p in step)}
    return [found[p] for p in sorted(found)]
