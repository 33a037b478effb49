"""Checks of experts, edits and filters against their plain-torch twins, for gpu_checks.py: no test library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.edits import Cells, Edits, Masks, Penalties, edit_logits
from kernels.routing import Router, choose_experts
from kernels.triton.moe import ExpertStack
from kernels.triton.ops import TritonOps
from kernels.truncation import Filters, truncate

FILTERS = [(0.0, 0, 1.0), (0.05, 0, 1.0), (0.0, 40, 1.0), (0.0, 0, 0.9), (0.01, 50, 0.7), (0.0, 0, 0.9999)]


def experts_error(
    actual_TH: Tensor, x_TH: Tensor, logits_TE: Tensor, router: Router, gate_up: ExpertStack, down: ExpertStack
) -> float:
    """Worst error of `Ops.moe` against float64, as a share of what rounding explains of the magnitudes summed."""
    unit = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[x_TH.dtype]
    weights_Tk, experts_Tk = choose_experts(logits_TE, router)
    expected, mass = torch.zeros_like(x_TH, dtype=torch.float64), torch.zeros_like(x_TH, dtype=torch.float64)
    for expert in range(len(down)):
        rows, choice = (experts_Tk == expert).nonzero(as_tuple=True)
        gate, up = (x_TH[rows].double() @ gate_up.weight_ENK[expert].double().T).chunk(2, 1)
        weights, inner = weights_Tk[rows, choice, None].double(), gate * gate.sigmoid() * up
        matrix_IH = down.weight_ENK[expert].double().T
        expected.index_add_(0, rows, weights * (inner @ matrix_IH))
        mass.index_add_(0, rows, weights * ((inner.abs() + up.abs()) @ matrix_IH.abs()))
    error = (actual_TH.double() - expected).abs() / (unit * (mass + expected.abs()))
    return float(error.nan_to_num(math.inf).max()) if len(x_TH) else 0.0


def edits_error(ops: TritonOps, logits_JV: Tensor) -> float:
    """0 if all kinds of edits together give the twin's bits."""
    (num_rows, vocab), generator = logits_JV.shape, np.random.default_rng(0)
    rows = np.repeat(np.arange(0, num_rows, 2), 300)
    each = [np.concatenate([generator.permutation(vocab)[:300] for _ in range(0, num_rows, 2)]) for _ in range(3)]
    values = generator.integers(0, 9, len(rows)).astype(np.float32)
    rules = generator.uniform(0.3, 2.0, (4, num_rows)).astype(np.float32)
    bits = generator.integers(-(1 << 31), 1 << 31, (3, -(-vocab // 32))).astype(np.int32)
    edits = Edits(
        Cells(rows, each[0], values / np.float32(7)), Penalties(Cells(rows, each[1], values), *rules[:3]),
        Cells(rows, each[2]), Masks(np.asarray([0, 1, num_rows - 1]), bits), rules[3],
    )  # fmt: skip
    expected = logits_JV.clone()
    ops.edit_logits(logits_JV, edits)
    edit_logits(expected, edits)
    return 0.0 if torch.equal(logits_JV, expected) else math.inf


def filters_of(rules: Sequence[tuple[float, int, float]]) -> Filters:
    """Of a row each (min_p, top_k, top_p)."""
    min_p, top_k, top_p = (np.asarray(column) for column in zip(*rules, strict=True))
    return Filters(min_p.astype(np.float32), top_k.astype(np.int64), top_p.astype(np.float64))


def filter_errors(ops: TritonOps, logits_JV: Tensor) -> Iterator[tuple[str, float]]:
    """Of each of FILTERS: the share of a row's mass that only one of the two keeps, in units of 2^-20.

    Sums in another order may end a token further.
    """
    rules = filters_of(FILTERS)
    logits_JV[:, ::7] = logits_JV[:, ::7].round()  # ties
    actual, expected = logits_JV.clone(), logits_JV.clone()
    ops.truncate(actual, rules)
    truncate(expected, rules)
    weights = logits_JV.double().softmax(1)
    apart = ((actual != expected) * weights).sum(1) / (expected.isfinite() * weights).sum(1)
    for rule, share, row, wanted in zip(FILTERS, apart.tolist(), actual, expected, strict=True):
        is_exact = rule[2] == 1.0
        yield (
            f"truncate min_p {rule[0]} top_k {rule[1]} top_p {rule[2]}",
            ((0.0 if torch.equal(row, wanted) else math.inf) if is_exact else share / 2.0**-20),
        )
