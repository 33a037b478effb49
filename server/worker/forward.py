"""What the worker asks of whoever runs a step's forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels.ops import AttentionRows


class ForwardModel(Protocol):
    """What the worker asks of a model."""

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states [T, H] of every row, final norm applied; K and V of the rows are in `kv` afterwards."""
        ...

    def logits(self, hidden_JH: Tensor) -> Tensor:
        """Float32 [J, V], in memory of its own: the caller writes over it."""
        ...
