"""Bias, penalties, bans, masks and temperature in place: what is sparse at its cells, the rest in one pass.

All that a step's rules ask goes to the device as one buffer in one copy; masks are one bit a token. Bit for bit the
twin of `kernels/edits.py`: the same operations in the same order, divisions rounded to nearest, nothing contracted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.edits import Cells, Edits
from kernels.triton.upload import upload

_BLOCK = 1024
_CELLS = 512
_SPLITS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _edit_cells(
    logits,  # float32 [J, V]
    starts,  # int32 [3, J + 1]: first cell of each row with bias, penalties, bans; the last is the end
    ids,  # int32 [cells]
    values,  # float32 [cells]: bias, count
    rules,  # float32 [3, J]: repetition, frequency, presence
    num_rows,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row is one program, so that a token's changes follow each other behind barriers."""
    row = tl.program_id(0)
    x_at = logits + row.to(tl.int64) * V
    for start in tl.range(tl.load(starts + row), tl.load(starts + row + 1), BLOCK):
        cell = start + tl.arange(0, BLOCK)
        exists = cell < tl.load(starts + row + 1)
        v = tl.load(ids + cell, mask=exists, other=0)
        x = tl.load(x_at + v, mask=exists, other=0.0)
        tl.store(x_at + v, x + tl.load(values + cell, mask=exists, other=0.0), mask=exists)
    tl.debug_barrier()
    repetition = tl.load(rules + row)
    frequency = tl.load(rules + num_rows + row)
    presence = tl.load(rules + 2 * num_rows + row)
    starts += num_rows + 1
    for start in tl.range(tl.load(starts + row), tl.load(starts + row + 1), BLOCK):
        cell = start + tl.arange(0, BLOCK)
        exists = cell < tl.load(starts + row + 1)
        v = tl.load(ids + cell, mask=exists, other=0)
        count = tl.load(values + cell, mask=exists, other=0.0)
        x = tl.load(x_at + v, mask=exists, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
        x = x - frequency * count - presence * (count > 0).to(tl.float32)
        tl.store(x_at + v, x, mask=exists)
    tl.debug_barrier()
    starts += num_rows + 1
    for start in tl.range(tl.load(starts + row), tl.load(starts + row + 1), BLOCK):
        cell = start + tl.arange(0, BLOCK)
        exists = cell < tl.load(starts + row + 1)
        tl.store(x_at + tl.load(ids + cell, mask=exists, other=0), float("-inf"), mask=exists)


@triton.jit
def _mask_and_divide(
    logits,
    masks,  # int32 [J]: the row's mask, -1 = none
    bits,  # int32 [masks, ceil(V / 32)]
    temperatures,  # float32 [J]
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    mask = tl.load(masks + row).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if (mask >= 0) | (temperature != 1.0):
        part = tl.cdiv(V, SPLITS)
        end = tl.minimum(split * part + part, V)
        for start in tl.range(split * part, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + v, mask=v < end, other=0.0)
            if mask >= 0:
                word = tl.load(bits + mask * tl.cdiv(V, 32) + v // 32, mask=v < end, other=0)
                x = tl.where(((word >> (v % 32)) & 1) != 0, x, float("-inf"))
            tl.store(logits + row * V + v, tl.div_rn(x, tl.zeros_like(x) + temperature), mask=v < end)


def edit_logits(logits_JV: Tensor, edits: Edits) -> None:
    """`Ops.edit_logits`. Raises TypeError if the logits are not contiguous float32."""
    num_rows, vocab = logits_JV.shape
    if logits_JV.dtype != torch.float32 or not logits_JV.is_contiguous():
        raise TypeError(f"logits are {logits_JV.dtype}, strides {logits_JV.stride()}; they are changed in place, so "
                        "they must be contiguous float32")  # fmt: skip
    if num_rows == 0:
        return
    lists = [edits.bias, None if edits.penalties is None else edits.penalties.cells, edits.banned]
    if any(cells is not None for cells in lists):
        arrays = *_rows_of_cells(lists, num_rows), _penalty_rules(edits, num_rows)
        starts, ids, values, rules = upload(arrays, logits_JV.device)
        _edit_cells[(num_rows,)](
            logits_JV, starts, ids, values, rules, num_rows,
            V=vocab, BLOCK=_CELLS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    if edits.masks is not None or edits.temperatures is not None:
        of_row = np.full(num_rows, -1, dtype=np.int32)
        bits = np.zeros(1, dtype=np.int32)
        if edits.masks is not None:
            of_row[edits.masks.rows] = np.arange(len(edits.masks.rows), dtype=np.int32)
            bits = edits.masks.bits
        divisors = edits.temperatures if edits.temperatures is not None else np.ones(num_rows, dtype=np.float32)
        masks, words, temperatures = upload([of_row, bits, divisors], logits_JV.device)
        _mask_and_divide[(num_rows, _SPLITS)](
            logits_JV, masks, words, temperatures, V=vocab, BLOCK=_BLOCK, SPLITS=_SPLITS,
            num_warps=4,
        )  # fmt: skip


def _rows_of_cells(
    lists: Sequence[Cells | None], num_rows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """`starts`, `ids` and `values` of `_edit_cells`: the lists one after the other."""
    starts, ids, values, first = [], [], [], 0
    for cells in lists:
        if cells is None:
            starts.append(np.full(num_rows + 1, first, dtype=np.int32))
            continue
        starts.append((first + np.searchsorted(cells.rows, np.arange(num_rows + 1))).astype(np.int32))
        ids.append(cells.ids.astype(np.int32))
        values.append(np.zeros(len(cells.ids), dtype=np.float32) if cells.values is None else cells.values)
        first += len(cells.ids)
    return np.stack(starts), np.concatenate(ids), np.concatenate(values)


def _penalty_rules(edits: Edits, num_rows: int) -> NDArray[np.float32]:
    if edits.penalties is None:
        return np.zeros((3, num_rows), dtype=np.float32)
    return np.stack(edits.penalties[1:])
