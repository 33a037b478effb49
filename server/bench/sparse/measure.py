"""Questions to the engine and its answers: how many are right with which attention, and how fast decode steps are."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol

from scheduler.types import Attention, AttentionMethod
from server.embedded.pairs import VALUE_LEN, Question, draw_questions, is_right

PER_CONTEXT = 10
"""Questions about one context; it is read once."""
DENSE: Literal["dense"] = "dense"


class Answers(Protocol):
    """What is needed of an engine; `answers.RetrievalEngine` is one."""

    def answer(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, attention: Attention | Literal["dense"]
    ) -> list[tuple[int, ...]]:
        """The greedy continuations, of exactly so many tokens each."""
        ...


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `count` questions have the whole value; `by_token` counts the right tokens at each of its places. The
    first is computed with the prompt, densely."""

    length: int
    method: str
    budget: int
    count: int
    right: int
    by_token: tuple[int, ...]

    @property
    def share(self) -> float:
        return self.right / self.count


@dataclass(frozen=True, slots=True)
class Speed:
    """`ms` a decode step with all streams in it, the median of the rounds; `ratio` the median of dense / this."""

    length: int
    method: str
    budget: int
    streams: int
    ms: float
    ratio: float


def attention_of(method: str, budget: int) -> Attention | Literal["dense"]:
    return DENSE if method == DENSE else Attention(AttentionMethod(method), budget)


def ask(engine: Answers, length: int, count: int, budgets: dict[str, int], seed: int) -> Iterator[list[Accuracy]]:
    """Counts over one context after another, of every method, until `count` questions were asked of each.

    budgets  of each method, in keys; dense has one for show
    """
    right = dict.fromkeys(budgets, 0)
    by_token = {method: [0] * VALUE_LEN for method in budgets}
    asked = 0
    for context in range(-(-count // PER_CONTEXT)):
        rng = random.Random(f"sparse:{seed}:{length}:{context}")
        questions = draw_questions(rng, length, min(PER_CONTEXT, count - asked))
        asked += len(questions)
        for method, budget in budgets.items():
            prompts = [question.prompt for question in questions]
            found = engine.answer(prompts, VALUE_LEN, attention_of(method, budget))
            for question, tokens in zip(questions, found, strict=True):
                right[method] += is_right(question, tokens)
                for place in range(VALUE_LEN):
                    by_token[method][place] += tokens[place] == question.answer[place]
        yield [Accuracy(length, m, budget, asked, right[m], tuple(by_token[m])) for m, budget in budgets.items()]


def race(
    engine: Answers, length: int, streams: int, num_tokens: int, rounds: int, budgets: dict[str, int], seed: int
) -> list[Speed]:
    """Decode steps of `streams` sequences, each with a context of its own, by every method, in rounds that begin with
    another method each. The prompts' time is taken out: the same answers cut at their first token are timed, too."""
    prompts = _prompts(length, streams, seed)
    for method, budget in budgets.items():  # the contexts are read, and what is compiled or allocated once is
        engine.answer(prompts, 2, attention_of(method, budget))
    times: dict[str, list[float]] = {method: [] for method in budgets}
    for turn in range(rounds):
        order = list(budgets)[turn % len(budgets) :] + list(budgets)[: turn % len(budgets)]
        for method in order:
            attention = attention_of(method, budgets[method])
            short, whole = (_seconds(engine, prompts, n, attention) for n in (1, 1 + num_tokens))
            times[method].append((whole - short) / num_tokens)
    found = []
    for method, budget in budgets.items():
        ratio = median(dense / own for dense, own in zip(times[DENSE], times[method], strict=True))
        found.append(Speed(length, method, budget, streams, 1e3 * median(times[method]), ratio))
    return found


def _prompts(length: int, streams: int, seed: int) -> list[tuple[int, ...]]:
    questions: list[Question] = []
    for stream in range(streams):
        questions += draw_questions(random.Random(f"race:{seed}:{length}:{stream}"), length, 1)
    return [question.prompt for question in questions]


def _seconds(
    engine: Answers, prompts: Sequence[Sequence[int]], num_tokens: int, attention: Attention | Literal["dense"]
) -> float:
    begin = time.perf_counter()
    engine.answer(prompts, num_tokens, attention)
    return time.perf_counter() - begin
