"""Spans to tensors, against a loop over tokens."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from scheduler.types import MASK_ALL, MAX_TREE_NODES, Denoise, Read, Request, Span
from server.worker.batch import build_batch
from server.worker.recipe import make_recipe
from server.worker.sequences import SequenceState

CPU = torch.device("cpu")
PAGE = 4


def state(slot: int, num_pages: int) -> SequenceState:
    request = Request(str(slot), (1,), 9)
    return SequenceState(request, make_recipe(request, ()), slot, [1], 0, num_pages=num_pages)


def random_spans(rng: random.Random, num_spans: int) -> tuple[list[Span], list[SequenceState]]:
    spans, states = [], []
    for slot in rng.sample(range(20), num_spans):
        mask_block = rng.choice([1, 1, 3, 8, MASK_ALL])
        start, length = rng.randint(0, 30), rng.randint(1, 12)
        kv_len = start + length + (rng.randint(0, 4) if mask_block > 1 else 0)
        spans.append(Span(slot, tuple(rng.choices(range(99), k=length)), start, kv_len, mask_block))
        states.append(state(slot, -(-kv_len // PAGE) + rng.randint(0, 2)))
    return spans, states


@pytest.mark.parametrize("seed", range(25))
def test_every_row_has_the_place_and_the_mask_of_its_span(seed: int) -> None:
    rng = random.Random(seed)
    page_table = np.array([rng.sample(range(1000), 14) for _ in range(20)], dtype=np.int32)
    spans, states = random_spans(rng, rng.randint(1, 9))
    batch = build_batch(spans, states, page_table, PAGE, CPU)
    rows, at = batch.rows, 0
    for index, span in enumerate(spans):
        assert batch.first_rows[index] == at == int(rows.span_starts[index])
        for offset, token in enumerate(span.tokens):
            position = span.start + offset
            visible = min(span.kv_len, (position // span.mask_block + 1) * span.mask_block)
            page = int(page_table[span.seq_id, position // PAGE])
            assert int(batch.tokens[at]) == token
            assert int(rows.positions[at]) == position
            assert int(rows.visible[at]) == visible
            assert int(rows.slots[at]) == page * PAGE + position % PAGE
            read = rows.page_table[int(rows.row_seq[at]), : -(-span.kv_len // PAGE)]
            assert read.tolist() == page_table[span.seq_id, : len(read)].tolist()
            at += 1
    assert at == len(batch.tokens) == batch.first_rows[-1] == int(rows.span_starts[-1])
    assert rows.visible.dtype == rows.page_table.dtype == torch.int32
    assert rows.slots.dtype == batch.tokens.dtype == torch.int64


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_a_tree_stand_at_their_depth_and_see_their_ancestors(seed: int) -> None:
    rng = random.Random(seed)
    page_table = np.array([rng.sample(range(1000), 40) for _ in range(20)], dtype=np.int32)
    spans, states = random_spans(rng, 4)
    for at in (1, 3):
        num_tokens, start = (MAX_TREE_NODES, 5) if at == 1 else (rng.randint(2, 20), rng.randint(0, 30))
        parents = (-1, *(rng.randrange(offset) for offset in range(1, num_tokens)))
        spans[at] = Span(spans[at].seq_id, (7,) * num_tokens, start, start + num_tokens, parents=parents)
        states[at] = state(spans[at].seq_id, 40)
    batch = build_batch(spans, states, page_table, PAGE, CPU)
    rows = batch.rows
    assert rows.tree is not None
    assert rows.tree_starts is not None
    assert rows.tree.dtype == torch.int64
    for index, span in enumerate(spans):
        for offset in range(len(span.tokens)):
            row, ancestors, at = batch.first_rows[index] + offset, {offset}, offset
            while span.parents and at:
                at = span.parents[at]
                ancestors.add(at)
            bits = int(rows.tree[row]) % (1 << 64)
            seen = {bit for bit in range(64) if bits >> bit & 1}
            assert seen == (ancestors if span.parents else set())
            depth = len(ancestors) - 1 if span.parents else offset
            assert int(rows.positions[row]) == span.start + depth
            assert not span.parents or int(rows.tree_starts[row]) == span.start
            place = span.start + offset
            assert int(rows.slots[row]) == page_table[span.seq_id, place // PAGE] * PAGE + place % PAGE
    assert build_batch(spans[:1], states[:1], page_table, PAGE, CPU).rows.tree is None


@pytest.mark.parametrize("seed", range(6))
def test_scattered_rows_and_shadows_have_their_own_places_and_masks(seed: int) -> None:
    rng = random.Random(seed)
    page_table = np.array([rng.sample(range(1000), 40) for _ in range(20)], dtype=np.int32)
    at = tuple(sorted(rng.sample(range(30), rng.randint(1, 12))))
    size, blocks, behind = rng.choice([1, 4, 8, 32]), rng.randint(0, 3), rng.choice([0, 5])
    lo, hi = size * blocks, size * (blocks + 1)
    num_own = hi + behind
    denoise = Denoise(lo, hi, 0, 1, (lo, hi), shadow=size)
    mask_block = MASK_ALL if behind else size
    shadowed = Span(2, (5,) * (num_own + size), 0, num_own + size, mask_block, read=Read.DENOISE, denoise=denoise)
    spans = [Span(1, (7,) * len(at), at[0], 30, MASK_ALL, positions=at), shadowed, Span(3, (9, 9), 4, 6)]
    batch = build_batch(spans, [state(slot, 40) for slot in (4, 5, 6)], page_table, PAGE, CPU)
    rows = batch.rows
    slots = [int(page_table[4, place // PAGE]) * PAGE + place % PAGE for place in at]
    assert rows.positions[: len(at)].tolist() == list(at)
    assert rows.slots[: len(at)].tolist() == slots
    assert rows.visible[: len(at)].tolist() == [30] * len(at)
    assert rows.tree is not None
    assert rows.tree_starts is not None
    first = batch.first_rows[1]
    places = {int(page_table[5, key // PAGE]) * PAGE + key % PAGE: key for key in range(num_own + size)}
    key_of = [places[int(slot)] for slot in rows.slots[first : first + num_own + size]]
    assert sorted(key_of) == list(range(num_own + size))
    assert rows.positions[first : first + num_own + size].tolist() == [*range(num_own), *range(lo, hi)]
    for row in range(num_own + size):
        bits, start = int(rows.tree[first + row]) % (1 << 64), int(rows.tree_starts[first + row])
        if row < num_own:
            assert bits == 0
            assert int(rows.visible[first + row]) == (num_own if behind else (row // size + 1) * size)
            continue
        seen = set(range(start)) | {start + bit for bit in range(64) if bits >> bit & 1}
        shadow = row - num_own
        assert seen == {key_of[own] for own in range(num_own) if own != lo + shadow} | {key_of[row]}
    assert rows.tree[batch.first_rows[2] :].tolist() == [0, 0]


def test_a_batch_of_512_decodes_is_built_within_a_few_milliseconds() -> None:
    """Typically 0.6 ms; the limit leaves room for a busy machine and still catches a loop over tokens or pages."""
    page_table = np.arange(512 * 64, dtype=np.int32).reshape(512, 64)
    spans = [Span(i, (7,), 200 + i % 50, 201 + i % 50, judged=(0,)) for i in range(512)]
    states = [state(i, 64) for i in range(512)]
    best = float("inf")
    for _ in range(20):
        started_at = time.perf_counter()
        build_batch(spans, states, page_table, PAGE, CPU)
        best = min(best, time.perf_counter() - started_at)
    assert best < 3e-3


def test_a_span_past_its_pages_is_refused_by_name() -> None:
    page_table = np.zeros((4, 8), dtype=np.int32)
    spans = [Span(5, (1, 2), 0, 2), Span(6, (1,), 8, 9)]
    with pytest.raises(ValueError, match=r"sequence 6 covers KV \[8, 9\).*2 pages hold 8"):
        build_batch(spans, [state(0, 1), state(1, 2)], page_table, PAGE, CPU)
