"""What judging needs to know of each row of logits, from one pass over them and no [rows, vocabulary] copy.

A long row is cut among SPLITS programs, since one per row leaves most of a GPU idle; a second, tiny kernel merges them
in a fixed order. Values are float32; -inf marks a banned id, which has no probability.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import RowStatistics
from kernels.triton.tiles import next_power_of_two

_BLOCK = 1024
_MAX_SPLITS = 16


@triton.jit
def _merge(best, total, weighted, new_best, new_total, new_weighted):
    """Sums of exp(x - best) and of x exp(x - best) of two parts, under the greater maximum."""
    top = tl.maximum(best, new_best)
    shift = tl.where(top == float("-inf"), 0.0, top)
    old = tl.exp(best - shift)
    new = tl.exp(new_best - shift)
    return top, total * old + new_total * new, weighted * old + new_weighted * new


@triton.jit
def _partial(
    logits,  # [J, V]
    partial,  # float32 [J, SPLITS, 4]: maximum, second, sum of exp, sum of x exp
    partial_id,  # int64 [J, SPLITS]
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    part = tl.cdiv(V, SPLITS)
    best = tl.full([], float("-inf"), tl.float32)
    second = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)
    best_id = split * part
    end = tl.minimum(split * part + part, V)
    for start in tl.range(split * part, end, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + v, mask=v < end, other=float("-inf")).to(tl.float32)
        top, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        runner_up = tl.max(tl.where(tl.arange(0, BLOCK) == at, float("-inf"), x), 0)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, top))
        best_id = tl.where(top > best, start + at, best_id)
        shift = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(x - shift)
        values = tl.where(x == float("-inf"), 0.0, x)
        best, total, weighted = _merge(best, total, weighted, top, tl.sum(weights, 0), tl.sum(values * weights, 0))
    at = partial + (row * SPLITS + split) * 4
    tl.store(at, best)
    tl.store(at + 1, second)
    tl.store(at + 2, total)
    tl.store(at + 3, weighted)
    tl.store(partial_id + row * SPLITS + split, best_id.to(tl.int64))


@triton.jit(do_not_specialize=["num_rows"])
def _finish(
    logits,
    ids,  # int64 [J]
    partial,
    partial_id,
    best_id,  # int64 [J]
    values,  # float32 [5, J]: best, second, lse, entropy, logit of the given id
    num_rows,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    at = partial + (row * SPLITS + split) * 4
    tops = tl.load(at)
    best, where = tl.max(tops, 0, return_indices=True, return_indices_tie_break_left=True)
    others = tl.max(tl.where(split == where, float("-inf"), tops), 0)
    second = tl.maximum(others, tl.max(tl.load(at + 1), 0))
    shift = tl.where(best == float("-inf"), 0.0, best)
    scale = tl.exp(tops - shift)
    total = tl.sum(tl.load(at + 2) * scale, 0)
    weighted = tl.sum(tl.load(at + 3) * scale, 0)
    lse = shift + tl.log(total)
    out = values + row
    tl.store(best_id + row, tl.load(partial_id + row * SPLITS + where))
    tl.store(out, best)
    tl.store(out + num_rows, second)
    tl.store(out + 2 * num_rows, lse)
    tl.store(out + 3 * num_rows, lse - weighted / total)
    tl.store(out + 4 * num_rows, tl.load(logits + row * V + tl.load(ids + row)).to(tl.float32))


def row_statistics(logits_JV: Tensor, ids_J: Tensor) -> RowStatistics:
    """`Ops.row_statistics`; float32, bfloat16 or float16 logits."""
    num_rows, vocab = logits_JV.shape
    logits_JV, device = logits_JV.contiguous(), logits_JV.device
    splits = min(_MAX_SPLITS, next_power_of_two(triton.cdiv(vocab, _BLOCK)))
    partial = torch.empty((num_rows, splits, 4), dtype=torch.float32, device=device)
    partial_id = torch.empty((num_rows, splits), dtype=torch.int64, device=device)
    best_J = torch.empty(num_rows, dtype=torch.int64, device=device)
    values = torch.empty((5, num_rows), dtype=torch.float32, device=device)
    if num_rows:
        _partial[(num_rows, splits)](logits_JV, partial, partial_id, V=vocab, BLOCK=_BLOCK, SPLITS=splits)
        _finish[(num_rows,)](
            logits_JV, ids_J, partial, partial_id, best_J, values, num_rows, V=vocab, SPLITS=splits, num_warps=1
        )
    return RowStatistics(best_J, *values.unbind(0))
