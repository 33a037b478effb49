"""One setting on one task: the answers judged, the forwards counted, and what a perfect model would have scored with
the very steps that were taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from server.bench.parallel.cases import RANDOM, Case
from server.bench.parallel.closed_forms import CLOSED_FORMS
from server.bench.parallel.laws import Expectation, follow, law_of
from server.bench.parallel.sweep import BY_DISTRIBUTION, BY_PLACE, REVISES, Setting


@dataclass(frozen=True, slots=True)
class Answer:
    """What a decoder made of a case. `words`: the text of each token; `steps`: the offsets of tokens that each
    denoising forward fixed for good, in order, () where tokens came one by one."""

    text: str
    words: tuple[str, ...]
    forwards: int
    commit_passes: int = 0
    steps: tuple[tuple[int, ...], ...] = ()


class Theory(StrEnum):
    """How far a perfect model's score is known for a setting.

    CLOSED    the choice of positions is blind: the closed form of the partition
    FOLLOWED  it looks at distributions: the risks along the way (`laws.follow`)
    BLIND     it looks at what is drawn: the closed form says what the same steps, chosen blindly, would have scored;
              what is above it is the selector's merit, and no test
    """

    CLOSED = "closed form"
    FOLLOWED = "followed"
    BLIND = "if blind"


def theory_of(setting: Setting) -> Theory | None:
    """None where it says nothing: tokens are revised, or come one by one."""
    decoding = setting.decoding
    if decoding is None or decoding.selector.name in REVISES:
        return None
    if decoding.stopper.name != "eos" or decoding.planner.name not in ("fixed", "sub_blocks"):
        return Theory.BLIND
    if decoding.selector.name in BY_PLACE:
        return Theory.CLOSED
    return Theory.FOLLOWED if decoding.selector.name in BY_DISTRIBUTION else Theory.BLIND


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts of one setting on one task. `variance`: of `right`, for a perfect model that takes these steps; it and
    `expected`, a share, are None where theory says nothing."""

    policy: str
    setting: str
    value: float | None
    task: str
    cases: int
    right: int
    tokens: int
    forwards: int
    commit_passes: int
    theory: Theory | None = None
    expected: float | None = None
    variance: float | None = None

    @property
    def accuracy(self) -> float:
        return self.right / self.cases

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(self.forwards, 1)


def summarise(setting: Setting, cases: Sequence[Case], answers: Sequence[Answer]) -> Figures:
    """All cases are of one task."""
    task = cases[0].task
    theory = theory_of(setting) if task in RANDOM else None
    expected = variance = None
    if theory is not None:
        found = [expectation(case, answer, theory) for case, answer in zip(cases, answers, strict=True)]
        expected = math.fsum(one.accuracy for one in found) / len(found)
        variance = math.fsum(one.variance for one in found)
    return Figures(
        policy=setting.policy,
        setting=setting.label,
        value=setting.value,
        task=task,
        cases=len(cases),
        right=sum(case.is_right(answer.text) for case, answer in zip(cases, answers, strict=True)),
        tokens=sum(len(answer.words) for answer in answers),
        forwards=sum(answer.forwards for answer in answers),
        commit_passes=sum(answer.commit_passes for answer in answers),
        theory=theory,
        expected=expected,
        variance=variance,
    )


def expectation(case: Case, answer: Answer, theory: Theory) -> Expectation:
    """A perfect model's chance of a right answer with the steps that `answer` was made in."""
    partition = item_steps(answer.steps, case.answer_len)
    if theory is Theory.FOLLOWED:
        words = [word.strip() for word in answer.words]
        return follow(law_of(case.task, case.items, case.new), partition, words)
    accuracy = CLOSED_FORMS[case.task](len(case.items), partition)
    return Expectation(accuracy, accuracy * (1 - accuracy))


def item_steps(steps: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    """The steps that fixed items: the answer's first `length` tokens. Items that never were (the model ended its answer
    too early, which a perfect one does not) count as fixed one by one, so that parallelism is not blamed for them."""
    found = [tuple(sorted(p for p in step if p < length)) for step in steps]
    missing = set(range(length)) - {p for step in found for p in step}
    return [step for step in found if step] + [(p,) for p in sorted(missing)]
