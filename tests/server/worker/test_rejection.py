"""The rejection rules by exact enumeration: over all drafts and all answers, the text follows the target to 1e-12.

Every rule asks for yes-or-no draws through one function, so the tests answer both ways, follow each course of answers
to its end and add up what it emits, weighted by its probability. Float64; the rules' own lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from server.worker.rejection import Accept, Choice, choose_by_block, choose_by_token

Vector = NDArray[np.float64]
Prefix = tuple[int, ...]
Model = Callable[[Prefix], Vector]
EXACT = 1e-12


def courses(rule: Callable[[Accept], Choice]) -> Iterator[tuple[float, Choice]]:
    """Every course of a rule's draws with its probability: each run repeats known answers, then says yes."""
    answers: list[bool] = []
    while True:
        asked: list[float] = []

        def accept(probability: float, asked: list[float] = asked) -> bool:
            asked.append(min(1.0, max(0.0, probability)))
            if len(asked) > len(answers):
                answers.append(True)
            return answers[len(asked) - 1]

        choice = rule(accept)
        share = 1.0
        for answer, probability in zip(answers, asked, strict=True):
            share *= probability if answer else 1 - probability
        if share > 0:
            yield share, choice
        while answers and not answers[-1]:
            answers.pop()
        if not answers:
            return
        answers[-1] = False


def random_model(seed: int, vocab: int, kind: str = "full") -> Model:
    """A distribution for each context. kind: full, masked (zeros, others elsewhere) or certain."""
    known: dict[Prefix, Vector] = {}

    def model(context: Prefix) -> Vector:
        if context not in known:
            generator = np.random.default_rng([seed, len(context), *context])
            weights = generator.exponential(size=vocab) + 0.02
            if kind == "masked":
                weights[generator.permutation(vocab)[: vocab // 2]] = 0
            if kind == "certain":
                weights = (np.arange(vocab) == weights.argmax()).astype(float)
            known[context] = weights / weights.sum()
        return known[context]

    return model


def halves(first: bool) -> Callable[[int, int], Model]:
    """Models with disjoint supports: even or odd tokens only."""

    def make(seed: int, vocab: int) -> Model:
        full = random_model(seed, vocab)

        def model(context: Prefix) -> Vector:
            weights: Vector = full(context) * (np.arange(vocab) % 2 == (0 if first else 1))
            return weights / float(weights.sum())

        return model

    return make


def pair(name: str, vocab: int) -> tuple[Model, Model]:
    """Target and drafter."""
    if name == "same":
        return random_model(1, vocab), random_model(1, vocab)
    if name == "disjoint":
        return halves(True)(1, vocab), halves(False)(2, vocab)
    target, drafter = name.split("-")
    return random_model(1, vocab, target), random_model(2, vocab, drafter)


PAIRS = ["full-full", "same", "disjoint", "masked-full", "full-masked", "masked-masked", "certain-full", "full-certain"]


@dataclass(frozen=True)
class Way:
    """How drafts come about and are verified. drawn: "with" or "without" replacement, or "not" (fixed tokens)."""

    drawn: str
    is_block: bool = False


def drafted(way: Way, parents: Sequence[int], drafter: Model) -> Iterator[tuple[float, list[int]]]:
    """All drafts on a tree's nodes (parents[0] is the root's) with their probabilities."""
    if way.drawn == "not":
        # Any fixed list, however bad: also with the same token twice among siblings.
        vocab = len(drafter(()))
        generator = np.random.default_rng(3)
        yield 1.0, generator.integers(0, vocab, size=len(parents) - 1).tolist()
        return

    def extend(drafts: list[int], share: float) -> Iterator[tuple[float, list[int]]]:
        row = len(drafts) + 1
        if row == len(parents):
            yield share, drafts
            return
        left = drafter(context(parents, drafts, parents[row])).copy()
        if way.drawn == "without":
            for sibling in range(1, row):
                if parents[sibling] == parents[row]:
                    left[drafts[sibling - 1]] = 0
            if left.sum() <= 0:  # nothing is left to draw: any token stands, and the rule must pass it over
                yield from extend([*drafts, 0], share)
                return
            left /= left.sum()
        for token in np.flatnonzero(left):
            yield from extend([*drafts, int(token)], share * left[token])

    yield from extend([], 1.0)


def context(parents: Sequence[int], drafts: Sequence[int], row: int) -> Prefix:
    tokens: Prefix = ()
    while row > 0:
        tokens = (drafts[row - 1], *tokens)
        row = parents[row]
    return tokens


def emitted(way: Way, parents: Sequence[int], target: Model, drafter: Model, length: int) -> tuple[Vector, float]:
    """Probability of every text of `length` tokens, and the mean number of accepted drafts."""
    vocab = len(target(()))
    law, accepted = np.zeros((vocab,) * length), 0.0
    for share, drafts in drafted(way, parents, drafter):
        contexts = [context(parents, drafts, row) for row in range(len(parents))]
        p = np.stack([target(one) for one in contexts])
        q = None
        if way.drawn != "not":
            q = np.stack([drafter(contexts[parent]) for parent in parents[1:]])

        def rule(accept: Accept, p: Vector = p, q: Vector | None = q, drafts: list[int] = drafts) -> Choice:
            if way.is_block:
                return choose_by_block(p, q, drafts, accept)
            return choose_by_token(p, q, drafts, parents, accept, with_replacement=way.drawn == "with")

        for chance, choice in courses(rule):
            last = choice.weights / choice.weights.sum()
            accepted += share * chance * (len(choice.path) - 1)
            kept = contexts[choice.path[-1]]
            for token in np.flatnonzero(last):
                complete(law, (*kept, int(token)), share * chance * last[token], target)
    return law, accepted


def complete(law: Vector, text: Prefix, share: float, target: Model) -> None:
    """Add a text's share; what is missing to the full length comes from the target, as later steps give it."""
    if len(text) >= law.ndim:
        law[text[: law.ndim]] += share
        return
    for token, probability in enumerate(target(text)):
        if probability > 0:
            complete(law, (*text, token), share * probability, target)


def wanted(target: Model, length: int) -> Vector:
    law = np.zeros((len(target(())),) * length)
    complete(law, (), 1.0, target)
    return law


def chain(length: int) -> tuple[int, ...]:
    return tuple(range(-1, length))


WAYS = {
    "drawn": Way("without"),
    "fixed": Way("not"),
    "block, drawn": Way("without", is_block=True),
    "block, fixed": Way("not", is_block=True),
}


@pytest.mark.parametrize("models", PAIRS)
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_verified_chain_follows_the_target_exactly(way: str, num_drafts: int, models: str) -> None:
    target, drafter = pair(models, 3)
    length = max(2, num_drafts)
    law, _ = emitted(WAYS[way], chain(num_drafts), target, drafter, length)
    assert np.abs(law - wanted(target, length)).max() < EXACT


TREES = {
    "1": (-1, 0),
    "2": (-1, 0, 0),
    "3": (-1, 0, 0, 0),
    "2 of 2": (-1, 0, 0, 1, 1, 2, 2),
    "3 then 2": (-1, 0, 0, 0, 1, 1),
    "late child": (-1, 0, 0, 2, 3),
}


@pytest.mark.parametrize("models", PAIRS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("drawn", ["with", "without", "not"])
def test_a_verified_tree_follows_the_target_exactly(drawn: str, tree: str, models: str) -> None:
    vocab = 3 if len(TREES[tree]) > 5 else 4
    target, drafter = pair(models, vocab)
    law, _ = emitted(Way(drawn), TREES[tree], target, drafter, 2)
    assert np.abs(law - wanted(target, 2)).max() < EXACT


def test_one_draft_is_accepted_with_one_minus_the_total_variation() -> None:
    target, drafter = pair("full-full", 4)
    _, accepted = emitted(WAYS["drawn"], chain(1), target, drafter, 1)
    assert accepted == pytest.approx(np.minimum(target(()), drafter(())).sum(), abs=EXACT)


def test_a_fixed_draft_is_accepted_with_its_own_probability() -> None:
    target, drafter = pair("full-full", 4)
    [(_, [draft])] = drafted(Way("not"), chain(1), drafter)
    _, accepted = emitted(WAYS["fixed"], chain(1), target, drafter, 1)
    assert accepted == pytest.approx(target(())[draft], abs=EXACT)


@pytest.mark.parametrize("num_drafts", [2, 3])
def test_block_verification_accepts_at_least_as_many_as_token_by_token(num_drafts: int) -> None:
    gains = []
    for seed in range(6):
        target, drafter = random_model(seed, 3), random_model(seed + 100, 3)
        counts = [emitted(WAYS[way], chain(num_drafts), target, drafter, 1)[1] for way in ("drawn", "block, drawn")]
        gains.append(counts[1] - counts[0])
    assert min(gains) > -EXACT
    assert max(gains) > 0.005


def test_siblings_without_replacement_are_accepted_more_often_than_with() -> None:
    target, drafter = pair("full-full", 4)
    without, with_replacement = (
        emitted(Way(drawn), TREES["3"], target, drafter, 1)[1] for drawn in ("without", "with")
    )
    assert without > with_replacement + 0.01


def test_a_residual_that_vanishes_leaves_the_target_in_its_place() -> None:
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = p[:1].copy()
    assert np.array_equal(choose_by_token(p, q, [0], (), lambda _: False).weights, p[0])
    sure = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert np.array_equal(choose_by_token(sure, None, [0], (), lambda _: False).weights, sure[0])


@pytest.mark.parametrize("draft", [-1, 3])
def test_an_id_outside_the_vocabulary_is_never_accepted_and_takes_no_mass(draft: int) -> None:
    p = np.array([[0.2, 0.3, 0.5]] * 3)
    for choice in (
        choose_by_token(p, None, [draft, 2], (), lambda _: True),
        choose_by_block(p, None, [draft, 2], lambda _: True),
    ):
        assert choice.path == (0,)
        assert np.array_equal(choice.weights, p[0])
    behind_one = choose_by_block(p, None, [2, draft], lambda _: True)
    assert behind_one.path == (0, 1)
    assert behind_one.weights == pytest.approx(p[1])


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_row_that_is_not_a_number_is_never_passed(rule: str) -> None:
    p = np.array([[0.5, 0.5], [np.nan, np.nan], [0.5, 0.5]])

    def accept(probability: float) -> bool:
        return probability > 0  # NaN compares false

    if rule == "token":
        choice = choose_by_token(p, None, [0, 1], (), accept)
        assert choice.path == (0, 1)
        assert np.isnan(choice.weights).all(), "and it shows"
    else:
        choice = choose_by_block(p, None, [0, 1], accept)
        assert choice.path == (0,)


# Negative controls: what 2.5 of the reference forbids, detected by the same sums.

TARGET, DRAFTER = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.5, 0.2, 0.2, 0.1])


def one_token_law(submits: Callable[[int], bool], q: Vector | None, draws: Vector) -> Vector:
    law = np.zeros(4)
    p = np.stack([TARGET, TARGET])
    for draft, share in enumerate(draws):
        if not submits(draft):
            law += share * TARGET
            continue

        def rule(accept: Accept, draft: int = draft) -> Choice:
            return choose_by_token(p, None if q is None else q[None], [draft], (), accept)

        for chance, choice in courses(rule):
            law += (
                share * chance * (np.eye(4)[draft] if len(choice.path) == 2 else choice.weights / choice.weights.sum())
            )
    return law


def test_dropping_a_draft_for_its_own_probability_is_biased_by_the_known_amount() -> None:
    law = one_token_law(lambda draft: DRAFTER[draft] >= 0.3, DRAFTER, DRAFTER)
    assert law == pytest.approx([0.6, 0.25, 0.1, 0.05])
    by_shape = one_token_law(lambda _: DRAFTER.max() >= 0.3, DRAFTER, DRAFTER)
    assert by_shape == pytest.approx(TARGET, abs=EXACT)


def test_the_best_token_of_q_verified_as_if_drawn_from_q_is_biased() -> None:
    best = np.eye(4)[DRAFTER.argmax()]
    assert np.abs(one_token_law(lambda _: True, DRAFTER, best) - TARGET).max() > 0.05
    assert one_token_law(lambda _: True, None, best) == pytest.approx(TARGET, abs=EXACT)


def test_a_drawn_draft_may_be_verified_as_if_fixed() -> None:
    """Whatever it is, it is accepted with p(draft) and else takes that mass away: exact, but accepted less often."""
    assert one_token_law(lambda _: True, None, DRAFTER) == pytest.approx(TARGET, abs=EXACT)
    assert one_token_law(lambda draft: DRAFTER[draft] >= 0.3, None, DRAFTER) == pytest.approx(TARGET, abs=EXACT)


def test_siblings_in_another_order_than_drawn_are_biased() -> None:
    p, laws = np.stack([TARGET] * 3), []
    for is_reversed in (False, True):
        law = np.zeros(4)
        for first, second in itertools.permutations(range(4), 2):
            share = DRAFTER[first] * DRAFTER[second] / (1 - DRAFTER[first])
            order = [second, first] if is_reversed else [first, second]

            def rule(accept: Accept, order: list[int] = order) -> Choice:
                return choose_by_token(p, np.stack([DRAFTER] * 2), order, (-1, 0, 0), accept)

            for chance, choice in courses(rule):
                kept = np.eye(4)[order[choice.path[1] - 1]] if len(choice.path) == 2 else choice.weights
                law += share * chance * kept / kept.sum()
        laws.append(law)
    assert laws[0] == pytest.approx(TARGET, abs=EXACT)
    assert np.abs(laws[1] - TARGET).max() > 0.005
