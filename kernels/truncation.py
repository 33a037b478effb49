"""min_p, top_k and top_p, the filters that cut the tail of a distribution: the one definition, for every back end.

Each row is cut by a threshold on its own logits, so that the result depends on nothing else in the batch. On a CPU the
threshold is found without sorting: a histogram over the distance to the best logit says in which bin the edge lies,
and only that bin is sorted. That is exact, not a quantisation: a bin holds all logits of its range, and ranges do not
overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEG_INF = float("-inf")
NUM_BINS = 2048
BINS_PER_NAT = 64
"""2048 bins of 1/64 reach 32 nats below the best logit; the last bin holds the rest."""
MAX_CELLS = 1 << 17
"""Logits looked at together: the intermediate arrays stay in the cache and small."""

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]


class Filters(NamedTuple):
    """Of each row, in host memory: min_p float32, 0 = off; top_k int64, 0 = off; top_p float64, 1 = off."""

    min_p: _Floats
    top_k: NDArray[np.int64]
    top_p: _Doubles

    def of(self, rows: NDArray[np.intp]) -> Filters:
        return Filters(self.min_p[rows], self.top_k[rows], self.top_p[rows])


def log_min_p(min_p: _Floats) -> _Floats:
    """How far below the best logit each row's floor lies, -inf where it is off; the same on every device."""
    off = np.full(min_p.shape, NEG_INF)
    return np.log(min_p, where=min_p > 0, out=off, dtype=np.float64).astype(np.float32)


def truncate(logits_JV: Tensor, filters: Filters) -> None:
    """`Ops.truncate`: first min_p, then top_k, then top_p of what is left, each on the rows that ask for it."""
    _on_rows(logits_JV, filters, filters.min_p > 0, keep_min_p)
    _on_rows(logits_JV, filters, (filters.top_k > 0) | (filters.top_p < 1), keep_top)


def _on_rows(
    logits_JV: Tensor, filters: Filters, is_asked: NDArray[np.bool_], change: Callable[[Tensor, Filters], None]
) -> None:
    """Run `change` on some rows: on the whole if they are all of it, else on a copy that is put back."""
    rows = np.flatnonzero(is_asked)
    if rows.size == is_asked.size:
        change(logits_JV, filters)
    elif rows.size:
        at = torch.from_numpy(rows).to(logits_JV.device)
        part_RV = logits_JV[at]
        change(part_RV, filters.of(rows))
        logits_JV[at] = part_RV


def keep_min_p(logits_RV: Tensor, filters: Filters) -> None:
    """Ban tokens less likely than min_p x the likeliest. In place."""
    floor = torch.from_numpy(log_min_p(filters.min_p)).to(logits_RV.device).unsqueeze(1)
    logits_RV.masked_fill_(logits_RV < logits_RV.amax(dim=1, keepdim=True) + floor, NEG_INF)


def keep_top(logits_RV: Tensor, filters: Filters) -> None:
    """Keep the k best tokens, then the fewest best of these whose mass reaches p. In place.

    logits_RV  float32, at least one finite entry per row; tokens equal to the k-th best stay too, at least one token
    stays for any p, and of equal tokens at the edge of p the lowest ids
    """
    if logits_RV.device.type != "cpu":
        _keep_top_by_sorting(logits_RV, filters)
        return
    logits, top_k, top_p = logits_RV.numpy(), filters.top_k, filters.top_p
    vocab_size = logits.shape[1]
    size = max(1, MAX_CELLS // vocab_size)
    for rows in _parts(np.flatnonzero((top_k > 0) & (top_k < vocab_size)), size):
        part = logits[rows]
        floor, _ = _edge(part, np.ones_like(part), top_k[rows].astype(np.float64))
        logits[rows] = np.where(part < floor[:, None], np.float32(NEG_INF), part)
    for rows in _parts(np.flatnonzero(top_p < 1), size):
        part = logits[rows]
        logits[rows] = _cut_top_p(part, top_p[rows])


def _parts(rows: NDArray[np.intp], size: int) -> list[NDArray[np.intp]]:
    return [rows[start : start + size] for start in range(0, rows.size, size)]


def _cut_top_p(logits: _Floats, top_p: _Doubles) -> _Floats:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    floor, surplus = _edge(logits, weights, top_p * weights.sum(axis=1, dtype=np.float64))
    cut = np.where(logits < floor[:, None], np.float32(NEG_INF), logits)
    for row in np.flatnonzero(surplus):
        equal = np.flatnonzero(cut[row] == floor[row])
        cut[row, equal[equal.size - surplus[row] :]] = NEG_INF
    return cut


def _edge(logits: _Floats, weights: _Floats, wanted: _Doubles) -> tuple[_Floats, NDArray[np.int64]]:
    """Per row, the largest logit at which the weights of all logits above and at it reach `wanted`.

    Returns the logit and how many of the logits equal to it are more than are needed. Sums are float64 and of one row
    each, so that a row's result does not depend on its neighbours.
    """
    num_rows = logits.shape[0]
    each = np.arange(num_rows)
    distance = (logits.max(axis=1, keepdims=True) - logits) * np.float32(BINS_PER_NAT)
    bins = np.minimum(distance, np.float32(NUM_BINS - 1)).astype(np.int64)
    bins += each[:, None] * NUM_BINS
    heights = np.bincount(bins.ravel(), weights.ravel(), num_rows * NUM_BINS).reshape(num_rows, NUM_BINS)
    mass = heights.cumsum(axis=1)
    edge = np.minimum((mass < wanted[:, None]).sum(axis=1), NUM_BINS - 1)
    above = np.where(edge > 0, mass[each, edge - 1], 0.0)

    row, token = np.divmod(np.flatnonzero(bins == (edge + each * NUM_BINS)[:, None]), logits.shape[1])
    counts = np.bincount(row, minlength=num_rows)
    place = np.arange(row.size) - (counts.cumsum() - counts)[row]
    inside = np.full((num_rows, max(1, int(counts.max()))), NEG_INF, dtype=np.float32)
    inside_weights = np.zeros(inside.shape, dtype=np.float32)
    inside[row, place] = logits[row, token]
    inside_weights[row, place] = weights[row, token]
    order = np.argsort(-inside, axis=1)
    inside = np.take_along_axis(inside, order, axis=1)
    reached = above[:, None] + np.take_along_axis(inside_weights, order, axis=1).cumsum(axis=1, dtype=np.float64)
    # Rounding may leave the last sum below what is wanted; then everything in the bin stays.
    last = np.minimum((reached < wanted[:, None]).sum(axis=1), np.maximum(counts - 1, 0))
    floor = inside[each, last]
    return floor, (inside >= floor[:, None]).sum(axis=1) - (last + 1)


def _keep_top_by_sorting(logits_RV: Tensor, filters: Filters) -> None:
    """The same on a device where sorting is cheap and atomic histograms are not exact."""
    top_k_R, top_p_R = (torch.from_numpy(column).to(logits_RV.device) for column in filters[1:])
    vocab_size = logits_RV.shape[1]
    sorted_RV, ids_RV = logits_RV.sort(dim=1, descending=True, stable=True)
    last = torch.where(top_k_R > 0, top_k_R.clamp(max=vocab_size), vocab_size) - 1
    sorted_RV = sorted_RV.masked_fill(sorted_RV < sorted_RV.gather(1, last.unsqueeze(1)), NEG_INF)
    weights = (sorted_RV - sorted_RV[:, :1]).exp().double()
    before = weights.cumsum(dim=1) - weights
    is_past = before >= (top_p_R * weights.sum(dim=1)).unsqueeze(1)
    # The best token always stays; rows without top_p lose nothing to rounding.
    is_past[:, 0] = False
    is_past &= (top_p_R < 1).unsqueeze(1)
    logits_RV.scatter_(1, ids_RV, sorted_RV.masked_fill(is_past, NEG_INF))
