"""What a perfect model scores: the formulas against enumeration of everything it can draw, and against drawing."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest

from server.bench.parallel.closed_forms import (
    CLOSED_FORMS,
    answer_length,
    insert_accuracy,
    permutation_accuracy,
    remove_accuracy,
    replace_accuracy,
    shuffle_accuracy,
)
from server.bench.parallel.laws import follow, law_of

Answer = tuple[str, ...]
ITEMS = "abcdef"


def ordered_partitions(positions: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """All ways to fix these positions in steps."""
    if not positions:
        yield []
    for size in range(1, len(positions) + 1):
        for step in itertools.combinations(positions, size):
            rest = tuple(p for p in positions if p not in step)
            for others in ordered_partitions(rest):
                yield [step, *others]


def by_enumeration(answers: list[Answer], partition: list[tuple[int, ...]]) -> float:
    """The oracle: the probability of each right answer, product of the conditionals of its positions, summed."""
    total = 0.0
    for answer in set(answers):
        chance, agreeing = 1.0, answers
        for step in partition:
            chance *= math.prod(sum(a[p] == answer[p] for a in agreeing) / len(agreeing) for p in step)
            agreeing = [a for a in agreeing if all(a[p] == answer[p] for p in step)]
        total += chance
    return total


def answers_of(task: str, n: int) -> list[Answer]:
    """Spelt out here, independently of `laws`."""
    items = list(ITEMS[:n])
    match task:
        case "shuffle":
            return [p for p in itertools.permutations(items) if list(p) != items]
        case "replace-random":
            return [tuple("x" if i == j else item for j, item in enumerate(items)) for i in range(n)]
        case "insert-random":
            return [(*items[:i], "x", *items[i:]) for i in range(n + 1)]
        case _:
            return [tuple(item for j, item in enumerate(items) if j != i) for i in range(n)]


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("task", list(CLOSED_FORMS))
def test_the_closed_form_is_the_enumeration_for_every_partition(task: str, n: int) -> None:
    answers = answers_of(task, n)
    partitions = list(ordered_partitions(tuple(range(answer_length(task, n)))))
    assert len(partitions) >= 3
    for partition in partitions:
        assert CLOSED_FORMS[task](n, partition) == pytest.approx(by_enumeration(answers, partition), abs=1e-12)


@pytest.mark.parametrize("n", [5, 6])
@pytest.mark.parametrize("task", list(CLOSED_FORMS))
def test_the_closed_form_is_the_enumeration_for_longer_lists(task: str, n: int) -> None:
    rng = random.Random(n)
    for _ in range(12):
        positions = list(range(answer_length(task, n)))
        rng.shuffle(positions)
        cuts = sorted(rng.sample(range(1, len(positions)), rng.randrange(len(positions))))
        partition = [tuple(positions[a:b]) for a, b in itertools.pairwise([0, *cuts, len(positions)])]
        found = by_enumeration(answers_of(task, n), partition)
        assert CLOSED_FORMS[task](n, partition) == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "replace", "shuffle", "insert", "remove"),
    [
        (3, 0.444, 0.222, 0.188, 0.889),
        (4, 0.422, 0.094, 0.123, 0.750),
        (5, 0.410, 0.038, 0.082, 0.614),
        (6, 0.402, 0.015, 0.056, 0.494),
    ],
)
def test_one_step_is_the_published_table(n: int, replace: float, shuffle: float, insert: float, remove: float) -> None:
    assert replace_accuracy(n, [range(n)]) == pytest.approx(replace, abs=6e-4)
    assert permutation_accuracy(n, [range(n)]) == pytest.approx(shuffle, abs=6e-4)
    assert insert_accuracy(n, [range(n + 1)]) == pytest.approx(insert, abs=6e-4)
    assert remove_accuracy(n, [range(n - 1)]) == pytest.approx(remove, abs=6e-4)


@pytest.mark.parametrize(("n", "k", "replace"), [(4, 2, 0.656), (6, 2, 0.734), (6, 3, 0.604), (8, 4, 0.582)])
def test_k_a_step_is_the_published_table(n: int, k: int, replace: float) -> None:
    steps = [range(i, min(i + k, n)) for i in range(0, n, k)]
    assert replace_accuracy(n, steps) == pytest.approx(replace, abs=6e-4)


@pytest.mark.parametrize(("n", "k", "expected"), [(4, 2, 0.375), (5, 2, 0.533), (6, 3, 0.123)])
def test_permutations_of_k_a_step(n: int, k: int, expected: float) -> None:
    steps = [range(i, min(i + k, n)) for i in range(0, n, k)]
    assert permutation_accuracy(n, steps) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("task", list(CLOSED_FORMS))
def test_one_position_a_step_is_always_right(task: str) -> None:
    for n in range(3, 7):
        steps = [(p,) for p in range(answer_length(task, n))]
        assert CLOSED_FORMS[task](n, steps) == pytest.approx(1)
        assert CLOSED_FORMS[task](n, steps[::-1]) == pytest.approx(1)


def test_leaving_out_the_given_order_matters() -> None:
    """Marginals 1/5 for the own item and 2/5 for the others: 2 (2/5)^3 + 3 (1/5)(2/5)^2, not 6/27."""
    assert shuffle_accuracy(3, [range(3)]) == pytest.approx(0.224)
    assert permutation_accuracy(3, [range(3)]) == pytest.approx(6 / 27)


class PerfectModel:
    """Draws from the exact conditionals, the positions of a step independently of each other."""

    def __init__(self, answers: list[Answer], rng: random.Random) -> None:
        self.answers, self.rng = answers, rng

    def draw(self, partition: list[tuple[int, ...]]) -> Answer:
        found: dict[int, str] = {}
        left = self.answers
        for step in partition:
            # Once wrong, nothing agrees any more and anything may be drawn.
            found |= {p: self.rng.choice(left or self.answers)[p] for p in step}
            left = [a for a in left if all(a[p] == found[p] for p in step)]
        return tuple(found[p] for p in range(len(found)))


@pytest.mark.parametrize("task", list(CLOSED_FORMS))
def test_drawing_agrees_with_the_closed_form_within_three_sigma(task: str) -> None:
    n, count = 5, 4000
    answers = answers_of(task, n)
    positions = list(range(answer_length(task, n)))
    for partition in ([tuple(positions)], [tuple(positions[::2]), tuple(positions[1::2])]):
        model = PerfectModel(answers, random.Random(f"{task} {partition}"))
        right = sum(model.draw(partition) in set(answers) for _ in range(count))
        expected = CLOSED_FORMS[task](n, partition)
        assert abs(right / count - expected) < 3 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("task", list(CLOSED_FORMS))
def test_laws_are_the_right_answers(task: str) -> None:
    for n in (3, 5):
        law = law_of(task, ITEMS[:n], "x")
        assert set(law) == set(answers_of(task, n))
        assert sum(law.values()) == pytest.approx(1)


def test_a_law_counts_an_answer_as_often_as_the_task_makes_it() -> None:
    assert law_of("remove-random", "aab") == pytest.approx({("a", "b"): 2 / 3, ("a", "a"): 1 / 3})


@pytest.mark.parametrize("task", list(CLOSED_FORMS))
def test_risks_along_the_way_average_to_the_closed_form(task: str) -> None:
    """A fixed partition: the followed expectations average to the closed form, right and wrong answers alike."""
    n, count = 4, 3000
    answers, positions = answers_of(task, n), list(range(answer_length(task, n)))
    partition = [tuple(positions[:2]), tuple(positions[2:])]
    model, law = PerfectModel(answers, random.Random(task)), law_of(task, ITEMS[:n], "x")
    found = [follow(law, partition, model.draw(partition)) for _ in range(count)]
    mean = sum(expectation.accuracy for expectation in found) / count
    assert mean == pytest.approx(CLOSED_FORMS[task](n, partition), abs=0.02)


def test_a_choice_that_adapts_to_what_is_fixed_is_judged_by_its_own_risks() -> None:
    """One by one until the new item stands, then all at once: always right, though its partitions say otherwise."""
    n, answers, law = 5, answers_of("replace-random", 5), law_of("replace-random", ITEMS[:5], "x")
    rng = random.Random(0)
    closed = []
    for _ in range(200):
        answer = rng.choice(answers)
        place = answer.index("x")
        partition = [(p,) for p in range(place + 1)] + ([tuple(range(place + 1, n))] if place + 1 < n else [])
        expectation = follow(law, partition, answer)
        assert expectation.accuracy == pytest.approx(1)
        assert expectation.variance == pytest.approx(0)
        closed.append(replace_accuracy(n, partition))
    assert sum(closed) / len(closed) < 0.9


def test_the_variance_is_that_of_the_count() -> None:
    n, count = 4, 3000
    answers, law = answers_of("shuffle", n), law_of("shuffle", ITEMS[:n])
    partition: list[tuple[int, ...]] = [(0, 1), (2, 3)]
    model = PerfectModel(answers, random.Random(1))
    drawn = [model.draw(partition) for _ in range(count)]
    found = [follow(law, partition, answer) for answer in drawn]
    differences = [
        (answer in set(answers)) - expectation.accuracy for answer, expectation in zip(drawn, found, strict=True)
    ]
    variance = sum(d * d for d in differences) / count
    assert variance == pytest.approx(sum(e.variance for e in found) / count, rel=0.1)


def test_an_answer_that_ends_early_is_wrong_from_there_on() -> None:
    law = law_of("shuffle", "abc")
    assert follow(law, [(0,)], ()).accuracy == pytest.approx(1)
    # "b" first leaves a c and c a: two draws of one half each agree half the time; what follows is not walked.
    assert follow(law, [(0,), (1, 2)], ("b",)).accuracy == pytest.approx(0.5)
    assert follow(law, [(0, 1), (2,)], ("b",)).variance == follow(law, [(0, 1)], ("b", "b")).variance
