"""min_p, then top_k, then top_p in place, as `kernels/truncation.py` defines them, by thresholds and without sorting.

A pass counts and weighs what lies above sixteen coarse thresholds below the best logit; a second one collects what is
above the first that is low enough, a few hundred of 100,000; the exact edge is bisected among those. A row without
filters returns at once; one with min_p alone needs the best logit and the cut.

Masses are integers: exp(x - best) in units of 2^-42. Sums of them are exact, whatever their order and however many
programs share a row, so what a row keeps depends on its own logits alone; probabilities are float32's as in the twin,
which may cut elsewhere only where a sum comes as near to p as float32 rounds.
Source: threshold search as in vLLM's and FlashInfer's samplers; exact here: ties as in the twin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.upload import upload
from kernels.truncation import Filters, log_min_p

_BLOCK = 1024
_PIVOT_BLOCK = 256
_PIVOTS = 16
_SPLITS = 16
MAX_VOCAB = 1 << 20
"""More masses of up to 2^42 could overflow 64 bits."""


@triton.jit
def _ordered(x):
    """int32 that compare as the floats do; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(x, best):
    return (tl.exp(x - best) * 4398046511104.0 + 0.5).to(tl.int64)  # 2^42


@triton.jit
def _share(p, mass):
    """p of a mass, rounded up."""
    share = p * mass.to(tl.float64)
    whole = share.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < share), 1)


@triton.jit
def _thresholds(best, floor, PIVOTS: tl.constexpr):
    """1/8 to 28 nats below the best logit, closest there, none below the floor of min_p, which is the last."""
    i = tl.arange(0, PIVOTS)
    below = best - (i + 1) * (i + 1) * 0.125
    return tl.where(i == PIVOTS - 1, floor, tl.maximum(below, floor))


@triton.jit
def _peaks(
    logits,  # float32 [J, V]
    log_min_p,  # float32 [J], -inf = off
    top_k,  # int64 [J], 0 = off
    top_p,  # float64 [J], 1 = off
    peaks,  # float32 [J, SPLITS]
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    searches = (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0)
    if searches | (tl.load(log_min_p + row) > float("-inf")):
        part = tl.cdiv(V, SPLITS)
        end = tl.minimum(split * part + part, V)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in tl.range(split * part, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.load(logits + row * V + v, mask=v < end, other=float("-inf")))
        tl.store(peaks + row * SPLITS + split, tl.max(best, 0))


@triton.jit
def _best(peaks, row, SPLITS: tl.constexpr):
    return tl.max(tl.load(peaks + row * SPLITS + tl.arange(0, SPLITS)), 0)


@triton.jit
def _weigh(
    logits,
    log_min_p,
    top_k,
    top_p,
    peaks,
    counts,  # int32 [J, SPLITS, PIVOTS]: of the split's logits at or above each threshold
    masses,  # int64 [J, SPLITS, PIVOTS]
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0):
        best = _best(peaks, row, SPLITS)
        thresholds = _thresholds(best, best + tl.load(log_min_p + row), PIVOTS)
        part = tl.cdiv(V, SPLITS)
        end = tl.minimum(split * part + part, V)
        count = tl.zeros([BLOCK, PIVOTS], tl.int32)
        mass = tl.zeros([BLOCK, PIVOTS], tl.int64)
        for start in tl.range(split * part, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + v, mask=v < end, other=float("-inf"))
            above = (x[:, None] >= thresholds[None, :]) & (x > float("-inf"))[:, None]
            count += above.to(tl.int32)
            mass += tl.where(above, _mass(x, best)[:, None], 0)
        at = (row * SPLITS + split) * PIVOTS + tl.arange(0, PIVOTS)
        tl.store(counts + at, tl.sum(count, 0))
        tl.store(masses + at, tl.sum(mass, 0))


@triton.jit
def _coarse(counts, masses, row, top_k, top_p, PIVOTS: tl.constexpr, SPLITS: tl.constexpr):
    """Which threshold is low enough, the counts and masses at all of them, whether top_k cuts anything."""
    cells = tl.arange(0, SPLITS)[:, None] * PIVOTS + tl.arange(0, PIVOTS)[None, :]
    count = tl.sum(tl.load(counts + row * SPLITS * PIVOTS + cells), 0)
    mass = tl.sum(tl.load(masses + row * SPLITS * PIVOTS + cells), 0)
    k = tl.load(top_k + row)
    cuts = (k > 0) & (k < tl.max(count, 0))
    # What top_p leaves is among the k best.
    too_high = tl.where(cuts, count < k, mass < _share(tl.load(top_p + row), tl.max(mass, 0)))
    return tl.minimum(tl.sum(too_high.to(tl.int32), 0), PIVOTS - 1), count, mass, cuts


@triton.jit
def _pick(values, index, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, values, 0), 0)


@triton.jit
def _collect(
    logits,
    log_min_p,
    top_k,
    top_p,
    peaks,
    counts,
    masses,
    found,  # float32 [J, V]: the row's logits above its threshold, in their order
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0):
        best = _best(peaks, row, SPLITS)
        chosen, _, _, _ = _coarse(counts, masses, row, top_k, top_p, PIVOTS, SPLITS)
        threshold = tl.max(
            tl.where(
                tl.arange(0, PIVOTS) == chosen,
                _thresholds(best, best + tl.load(log_min_p + row), PIVOTS),
                float("-inf"),
            ),
            0,
        )
        before = tl.arange(0, SPLITS)
        offsets = tl.load(counts + (row * SPLITS + before) * PIVOTS + chosen, mask=before < split, other=0)
        done = tl.sum(offsets, 0)
        part = tl.cdiv(V, SPLITS)
        end = tl.minimum(split * part + part, V)
        for start in tl.range(split * part, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + v, mask=v < end, other=float("-inf"))
            is_found = ((x >= threshold) & (x > float("-inf"))).to(tl.int32)
            num_found = tl.sum(is_found, 0)
            if num_found > 0:
                place = done + tl.cumsum(is_found, 0) - 1
                tl.store(found + row * V + place, x, mask=is_found != 0)
            done += num_found


@triton.jit
def _bisect(
    found, num_found, best, low, count_low, mass_low, wanted, BY_MASS: tl.constexpr, PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest value with `wanted` (count or mass) at and above it, as the ordered interval [low, high) that holds
    no other. Returns low, count and mass from low on, count and mass from high on."""
    high = _ordered(best).to(tl.int64) + 1
    count_high = tl.zeros_like(count_low)
    mass_high = tl.zeros_like(mass_low)
    i = tl.arange(0, PIVOTS)
    while (count_low - count_high > 1) & (high - low > 1):
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = tl.minimum(low + (i + 1) * step, high).to(tl.int32)
        count = tl.zeros([BLOCK, PIVOTS], tl.int32)
        mass = tl.zeros([BLOCK, PIVOTS], tl.int64)
        for start in tl.range(0, num_found, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(found + at, mask=at < num_found, other=float("-inf"))
            above = (_ordered(x)[:, None] >= pivots[None, :]) & (at < num_found)[:, None]
            count += above.to(tl.int32)
            mass += tl.where(above, _mass(x, best)[:, None], 0)
        counts = tl.sum(count, 0)
        masses = tl.sum(mass, 0)
        if BY_MASS:
            reached = tl.sum((masses >= wanted).to(tl.int32), 0)
        else:
            reached = tl.sum((counts >= wanted).to(tl.int32), 0)
        if reached < PIVOTS:
            high = tl.minimum(low + (reached + 1) * step, high)
            count_high = _pick(counts, reached, PIVOTS)
            mass_high = _pick(masses, reached, PIVOTS)
        if reached > 0:
            low = low + reached * step
            count_low = _pick(counts, reached - 1, PIVOTS)
            mass_low = _pick(masses, reached - 1, PIVOTS)
    return low, count_low, mass_low, count_high, mass_high


@triton.jit
def _find_edges(
    logits,
    log_min_p,
    top_k,
    top_p,
    peaks,
    counts,
    masses,
    found,
    edges,  # int32 [J]: ordered; logits above it stay
    last_ids,  # int32 [J]: of those equal to it the ids up to this one
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    log_p = tl.load(log_min_p + row)
    searches = (k > 0) | (p < 1.0)
    if searches | (log_p > float("-inf")):
        best = _best(peaks, row, SPLITS)
        floor = best + log_p
        low = _ordered(floor).to(tl.int64)
        last_id = V
        if searches:
            chosen, count, mass, cuts = _coarse(counts, masses, row, top_k, top_p, PIVOTS, SPLITS)
            num_found = _pick(count, chosen, PIVOTS)
            mass_low = _pick(mass, chosen, PIVOTS)
            count_low = num_found
            thresholds = _thresholds(best, floor, PIVOTS)
            first = tl.max(tl.where(tl.arange(0, PIVOTS) == chosen, thresholds, float("-inf")), 0)
            mass_all = tl.max(mass, 0)
            if cuts | (p < 1.0):
                low = _ordered(first).to(tl.int64)
            mine = found + row * V
            if cuts:
                low, count_low, mass_low, _, _ = _bisect(
                    mine, num_found, best, low, count_low, mass_low, k, False, PIVOTS, BLOCK
                )
                mass_all = mass_low
            if p < 1.0:
                wanted = _share(p, mass_all)
                low, count_low, mass_low, count_high, mass_high = _bisect(
                    mine, num_found, best, low, count_low, mass_low, wanted, True, PIVOTS, BLOCK
                )
                num_equal = count_low - count_high
                if num_equal > 1:
                    each = (mass_low - mass_high) // num_equal
                    kept = (wanted - mass_high + each - 1) // each
                    if kept < num_equal:
                        last_id = _nth_equal(logits + row * V, low, kept, V, BLOCK)
        tl.store(edges + row, low.to(tl.int32))
        tl.store(last_ids + row, last_id)


@triton.jit
def _nth_equal(logits, ordered, number, V: tl.constexpr, BLOCK: tl.constexpr):
    """Id of the `number`-th logit, from 1 on, of one value."""
    seen = number * 0
    last = V
    for start in tl.range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=float("-inf"))
        is_equal = ((_ordered(x) == ordered) & (v < V)).to(tl.int32)
        rank = seen + tl.cumsum(is_equal, 0)
        last = tl.minimum(last, tl.min(tl.where((is_equal != 0) & (rank == number), v, V), 0))
        seen += tl.sum(is_equal, 0)
    return last


@triton.jit
def _cut(
    logits,
    log_min_p,
    top_k,
    top_p,
    edges,
    last_ids,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    searches = (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0)
    if searches | (tl.load(log_min_p + row) > float("-inf")):
        edge = tl.load(edges + row)
        last_id = tl.load(last_ids + row)
        part = tl.cdiv(V, SPLITS)
        end = tl.minimum(split * part + part, V)
        for start in tl.range(split * part, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + v, mask=v < end, other=float("-inf"))
            ordered = _ordered(x)
            stays = (ordered > edge) | ((ordered == edge) & (v <= last_id))
            tl.store(logits + row * V + v, float("-inf"), mask=(v < end) & (stays == 0))


def truncate(logits_JV: Tensor, filters: Filters, num_sms: int) -> None:
    """`Ops.truncate`. A row is one program's from `num_sms` rows on, several programs' below.

    Raises ValueError or TypeError if the logits are not contiguous float32 of at most MAX_VOCAB ids.
    """
    num_rows, vocab = logits_JV.shape
    if logits_JV.dtype != torch.float32 or not logits_JV.is_contiguous():
        raise TypeError(f"logits are {logits_JV.dtype}, strides {logits_JV.stride()}; they are cut in place, so they "
                        "must be contiguous float32")  # fmt: skip
    if vocab > MAX_VOCAB:
        raise ValueError(f"the vocabulary is {vocab}; top_p weighs at most {MAX_VOCAB} ids")
    if num_rows == 0:
        return
    device = logits_JV.device
    splits = 1 if num_rows >= num_sms else _SPLITS
    peaks = torch.empty((num_rows, splits), dtype=torch.float32, device=device)
    counts = torch.empty((num_rows, splits, _PIVOTS), dtype=torch.int32, device=device)
    masses = torch.empty((num_rows, splits, _PIVOTS), dtype=torch.int64, device=device)
    found = torch.empty((num_rows, vocab), dtype=torch.float32, device=device)
    edges, last_ids = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    rules = logits_JV, *upload([log_min_p(filters.min_p), filters.top_k, filters.top_p], device)
    grid, cut = (num_rows, splits), {"V": vocab, "SPLITS": splits}
    _peaks[grid](*rules, peaks, BLOCK=_BLOCK, **cut, num_warps=4)
    _weigh[grid](*rules, peaks, counts, masses, BLOCK=_PIVOT_BLOCK, PIVOTS=_PIVOTS, **cut, num_warps=8)
    _collect[grid](*rules, peaks, counts, masses, found, BLOCK=_BLOCK, PIVOTS=_PIVOTS, **cut, num_warps=4)
    _find_edges[(num_rows,)](
        *rules, peaks, counts, masses, found, edges, last_ids, BLOCK=_PIVOT_BLOCK, PIVOTS=_PIVOTS, **cut, num_warps=8
    )
    _cut[grid](*rules, edges, last_ids, BLOCK=_BLOCK, **cut, num_warps=4)
