"""The rules of keeping, against a definition a row at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kernels.sparse_keep import (
    MASS_ONE,
    keep_mass,
    mass_target,
    physical_ids,
    sortable,
    to_mass,
    to_scores,
    top_k,
)


def test_sortable_integers_have_the_order_of_the_scores() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.float16)
    finite = every[~every.isnan()]
    value = sortable(finite)
    order = finite.float().sort(stable=True).indices
    assert bool((value[order].diff() >= 0).all())
    steps = finite.float()[order].diff() > 0
    assert torch.equal(value[order].diff() > 0, steps), "equal integers if and only if equal scores; -0 equals 0"
    assert int(sortable(every).min()) >= 0
    assert int(sortable(every).max()) < 1 << 16


def test_scores_that_float16_cannot_hold_are_cut_off_and_tie() -> None:
    assert to_scores(torch.tensor([1e9, 65504.0, -1e9, math.inf]), 1.0).tolist() == [
        65504.0,
        65504.0,
        -65504.0,
        65504.0,
    ]


@pytest.mark.parametrize("seed", range(20))
def test_top_k_is_its_definition_with_ties_to_the_lowest_index(seed: int) -> None:
    chance = random.Random(seed)
    scores = torch.randint(-3, 4, (3, 2, 40), generator=torch.Generator().manual_seed(seed)).half()
    counts = [chance.randint(1, 40) for _ in range(3)]
    first = [min(chance.randint(0, 4), count) for count in counts]
    late = [chance.randint(start, count) for start, count in zip(first, counts, strict=True)]
    keep = [start + count - end + chance.randint(0, 9) for start, end, count in zip(first, late, counts, strict=True)]
    found = top_k(scores, *(torch.tensor(part) for part in (counts, keep, first, late)))
    for row in range(3):
        for head in range(2):
            forced = [*range(first[row]), *range(late[row], counts[row])]
            others = sorted(range(first[row], late[row]), key=lambda i: (-float(scores[row, head, i]), i))
            wanted = sorted(forced + others[: max(0, min(keep[row], counts[row]) - len(forced))])
            here = found[row, head].tolist()
            assert here[: len(wanted)] == wanted
            assert set(here[len(wanted) :]) <= {-1}


def test_what_is_not_scored_may_hold_anything() -> None:
    scores = torch.full((1, 1, 12), math.nan).half()
    scores[..., 2:8] = torch.tensor([0.0, -0.0, 5.0, -1.0, 5.0, 0.0])
    found = top_k(scores, *(torch.tensor([part]) for part in (10, 7, 2, 8)))
    assert found.tolist() == [[[0, 1, 2, 4, 6, 8, 9]]]


def test_physical_ids_are_those_of_the_list_seen_as_a_page_table() -> None:
    table = torch.tensor([[7, 3, 5]])
    assert physical_ids(table, torch.tensor([[[0, 2, -1], [1, 2, -1]]]), 2, 1).tolist() == [[[14, 10, -1], [7, 11, -1]]]
    assert physical_ids(table, torch.tensor([[[5], [4]]]), 2, 4).tolist() == [[[25], [28]]]


@pytest.mark.parametrize("seed", range(20))
def test_the_mass_kept_is_the_least_that_reaches_the_threshold(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = to_mass((torch.randint(0, 5, (6, 17), generator=generator).float() * 2).softmax(1))
    counts = torch.randint(1, 18, (6,), generator=generator)
    threshold = (0.3, 0.9, 0.999)[seed % 3]
    kept = keep_mass(mass, counts, threshold)
    for row, count in enumerate(counts.tolist()):
        order = sorted(range(count), key=lambda i: (-int(mass[row, i]), i))
        held, wanted = 0, set()
        for unit in order:
            if held >= mass_target(threshold):
                break
            wanted.add(unit)
            held += int(mass[row, unit])
        assert set(kept[row].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize("threshold", [0.9, 1.0])
def test_mistake_9_a_threshold_that_is_never_reached_keeps_everything(threshold: float) -> None:
    mass = torch.zeros(2, 5, dtype=torch.int32)
    mass[1] = MASS_ONE // 9  # rounded down so often that the sum stays below
    assert keep_mass(mass, torch.tensor([3, 5]), threshold).tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_a_threshold_of_one_keeps_what_has_no_mass_too() -> None:
    mass = torch.tensor([[MASS_ONE, 0, 0]], dtype=torch.int32)
    assert keep_mass(mass, torch.tensor([3]), 1.0).all()
    assert keep_mass(mass, torch.tensor([3]), 0.999).tolist() == [[True, False, False]]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, math.nan])
def test_thresholds_outside_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold is"):
        mass_target(threshold)
