"""The filters against their definition in Python floats, row by row; and that two ways to find an edge agree."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from kernels.truncation import Filters, _keep_top_by_sorting, keep_top, truncate


def kept(logits: list[float], min_p: float, top_k: int, top_p: float) -> list[int]:
    """By definition: min_p, then top_k of what is left, then top_p of that."""
    peak = max(logits)
    left = {token: value for token, value in enumerate(logits) if value > -math.inf}
    left = {token: value for token, value in left.items() if min_p == 0 or value >= peak + math.log(min_p)}
    if 0 < top_k < len(left):
        floor = sorted(left.values(), reverse=True)[top_k - 1]
        left = {token: value for token, value in left.items() if value >= floor}
    if top_p < 1:
        total, mass, best = sum(math.exp(value - peak) for value in left.values()), 0.0, []
        for token, value in sorted(left.items(), key=lambda item: (-item[1], item[0])):
            if mass >= top_p * total:
                break
            best.append(token)
            mass += math.exp(value - peak)
        return sorted(best)
    return sorted(left)


@pytest.mark.parametrize("seed", range(12))
def test_a_mixture_of_rows_is_cut_row_by_row(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 60, generator=generator) * (0.2 + seed / 3)
    if seed % 3 == 0:
        logits = (logits * 2).round() / 2  # ties
    logits[2, 5:] = -math.inf
    rules = [
        (rng.choice([0, 0, 0.07, 1.0]), rng.choice([0, 0, 1, 7, 99]), rng.choice([1, 1, 0.03, 0.6, 0.95]))
        for _ in range(9)
    ]
    cut, filters = logits.clone(), filters_of(rules)
    truncate(cut, filters)
    for row, rule in enumerate(rules):
        expected = torch.full_like(logits[row], -math.inf)
        at = kept(logits[row].tolist(), *rule)
        expected[at] = logits[row, at]
        assert torch.equal(cut[row], expected), rule
        alone = logits[row : row + 1].clone()
        truncate(alone, filters.of(np.arange(row, row + 1)))
        assert torch.equal(alone[0], expected)


def filters_of(rules: list[tuple[float, int, float]]) -> Filters:
    min_p, top_k, top_p = (np.asarray(column) for column in zip(*rules, strict=True))
    return Filters(min_p.astype(np.float32), top_k.astype(np.int64), top_p.astype(np.float64))


@pytest.mark.parametrize("seed", range(20))
def test_the_histogram_and_the_sort_cut_the_same_tokens(seed: int) -> None:
    """The sort is what a GPU runs; both are exact, so they agree on every row, ties included."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 700, generator=generator) * (0.1 + seed)
    if seed % 3 == 0:
        logits = (logits * 4).round() / 4
    top_k = torch.randint(0, 800, (40,), generator=generator) * (torch.rand(40, generator=generator) < 0.5)
    top_p = torch.rand(40, generator=generator, dtype=torch.float64)
    top_p[torch.rand(40, generator=generator) < 0.3] = 1.0
    by_histogram, by_sort = logits.clone(), logits.clone()
    filters = Filters(np.zeros(40, dtype=np.float32), top_k.numpy(), top_p.numpy())
    keep_top(by_histogram, filters)
    _keep_top_by_sorting(by_sort, filters)
    assert torch.equal(by_histogram, by_sort)
    one = logits[7:8].clone()
    keep_top(one, filters.of(np.arange(7, 8)))
    assert torch.equal(one[0], by_histogram[7])
