"""What requests' rules change in their logits before anything is cut off: the data, and the definition in plain torch.

Which rules there are and what they ask is the worker's business (`server/worker/process_logits.py`); here they are
cells, masks and a divisor. Each row is changed by itself alone. Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.truncation import NEG_INF


class Cells(NamedTuple):
    """Tokens of rows. rows int64 [C], ascending; ids int64 [C]; values float32 [C], or None if none is needed."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float32] | None = None


class Penalties(NamedTuple):
    """cells: distinct tokens of a row and how often each stands in the output, 0 = in the prompt alone.

    repetition, frequency, presence  float32 [J], read where a row has cells
    """

    cells: Cells
    repetition: NDArray[np.float32]
    frequency: NDArray[np.float32]
    presence: NDArray[np.float32]


class Masks(NamedTuple):
    """Token v of rows[r] stays if bit v % 32 of bits[r, v // 32] is set.

    rows int64 [R], ascending and distinct; bits int32 [R, ceil(V / 32)]
    """

    rows: NDArray[np.int64]
    bits: NDArray[np.int32]


@dataclass(frozen=True)
class Edits:
    """Changes in the order in which they are made; host memory, None where no row asks.

    bias          added; distinct tokens of a row
    penalties     repetition divides a positive logit and multiplies another, then frequency x count and, for counts
                  above 0, presence are subtracted
    banned        become -inf
    masks         the others become -inf
    temperatures  float32 [J], positive: divided by
    """

    bias: Cells | None = None
    penalties: Penalties | None = None
    banned: Cells | None = None
    masks: Masks | None = None
    temperatures: NDArray[np.float32] | None = None


def edit_logits(logits_JV: Tensor, edits: Edits) -> None:
    """`Ops.edit_logits`, operation by operation."""
    device = logits_JV.device
    if edits.bias is not None:
        logits_JV.index_put_(_at(edits.bias, device), _values(edits.bias, device), accumulate=True)
    if edits.penalties is not None:
        _penalise(logits_JV, edits.penalties)
    if edits.banned is not None:
        logits_JV[_at(edits.banned, device)] = NEG_INF
    if edits.masks is not None:
        _mask(logits_JV, edits.masks)
    if edits.temperatures is not None:
        logits_JV.div_(torch.from_numpy(edits.temperatures).to(device).unsqueeze(1))


def _at(cells: Cells, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(cells.rows).to(device), torch.from_numpy(cells.ids).to(device)


def _values(cells: Cells, device: torch.device) -> Tensor:
    assert cells.values is not None
    return torch.from_numpy(cells.values).to(device)


def _penalise(logits_JV: Tensor, penalties: Penalties) -> None:
    device, cells = logits_JV.device, penalties.cells
    at, count = _at(cells, device), _values(cells, device)
    repetition, frequency, presence = (torch.from_numpy(rule[cells.rows]).to(device) for rule in penalties[1:])
    values = logits_JV[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits_JV[at] = values - frequency * count - presence * (count > 0)


def _mask(logits_JV: Tensor, masks: Masks) -> None:
    is_banned = np.unpackbits(masks.bits.view(np.uint8), axis=1, count=logits_JV.shape[1], bitorder="little") == 0
    banned = torch.from_numpy(is_banned).to(logits_JV.device)
    if len(masks.rows) == logits_JV.shape[0]:
        logits_JV.masked_fill_(banned, NEG_INF)
        return
    index = torch.from_numpy(masks.rows).to(logits_JV.device)
    logits_JV[index] = logits_JV[index].masked_fill_(banned, NEG_INF)
