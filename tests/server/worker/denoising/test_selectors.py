"""Selectors as pure functions: what holds for every method, and which are the same at the edges of their parameters."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from scheduler.policies import SELECTORS
from scheduler.types import Choice
from server.worker.denoising.selectors import BY_NAME, Bools, Masks

GENERATOR = np.random.default_rng(5)


def choice(name: str, **values: float) -> Choice:
    filled = {key: parameter.default for key, parameter in SELECTORS[name].items()} | values
    return Choice(name, tuple(filled.items()))


def random_masks(seed: int, only_last: bool = False) -> Masks:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 33))
    positions = np.sort(generator.choice(64, count, replace=False)).astype(np.int64) + 100
    confidence = generator.beta(2, 1, count).astype(np.float32)
    entropy = (generator.gamma(1.0, 0.5, count) * (1 - confidence)).astype(np.float32)
    margin = (confidence * generator.random(count)).astype(np.float32)
    uniform = generator.random(count)
    is_last = generator.random(count) < 0.2 if only_last else np.zeros(count, dtype=np.bool_)
    infinite = np.float32(np.inf)
    return Masks(
        positions,
        np.where(is_last, -infinite, confidence),
        np.where(is_last, -infinite, margin),
        np.where(is_last, infinite, entropy),
        int(generator.integers(1, 6)),
        None,
        lambda: uniform,
        generator.random(count).astype(np.float32),
    )


def chosen(name: str, masks: Masks, **values: float) -> Bools:
    return BY_NAME[name](masks, choice(name, **values))


def surest(scores: NDArray[np.floating]) -> Bools:
    found = np.zeros(scores.size, dtype=np.bool_)
    found[int(np.argmax(scores))] = True
    return found


def test_the_catalogue_and_the_table_name_the_same_methods() -> None:
    assert set(BY_NAME) == set(SELECTORS)


@pytest.mark.parametrize("name", sorted(BY_NAME))
@pytest.mark.parametrize("only_last", [False, True])
def test_every_method_fixes_at_least_one_and_nothing_else_than_masks(name: str, only_last: bool) -> None:
    for seed in range(120):
        masks = random_masks(seed, only_last)
        found = chosen(name, masks)
        assert found.shape == masks.positions.shape
        assert found.dtype == np.bool_
        assert found.any()
        assert np.array_equal(found, chosen(name, masks))


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"origin"}))
def test_what_may_only_come_last_waits_for_all_others_unless_the_quota_is_left(name: str) -> None:
    """Confidence minus infinity: no limit lets it pass, and a quota takes it when nothing else is there."""
    for seed in range(80):
        masks = random_masks(seed, only_last=True)
        late = np.isneginf(masks.confidence)
        found = chosen(name, masks)
        if (found & late).any():
            assert found[~late].all()
            assert found.sum() <= max(1, masks.quota)


@pytest.mark.parametrize(
    "name", ["sequential", "low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "dynamic", "learn2pd"]
)
def test_methods_with_a_quota_fix_it(name: str) -> None:
    limits = {"dynamic": {"threshold": 1.5}, "learn2pd": {"threshold": 1.5}}.get(name, {})
    for seed in range(60):
        masks = random_masks(seed)
        assert chosen(name, masks, **limits).sum() == min(masks.quota, masks.positions.size)


ONE: list[tuple[str, dict[str, float]]] = [
    ("threshold", {"threshold": 1.01}),
    ("auto", {"threshold": 1.01}),
    ("localleap", {"threshold": 1.01}),
    ("hierarchy", {"threshold": 1.01, "low": 1.01}),
    ("factor", {"factor": 0.0}),
    ("edit", {"threshold": 1.01}),
    ("wino", {"wide": 1.0}),
    ("low_confidence", {}),
    ("dynamic", {"threshold": 1.01}),
    ("learn2pd", {"threshold": 1.01}),
    ("maskgit_plus", {}),
]


@pytest.mark.parametrize(("name", "values"), ONE)
def test_a_limit_above_everything_leaves_the_surest(name: str, values: dict[str, float]) -> None:
    for seed in range(60):
        masks = random_masks(seed)._replace(quota=1)
        assert np.array_equal(chosen(name, masks, **values), surest(masks.confidence))


def test_methods_that_are_another_at_the_edge_of_their_parameters() -> None:
    for seed in range(100):
        masks = random_masks(seed)
        plain = chosen("threshold", masks, threshold=0.7)
        assert np.array_equal(chosen("localleap", masks, threshold=0.7, relaxed=0.7), plain)
        assert np.array_equal(chosen("localleap", masks, threshold=0.7, relaxed=0.1, radius=0), plain)
        assert np.array_equal(chosen("hierarchy", masks, threshold=0.7, low=0.7), plain)
        assert np.array_equal(chosen("auto", masks._replace(threshold=0.7), threshold=0.2), plain)
        assert np.array_equal(chosen("entropy_bounded", masks, gamma=0.0), surest(-masks.entropy))
        assert np.array_equal(chosen("entropy_threshold", masks, entropy=-1.0), surest(-masks.entropy))
        assert chosen("threshold", masks, threshold=0.0).all()
        assert chosen("entropy_threshold", masks, entropy=100.0).all()
        assert chosen("entropy_bounded", masks, gamma=1e9).all()
        assert chosen("learn2pd", masks, threshold=0.0).all()
        assert np.array_equal(
            chosen("learn2pd", masks._replace(verdicts=masks.confidence, quota=1), threshold=0.7), plain
        )


def test_the_definitions_hold_written_out_mask_by_mask() -> None:
    for seed in range(100):
        masks = random_masks(seed)
        c, at = masks.confidence, masks.positions.tolist()
        best = int(np.argmax(c))
        for i in range(len(at)):
            near = any(c[j] >= 0.8 and abs(at[i] - at[j]) <= 3 for j in range(len(at)))
            is_local = c[i] >= 0.8 or (near and c[i] >= 0.5) or i == best
            assert chosen("localleap", masks, threshold=0.8, relaxed=0.5, radius=3)[i] == is_local
            run = [j for j in range(len(at)) if all(p in at for p in range(min(at[i], at[j]), max(at[i], at[j])))]
            leads = max(run, key=lambda j: (c[j], -j)) == i and c[i] >= 0.4
            assert chosen("hierarchy", masks, threshold=0.9)[i] == (c[i] >= 0.9 or leads or i == best)
        order = np.sort(c)[::-1].astype(float)
        count = max([n for n in range(1, len(at) + 1) if (n + 1) * (1 - order[n - 1]) < 1.3], default=1)
        assert chosen("factor", masks, factor=1.3).sum() == count
        sums = np.cumsum(np.sort(masks.entropy).astype(float))
        assert chosen("entropy_bounded", masks, gamma=0.3).sum() == max(1, int((sums < 0.3).sum()))
        sure = int((c >= 0.6).sum())
        assert chosen("dynamic", masks, threshold=0.6).sum() == max(sure, min(masks.quota, len(at)))


def test_lower_limits_fix_no_less() -> None:
    for seed in range(60):
        masks = random_masks(seed)
        for name, key, values in [
            ("threshold", "threshold", (1.1, 0.9, 0.5, 0.0)),
            ("factor", "factor", (0.0, 0.5, 1.0, 3.0)),
            ("entropy_threshold", "entropy", (-1.0, 0.1, 0.5, 9.0)),
            ("entropy_bounded", "gamma", (0.0, 0.3, 1.0, 9.0)),
            ("hierarchy", "low", (1.1, 0.6, 0.3, 0.0)),
        ]:
            found = [chosen(name, masks, **{key: value}) for value in values]
            for fewer, more in pairwise(found):
                assert (more | ~fewer).all()


def test_wide_in_is_bounded() -> None:
    for seed in range(100):
        masks = random_masks(seed)
        count, size = int(chosen("wino", masks, wide=0.0).sum()), masks.positions.size
        assert count == min(size, max(5, int(0.7 * size)), 20)


def test_a_temperature_of_the_choice_follows_its_softmax() -> None:
    """Without replacement, two of five: the law of the first draw and of the pair, by enumeration."""
    scores = np.array([0.9, 0.5, 0.2, 0.7, 0.1], dtype=np.float32)
    weights = np.exp(scores / 0.3) / np.exp(scores / 0.3).sum()
    expected: dict[frozenset[int], float] = {}
    for i in range(5):
        for j in range(5):
            if i != j:
                pair = frozenset((i, j))
                expected[pair] = expected.get(pair, 0.0) + weights[i] * weights[j] / (1 - weights[i])
    counts = dict.fromkeys(expected, 0)
    for _ in range(6000):
        uniform = GENERATOR.random(5)
        masks = Masks(np.arange(5), scores, scores, -scores, 2, None, lambda u=uniform: u)  # type: ignore[misc]
        counts[frozenset(np.flatnonzero(chosen("maskgit_plus", masks, alg_temp=0.3)).tolist())] += 1
    chi = sum((counts[pair] - 6000 * p) ** 2 / (6000 * p) for pair, p in expected.items())
    assert chi < 27.9  # 9 degrees of freedom, 0.1 %


def test_origin_fixes_each_mask_with_its_share() -> None:
    total = forced = 0
    for _ in range(3000):
        uniform = GENERATOR.random(10)
        zeros = np.zeros(10, dtype=np.float32)
        found = chosen("origin", Masks(np.arange(10), zeros, zeros, zeros, 3, None, lambda u=uniform: u))  # type: ignore[misc]
        total += int(found.sum())
        forced += int((uniform >= 0.3).all())
    # 3 expected a step, and one more wherever nothing was drawn.
    assert abs((total - forced) / 3000 - 3.0) < 0.12
    assert forced > 0
