"""The filters' kernels in the interpreter against `kernels/truncation.py`: the same tokens stay, ties included."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import truncation
from kernels.triton import truncate as kernels
from kernels.triton.gpu_twins import filters_of
from kernels.triton.truncate import truncate
from tests.kernels.triton.worlds import poisoned

MANY, FEW = 99, 1
"""Multiprocessors: a row is several programs', or one program's."""
Rule = tuple[float, int, float]
OFF: Rule = (0.0, 0, 1.0)


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    """Several blocks and splits for a vocabulary that the interpreter can walk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_SPLITS", 2)
        patch.setattr(kernels, "_BLOCK", 128)
        yield


def check(logits: Tensor, rules: list[Rule], num_sms: int) -> Tensor:
    actual, expected, filters = logits.clone(), logits.clone(), filters_of(rules)
    with poisoned():
        truncate(actual, filters, num_sms)
    truncation.truncate(expected, filters)
    for row, rule in enumerate(rules):
        assert torch.equal(actual[row], expected[row]), (rule, actual[row].isinf().sum(), expected[row].isinf().sum())
    return actual


@st.composite
def rows(draw: st.DrawFn) -> tuple[Rule, float, str]:
    rule = (
        draw(st.sampled_from([0.0, 0.0, 1e-9, 0.05, 1.0])),
        draw(st.sampled_from([0, 0, 1, 2, 40, 300, 9999])),
        draw(st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.9, 0.999])),
    )
    return rule, draw(st.sampled_from([0.01, 1.0, 5.0, 60.0])), draw(st.sampled_from(["normal", "ties", "banned"]))


@settings(max_examples=7, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(rows(), min_size=1, max_size=3), st.sampled_from([1, 9, 300, 500]), st.integers(0, 9),
    st.sampled_from([MANY, FEW]),
)  # fmt: skip
def test_random_rows_keep_what_their_definition_keeps(
    drawn: list[tuple[Rule, float, str]], vocab: int, seed: int, num_sms: int
) -> None:
    logits = torch.randn(len(drawn), vocab, generator=torch.Generator().manual_seed(seed))
    for row, (_, scale, kind) in enumerate(drawn):
        logits[row] *= scale
        if kind == "ties":
            logits[row] = (logits[row] * 2).round() / 2
        if kind == "banned":
            logits[row, vocab // 3 + 1 :] = -math.inf
    check(logits, [rule for rule, _, _ in drawn], num_sms)


def test_equal_logits_at_the_edge_of_top_p_stay_by_lowest_id_and_of_top_k_all() -> None:
    """Over both splits, with zeros of both signs, which are equal, and above and below everything else."""
    logits = torch.zeros(6, 300)
    logits[1, ::2] *= -1.0
    logits[2, 299], logits[2, :40] = 3.0, -7.0
    logits[3] = -2.5
    rules = [(0.0, 0, 0.1), (0.0, 4, 0.55), (0.0, 3, 0.5), (0.0, 0, 1e-9), (1.0, 0, 0.25), (0.0, 0, 0.9955)]
    cut = check(logits, rules, MANY)
    stays = [(row > -math.inf).nonzero().squeeze(1).tolist() for row in cut]
    assert stays[0] == list(range(30))
    assert stays[1] == list(range(165))
    assert stays[2] == [*range(40, 160), 299]  # e^3 + 120 of e^3 + 259, half of which is 139.5
    assert stays[3] == [0]
    assert stays[4] == list(range(75))
    assert stays[5] == list(range(299))


def test_neighbouring_floats_are_told_apart_and_so_are_far_ones() -> None:
    """Bisection ends at adjacent values, next to zero too, where floats are dense."""
    low, dense = 1.0, torch.tensor([1e-38, -1e-38, 1e-45, -1e-45, 0.0])
    steps = torch.tensor([low]).view(torch.int32) + torch.arange(60, dtype=torch.int32)
    logits = torch.stack([steps.view(torch.float32).flip(0), torch.cat((dense, torch.full((55,), -90.0)))])
    cut = check(logits, [(0.0, 17, 1.0), (0.0, 2, 1.0)], FEW)
    assert (cut > -math.inf).sum(1).tolist() == [17, 2]
    assert (cut[1] > -math.inf).nonzero().squeeze(1).tolist() == [0, 2]


def test_a_row_keeps_the_same_however_many_programs_share_it() -> None:
    """Masses are integers, so that no order of adding shows."""
    logits = torch.randn(2, 900, generator=torch.Generator().manual_seed(5)) * 2
    rules = [(0.0, 0, 0.97), (0.01, 60, 0.9)]
    alone = check(logits[1:], rules[1:], FEW)
    assert torch.equal(check(logits, rules, MANY)[1], alone[0])


def test_rows_without_a_filter_are_not_looked_at() -> None:
    """Even NaN stays where it is, and neighbours do not notice."""
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    logits[0, 3] = math.nan
    cut = logits.clone()
    truncate(cut, filters_of([OFF, (0.0, 5, 1.0)]), MANY)
    assert torch.equal(cut[0].nan_to_num(), logits[0].nan_to_num())
    assert int((cut[1] > -math.inf).sum()) == 5
    truncate(logits[:0], filters_of([OFF]).of(np.arange(0)), MANY)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 4).half(), "torch.float16"),
        (torch.zeros(4, 2).t(), r"strides \(1, 2\)"),
        (torch.zeros(1, 1).expand(1, (1 << 20) + 1).contiguous(), "vocabulary is 1048577; .* at most 1048576"),
    ],
)
def test_logits_that_cannot_be_cut_in_place_are_refused(logits: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        truncate(logits, filters_of([OFF] * len(logits)), MANY)
