"""min_p, top_k and top_p: the filters that cut the tail of a distribution. Part of `process_logits`, used by it alone.

Each row is cut by a threshold on its own logits, so that the result depends on nothing else in the batch. The few
largest logits are found first, and a whole row is sorted only where these do not hold enough mass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEG_INF = float("-inf")
NUM_BEST = 256
"""Largest logits looked at before a row is sorted whole: real models put any usual top_p within these."""


def keep_min_p(logits_RV: Tensor, min_p_R: Tensor) -> None:
    """Ban tokens less likely than min_p x the likeliest. In place; min_p in (0, 1]."""
    floor = logits_RV.amax(dim=1, keepdim=True) + min_p_R.log().unsqueeze(1)
    logits_RV.masked_fill_(logits_RV < floor, NEG_INF)


def keep_top(logits_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> None:
    """Keep the k best tokens, then the fewest best of these whose mass reaches p. In place.

    logits_RV  float32, at least one finite entry per row
    top_k_R    int64, 0 = off; tokens equal to the k-th best stay too
    top_p_R    float32, 1 = off; at least one token stays; of equal tokens at the edge the lowest ids stay
    """
    vocab_size = logits_RV.shape[1]
    top_k_R = torch.where(top_k_R > 0, top_k_R.clamp(max=vocab_size), vocab_size)
    bounded = top_k_R[top_k_R < vocab_size]
    most = max(NUM_BEST, int(bounded.max())) if bounded.numel() else NUM_BEST
    best_RK = torch.topk(logits_RV, min(most, vocab_size), dim=1).values
    if bounded.numel():
        _cut_top_k(logits_RV, best_RK, top_k_R)
    rows = (top_p_R < 1).nonzero().squeeze(1)
    if rows.numel() == logits_RV.shape[0]:
        _cut_top_p(logits_RV, best_RK, top_p_R)
    elif rows.numel():
        chosen = logits_RV[rows]
        _cut_top_p(chosen, best_RK[rows], top_p_R[rows])
        logits_RV[rows] = chosen


def _cut_top_k(logits_RV: Tensor, best_RK: Tensor, top_k_R: Tensor) -> None:
    """Ban what is below each row's k-th best, in both arguments."""
    last = (top_k_R - 1).clamp(max=best_RK.shape[1] - 1).unsqueeze(1)
    floor = best_RK.gather(1, last)
    floor = floor.masked_fill((top_k_R == logits_RV.shape[1]).unsqueeze(1), NEG_INF)
    logits_RV.masked_fill_(logits_RV < floor, NEG_INF)
    best_RK.masked_fill_(best_RK < floor, NEG_INF)


def _cut_top_p(logits_RV: Tensor, best_RK: Tensor, top_p_R: Tensor) -> None:
    peak = best_RK[:, :1]
    # Float64 sums of float32 exponentials: the same row gives the same sum whatever stands beside it.
    wanted = top_p_R.double() * _row_sums((logits_RV - peak).exp_())
    num_kept, floor = _edge(best_RK, peak, wanted)
    short = num_kept > best_RK.shape[1]
    if bool(short.any()):
        whole = _descending(logits_RV[short])
        num_kept[short], floor[short] = _edge(whole, peak[short], wanted[short])
    _keep_best(logits_RV, num_kept, floor)


def _row_sums(values_RV: Tensor) -> Tensor:
    if values_RV.device.type == "cpu":
        return torch.from_numpy(values_RV.numpy().sum(axis=1, dtype=np.float64))
    return values_RV.sum(dim=1, dtype=torch.float64)


def _descending(values_RV: Tensor) -> Tensor:
    """Rows sorted, largest first. numpy sorts float32 with vector instructions, four times as fast as torch here."""
    if values_RV.device.type == "cpu":
        return torch.from_numpy(-np.sort(-values_RV.numpy(), axis=1))
    return values_RV.sort(dim=1, descending=True).values


def _edge(sorted_RK: Tensor, peak_R1: Tensor, wanted_R: Tensor) -> tuple[Tensor, Tensor]:
    """(how many of the sorted logits reach the wanted mass, the last of them); K + 1 where all K do not."""
    mass = torch.cumsum((sorted_RK - peak_R1).exp().double(), dim=1)
    num_below = (mass < wanted_R.unsqueeze(1)).sum(dim=1)
    last = num_below.clamp(max=sorted_RK.shape[1] - 1)
    return num_below + 1, sorted_RK.gather(1, last.unsqueeze(1)).squeeze(1)


def _keep_best(logits_RV: Tensor, num_kept_R: Tensor, floor_R: Tensor) -> None:
    """Ban all but each row's num_kept best; floor is the least of these."""
    floor = floor_R.unsqueeze(1)
    logits_RV.masked_fill_(logits_RV < floor, NEG_INF)
    surplus = (logits_RV > NEG_INF).sum(dim=1) - num_kept_R
    for row in (surplus > 0).nonzero().squeeze(1).tolist():
        equal = (logits_RV[row] == floor_R[row]).nonzero().squeeze(1)
        logits_RV[row, equal[equal.numel() - int(surplus[row]) :]] = NEG_INF
