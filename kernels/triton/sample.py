"""The Gumbel-max draw of `Ops.sample`: one pass, noise made where it is added, nothing the size of the logits stored.

The noise is Philox4x32-10, integer for integer that of `kernels/philox.py`. Its two logarithms are taken in float64: in
float32 the hardware's logarithm is so far off near 1 that the greatest noise would be infinite. A program draws whole
quads of token ids, so the four words of a counter are used where they are made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox

from kernels.triton.tiles import next_power_of_two

_QUADS = 256
_MAX_SPLITS = 16


@triton.jit
def draw_words(quad, seed, position, sample_index, stream):
    """The four words of each counter (quad, position, sample index, stream), uint32, ordered by token id."""
    zero = tl.zeros_like(quad)
    w0, w1, w2, w3 = philox(seed, quad, zero + position, zero + sample_index, zero + stream)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit(do_not_specialize=["stream"])
def _partial(
    logits,  # float32 [J, V]
    seeds,  # int64 [J]
    sample_indices,
    positions,
    greedy,  # bool [J]
    partial,  # float32 [J, SPLITS]
    partial_id,  # int64 [J, SPLITS]
    stream,
    V: tl.constexpr,
    QUADS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    seed = tl.load(seeds + row)
    sample_index = (tl.load(sample_indices + row) & 0xFFFFFFFF).to(tl.uint32)
    position = (tl.load(positions + row) & 0xFFFFFFFF).to(tl.uint32)
    is_greedy = tl.load(greedy + row) != 0
    part = tl.cdiv(tl.cdiv(V, 4), SPLITS)  # in quads
    end = tl.minimum((split * part + part) * 4, V)
    best = tl.full([], float("-inf"), tl.float32)
    best_id = split * part * 4
    for first in tl.range(split * part, split * part + part, QUADS):
        v = first * 4 + tl.arange(0, 4 * QUADS)
        x = tl.load(logits + row * V + v, mask=v < end, other=float("-inf"))
        # Tokens that a filter has banned draw nothing, and after top_k or top_p few blocks hold another.
        if (not is_greedy) & (tl.max(x, 0) > float("-inf")):
            quad = (first + tl.arange(0, QUADS)).to(tl.uint32)
            words = draw_words(quad, seed, position, sample_index, stream.to(tl.uint32))
            uniform = ((words >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07  # 2^-23
            x += (-tl.log(-tl.log(uniform))).to(tl.float32)
        top, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        best_id = tl.where(top > best, first * 4 + at, best_id)
        best = tl.maximum(best, top)
    tl.store(partial + row * SPLITS + split, best)
    tl.store(partial_id + row * SPLITS + split, best_id.to(tl.int64))


@triton.jit
def _finish(partial, partial_id, chosen, SPLITS: tl.constexpr):
    row = tl.program_id(0)
    tops = tl.load(partial + row * SPLITS + tl.arange(0, SPLITS))
    _, where = tl.max(tops, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(chosen + row, tl.load(partial_id + row * SPLITS + where))


def sample(
    logits_JV: Tensor, seeds_J: Tensor, sample_index_J: Tensor, positions_J: Tensor, greedy_J: Tensor, stream: int = 0
) -> Tensor:
    """`Ops.sample`. Raises TypeError if the logits are not float32."""
    if logits_JV.dtype != torch.float32:
        raise TypeError(f"logits are {logits_JV.dtype}; sampling takes float32")
    num_rows, vocab = logits_JV.shape
    splits = min(_MAX_SPLITS, next_power_of_two(triton.cdiv(vocab, 4 * _QUADS)))
    partial = torch.empty((num_rows, splits), dtype=torch.float32, device=logits_JV.device)
    partial_id = torch.empty((num_rows, splits), dtype=torch.int64, device=logits_JV.device)
    chosen_J = torch.empty(num_rows, dtype=torch.int64, device=logits_JV.device)
    if num_rows:
        _partial[(num_rows, splits)](
            logits_JV.contiguous(), seeds_J.contiguous(), sample_index_J.contiguous(), positions_J.contiguous(),
            greedy_J.contiguous(), partial, partial_id, stream, V=vocab, QUADS=_QUADS, SPLITS=splits, num_warps=4,
        )  # fmt: skip
        _finish[(num_rows,)](partial, partial_id, chosen_J, SPLITS=splits, num_warps=1)
    return chosen_J
