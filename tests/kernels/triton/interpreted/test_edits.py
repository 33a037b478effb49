"""Edits of logits in the interpreter: bit for bit the twin, in the order of the rules, and nothing beside them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import edits as definition
from kernels.edits import Cells, Edits, Masks, Penalties
from kernels.triton import edits as kernels


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_SPLITS", 2)
        patch.setattr(kernels, "_BLOCK", 128)
        patch.setattr(kernels, "_CELLS", 16)
        yield


def cells(rng: random.Random, num_rows: int, vocab: int) -> Cells:
    """Of some rows, none included, up to a few blocks of distinct tokens in no order."""
    counts = [rng.choice([0, 1, min(40, vocab)]) for _ in range(num_rows)]
    ids = [rng.sample(range(vocab), count) for count in counts]
    values = [rng.choice([0.0, 1.0, 3.0, -2.5, 0.1]) for count in counts for _ in range(count)]
    rows = np.repeat(np.arange(num_rows), counts)
    return Cells(rows, np.asarray([v for row in ids for v in row], dtype=np.int64), f32(values))


def f32(values: Sequence[float]) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def floats(rng: random.Random, num_rows: int, low: float, high: float) -> NDArray[np.float32]:
    return f32([rng.choice([1.0, rng.uniform(low, high)]) for _ in range(num_rows)])


@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([1, 31, 33, 300]), st.sets(st.integers(0, 4)))
def test_random_edits_equal_their_definition_bit_for_bit(
    seed: int, num_rows: int, vocab: int, chosen: set[int]
) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=generator) * 5
    masked = np.flatnonzero([rng.random() < 0.6 for _ in range(num_rows)])
    bits = torch.randint(-(1 << 31), 1 << 31, (len(masked), -(-vocab // 32)), generator=generator).int().numpy()
    rules = [floats(rng, num_rows, low, high) for low, high in ((0.4, 2.0), (-2.0, 2.0), (-2.0, 2.0))]
    edits = Edits(
        cells(rng, num_rows, vocab) if 0 in chosen else None,
        Penalties(cells(rng, num_rows, vocab), *rules) if 1 in chosen else None,
        cells(rng, num_rows, vocab)._replace(values=None) if 2 in chosen else None,
        Masks(masked, bits) if 3 in chosen else None,
        floats(rng, num_rows, 0.05, 3.0) if 4 in chosen else None,
    )
    guarded = torch.full((num_rows + 2, vocab), 42.0)
    guarded[1:-1] = logits
    kernels.edit_logits(guarded[1:-1], edits)
    definition.edit_logits(logits, edits)
    assert torch.equal(guarded[1:-1].view(torch.int32), logits.view(torch.int32))
    assert (guarded[[0, -1]] == 42.0).all()


def test_a_token_that_every_rule_changes_is_changed_in_their_order() -> None:
    logits = torch.tensor([[1.0, -3.0, 5.0], [1.0, 1.0, 1.0]])
    one, two = np.asarray([0, 0]), np.asarray([0, 1])
    edits = Edits(
        Cells(one, two, f32([3.0, 1.0])),
        Penalties(Cells(one, two, f32([2.0, 0.0])), f32([2.0, 9.0]), f32([0.25, 9.0]), f32([0.5, 9.0])),
        Cells(np.asarray([0]), np.asarray([2])),
        Masks(np.asarray([1]), np.asarray([[0b101]], dtype=np.int32)),
        f32([0.5, 4.0]),
    )
    kernels.edit_logits(logits, edits)
    # (1 + 3) / 2 - 0.25 x 2 - 0.5 and (-3 + 1) x 2, each over 0.5
    assert logits.tolist() == [[2.0, -8.0, -math.inf], [0.25, -math.inf, 0.25]]


def test_no_edits_and_no_rows_change_nothing_and_other_logits_are_refused() -> None:
    logits = torch.full((2, 5), math.nan)
    kernels.edit_logits(logits, Edits())
    kernels.edit_logits(logits[:0], Edits(temperatures=f32([])))
    assert logits.isnan().all()
    with pytest.raises(TypeError, match=r"torch\.float16"):
        kernels.edit_logits(logits.half(), Edits())


def test_each_masked_row_reads_its_own_words_and_the_last_may_be_begun() -> None:
    logits = torch.zeros(4, 35)
    bits = np.asarray([[1, 4], [2, 1]], dtype=np.int32)
    kernels.edit_logits(logits, Edits(masks=Masks(np.asarray([1, 3]), bits)))
    stays = [(row > -math.inf).nonzero().squeeze(1).tolist() for row in logits]
    assert stays == [list(range(35)), [0, 34], list(range(35)), [1, 32]]
