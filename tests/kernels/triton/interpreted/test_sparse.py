"""What sparse rows choose by, interpreted: metadata, scores and lists against definitions a row at a time."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.sparse import Role, SparseLayer, sub_page
from kernels.sparse_keep import physical_ids, top_k
from kernels.triton.sparse import top_k as top_k_kernels
from kernels.triton.sparse.metadata import write_metadata
from kernels.triton.sparse.scores import score_keys, score_pages
from kernels.triton.sparse.top_k import select_top_k
from tests.kernels.triton.sparse_worlds import Pool, guarded, unharmed

DENSE = (Role.DENSE, Role.DENSE, Role.DENSE, Role.DENSE)


def assert_scores(actual: Tensor, wanted: Tensor, mass: Tensor) -> None:
    """float32 sums, then one rounding to float16; `mass` is the sum of absolute products."""
    assert actual.dtype == torch.float16
    bound = mass * 2.0**-18 + wanted.abs() * 2.0**-11 + 2.0**-24
    assert bool(((actual.double() - wanted).abs() <= bound).all())


def score(pool: Pool, keys: Tensor, channels: Tensor | None, budgets: list[int], splits: int) -> Tensor:
    scores, whole = guarded(len(pool.lengths), pool.num_kv, max(pool.lengths) + 3, dtype=torch.float16)
    score_keys(
        pool.q, keys, channels, pool.table, pool.row_seq, pool.visible, torch.tensor(budgets).int(), scores, 0.5, splits
    )
    assert unharmed(whole)
    return scores


@pytest.mark.parametrize(
    ("group", "head_dim", "page", "dtype"),
    [(1, 16, 16, torch.float16), (3, 40, 7, torch.float32), (4, 64, 64, torch.bfloat16)],
)
def test_a_probe_scores_keys_by_the_best_of_their_group(
    group: int, head_dim: int, page: int, dtype: torch.dtype
) -> None:
    pool = Pool([1, 65, 130], 2, group, head_dim, page, dtype)
    scores = score(pool, pool.k, None, [0, 64, 129], splits=2)
    for row, length in enumerate(pool.lengths):
        products = pool.products(row) * 0.5
        mass = torch.einsum(
            "kgd,nkd->kgn", pool.q[row].double().abs().view(2, group, -1), pool.keys[row].double().abs()
        )
        assert_scores(scores[row, :, :length], products.amax(1), mass.amax(1))
        assert scores[row, :, length:].isnan().all(), "nothing is written past the row's keys"


@pytest.mark.parametrize(
    ("num_channels", "dtype"),
    [(5, torch.float32), (17, torch.bfloat16)]
    + [pytest.param(count, torch.bfloat16, marks=pytest.mark.slow) for count in (1, 16, 40)],
)
def test_labels_are_channels_of_keys_and_score_like_them(num_channels: int, dtype: torch.dtype) -> None:
    pool = Pool([70, 140], dtype=dtype)
    channels = torch.stack([torch.randperm(40)[:num_channels] for _ in range(2)]).int()
    labels = torch.full((*pool.k.shape[:3], num_channels), math.nan, dtype=dtype)
    write_metadata(pool.k, pool.slots, SparseLayer(DENSE, None, labels, channels))
    scores = score(pool, labels, channels, [69, 69], splits=3)
    for row, keys in enumerate(pool.keys):
        picked = channels.long().unsqueeze(0)
        of_keys = keys.gather(2, picked.expand(len(keys), -1, -1)).double()
        of_query = pool.q[row].double().view(2, 3, -1).gather(2, channels.long()[:, None].expand(-1, 3, -1))
        wanted = torch.einsum("kgc,nkc->kgn", of_query, of_keys).amax(1) * 0.5
        mass = torch.einsum("kgc,nkc->kgn", of_query.abs(), of_keys.abs()).amax(1)
        assert_scores(scores[row, :, : len(keys)], wanted, mass)
    pages, offsets = pool.slots // 16, pool.slots % 16
    written = pool.k[pages, :, offsets].gather(2, channels.long().expand(len(pages), -1, -1))
    assert torch.equal(labels[pages, :, offsets], written)
    assert int((~labels[..., 0].isnan()).sum()) == 2 * len(pages), "only the slots that were written"


def test_rows_that_read_all_their_keys_are_not_scored() -> None:
    pool = Pool([70, 200])
    assert score(pool, pool.k, None, [70, 199], 1)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bounds_are_made_when_a_sub_page_is_complete_and_from_written_keys_alone(dtype: torch.dtype) -> None:
    pool = Pool([42, 16, 1], dtype=dtype)
    bounds = torch.full((len(pool.k), 2, 2, 2, 40), math.nan, dtype=dtype)
    write_metadata(pool.k, pool.slots, SparseLayer(DENSE, bounds))
    whole = (int(pool.table[0, 0]), int(pool.table[0, 1]), int(pool.table[1, 0]))
    complete = {(page, part) for page in whole for part in range(2)} | {(int(pool.table[0, 2]), 0)}
    for page, part in ((page, part) for page in range(len(pool.k)) for part in range(2)):
        keys = pool.k[page, :, part * 8 : part * 8 + 8]
        if (page, part) in complete:
            assert torch.equal(bounds[page, :, part, 0], keys.amin(1))
            assert torch.equal(bounds[page, :, part, 1], keys.amax(1))
        else:
            assert bounds[page, :, part].isnan().all(), "a sub-page that is not full has no bounds yet"
    # A rejected draft in the page's last slots: they are written again, and the bounds follow.
    page = int(pool.table[1, 0])
    before = bounds[page].clone()
    pool.k[page, :, 14:] *= 9
    write_metadata(pool.k, torch.tensor([page * 16 + 14]), SparseLayer(DENSE, bounds))
    assert torch.equal(bounds[page], before)
    write_metadata(pool.k, torch.tensor([page * 16 + 15]), SparseLayer(DENSE, bounds))
    assert torch.equal(bounds[page, :, 1, 1], pool.k[page, :, 8:].amax(1))
    assert torch.equal(bounds[page, :, 0], before[:, 0])


def page_score(pool: Pool, budgets: list[int], last: int, splits: int) -> Tensor:
    parts = pool.page // sub_page(pool.page)
    bounds = torch.full((len(pool.k), pool.num_kv, parts, 2, pool.head_dim), math.nan, dtype=pool.dtype)
    write_metadata(pool.k, pool.slots, SparseLayer(DENSE, bounds))
    scores, whole = guarded(len(pool.lengths), pool.num_kv, pool.table.shape[1], dtype=torch.float16)
    score_pages(
        pool.q, bounds, pool.table, pool.row_seq, pool.visible, torch.tensor(budgets).int(), scores, 0.5, pool.page,
        last, splits,
    )  # fmt: skip
    assert unharmed(whole)
    return scores


@pytest.mark.parametrize(
    ("page", "splits", "dtype"), [(16, 1, torch.bfloat16), (7, 3, torch.float32), (24, 2, torch.float32)]
)
def test_the_score_of_a_page_is_a_bound_of_the_scores_of_its_keys(page: int, splits: int, dtype: torch.dtype) -> None:
    pool = Pool([20 * page + 3, 5 * page], page=page, dtype=dtype)
    scores = page_score(pool, [3 * page, 3 * page], 2 * page, splits)
    for row, keys in enumerate(pool.keys):
        late = (pool.lengths[row] - 2 * page) // page
        assert scores[row, :, [0, *range(late, scores.shape[2])]].isnan().all(), "neither the first nor the last pages"
        of_parts = keys[page : late * page].double().view(late - 1, -1, sub_page(page), 2, 1, 40)
        q, least, most = pool.q[row].double().view(2, 3, 40), of_parts.amin(2), of_parts.amax(2)
        wanted = torch.maximum(q * least, q * most).sum(4).amax(3).amax(1).T * 0.5
        mass = torch.maximum((q * least).abs(), (q * most).abs()).sum(4).amax(3).amax(1).T
        assert_scores(scores[row, :, 1:late], wanted, mass)
        best = (pool.products(row)[..., page : late * page] * 0.5).amax(1).view(2, late - 1, page).amax(2)
        assert bool((scores[row, :, 1:late].double() >= best * (1 - 2.0**-10) - 2.0**-10).all())


def listed(
    scores: Tensor, visible: list[int], budgets: list[int], page: int, of_pages: bool, first: int, last: int
) -> Tensor:
    """Lists of the kernels and of their twin, held to be the same; indices [R, K, B], -7 behind them."""
    num_rows, num_kv = scores.shape[:2]
    unit, size = (page, 1) if of_pages else (1, page)
    counts = [-(-keys // unit) for keys in visible]
    keep = [count if keys <= budget else budget // unit
            for count, keys, budget in zip(counts, visible, budgets, strict=True)]  # fmt: skip
    pages = max(-(-keys // page) for keys in visible)
    table = torch.randperm(num_rows * pages, generator=torch.Generator().manual_seed(1)).int().view(num_rows, pages)
    late = [(keys - last) // unit for keys in visible]
    late = [count if keys <= budget else at
            for count, at, keys, budget in zip(counts, late, visible, budgets, strict=True)]  # fmt: skip
    start = [count if keys <= budget else 1 if of_pages else first
             for count, keys, budget in zip(counts, visible, budgets, strict=True)]  # fmt: skip
    expected = top_k(scores, *(torch.tensor(part) for part in (counts, keep, start, late)))
    (ids, whole), (indices, more) = (guarded(num_rows, num_kv, max(keep) + 2, dtype=torch.int32) for _ in range(2))
    rows = torch.arange(num_rows).int()
    select_top_k(
        scores, table, rows, torch.tensor(visible).int(), torch.tensor(budgets).int(), ids, indices, page, of_pages,
        first, last,
    )  # fmt: skip
    assert unharmed(whole)
    assert unharmed(more)
    assert torch.equal(indices[..., :-2], expected.int().masked_fill(expected < 0, -7))
    physical = physical_ids(table, expected, num_kv, size)
    assert torch.equal(ids[..., :-2], physical.masked_fill(expected < 0, -7))
    assert (ids[..., -2:] == -7).all()
    return indices


@pytest.mark.parametrize(
    ("values", "cut"),
    [("one exponent", False), ("few", True)]
    + [
        pytest.param(values, True, marks=pytest.mark.slow) for values in ("normal", "equal", "negative", "one exponent")
    ],
)
def test_lists_of_keys_are_those_of_the_twin(values: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:  # as long rows are: three launches, and slices that end inside and outside of the scored range
        monkeypatch.setattr(top_k_kernels, "_LONG", 1)
        monkeypatch.setattr(top_k_kernels, "_SPLITS", 2)
    monkeypatch.setattr(top_k_kernels, "_BLOCK", 128)
    visible, budgets = [300, 9, 130, 300, 200], [40, 9, 30, 299, 200]
    scores = torch.randn(5, 2, 310, generator=torch.Generator().manual_seed(2))
    scores = {
        "normal": scores, "few": scores.round(), "equal": scores * 0, "one exponent": 1 + scores.sigmoid(),
        "negative": -scores.abs() - 1,
    }[values].half()  # fmt: skip
    for row, keys in enumerate(visible):
        scores[row, :, :4] = scores[row, :, max(0, keys - 16) :] = math.nan  # what is always kept is not scored
    indices = listed(scores, visible, budgets, 16, False, 4, 16)
    assert indices[1, 0, :9].tolist() == list(range(9)), "budget >= keys: all of them"
    assert sorted(set(range(300)) - set(indices[3, 0].tolist())) == [
        4 + int(scores[3, 0, 4:284].flip(0).argmin().sub(279).neg())
    ], "a budget of one key less drops exactly the lowest score, of equals the last"


@pytest.mark.parametrize("page", [16, 64])
def test_lists_of_pages_are_those_of_the_twin(page: int) -> None:
    visible, budgets = [10 * page + 1, 10 * page, page, 7 * page + 9], [4 * page, 5 * page + 3, page, 6 * page]
    scores = torch.randn(4, 3, 12).round().half()
    indices = listed(scores, visible, budgets, page, True, 4, page)
    assert bool((indices[..., 0] == 0).all()), "the first page"
    for row, keys in enumerate(visible):
        assert bool((indices[row] == (keys - 1) // page).any(1).all()), "the page that holds the row itself"


def test_a_list_of_a_row_that_sees_nothing_is_empty() -> None:
    """Padding rows of a graph."""
    ids = torch.full((1, 2, 8), -7, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    select_top_k(torch.zeros(1, 2, 9).half(), zero.view(1, 1), zero, zero, zero, ids, None, 16, False, 4, 16)
    select_top_k(torch.zeros(1, 2, 9).half(), zero.view(1, 1), zero, zero, zero, ids, None, 16, True, 4, 16)
    assert bool((ids == -7).all())


@pytest.mark.slow
def test_mistake_2_offsets_of_32_bits_of_labels_and_bounds() -> None:
    """Pools of more than 2^31 elements are virtual memory; an offset that wraps reads outside them and dies."""
    code = """
import torch
from kernels.sparse import Role, SparseLayer
from kernels.triton.sparse.metadata import write_metadata
from kernels.triton.sparse.scores import score_keys, score_pages
pages = (2**31 + 2**23) // (64 * 64)
pool = torch.empty(pages, 1, 64, 64, dtype=torch.float16)
pool[-1] = 1.0
bounds = torch.empty((2**31 + 2**23) // (8 * 2 * 64), 1, 8, 2, 64, dtype=torch.float16)
labels = torch.empty((2**31 + 2**23) // (64 * 64), 1, 64, 64, dtype=torch.float16)
channels = torch.arange(64, dtype=torch.int32)[None]
write_metadata(pool, torch.tensor([pages * 64 - 1]), SparseLayer((Role.DENSE,) * 4, bounds, labels, channels))
assert (bounds[pages - 1, :, -1] == 1).all() and (labels[-1, 0, -1] == 1).all()
labels[-1] = 1.0
bounds[-1] = 1.0
one, scores = torch.tensor([0], dtype=torch.int32), torch.zeros(1, 1, 64).half()
score_keys(torch.ones(1, 1, 64).half(), labels, channels, one[None] + pages - 1, one, one + 9, one, scores, 1.0, 1)
assert (scores[0, 0, :9] == 64).all()
table = torch.full((1, 4), len(bounds) - 1, dtype=torch.int32)
score_pages(torch.ones(1, 1, 64).half(), bounds, table, one, one + 256, one, scores * 0, 1.0, 64, 64, 1)
print("read the last page")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stderr[-2000:]}"
    assert "read the last page" in result.stdout
