"""From the tensors of a checkpoint to a back end's packed weights, one source tensor in memory at a time.

Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels.ops import Ops, PackedLinear


class Weights(Protocol):
    """Where the tensors come from: a checkpoint or a random generator, on the model's device and in its dtype."""

    def take(self, name: str) -> Tensor:
        """The tensor of this name of `weight_shapes`; each is taken once, and the caller owns it."""
        ...


class Packer:
    """Takes tensors from `weights`, joins projections of one input, packs them and counts the bytes kept."""

    def __init__(self, weights: Weights, ops: Ops) -> None:
        self._weights = weights
        self._ops = ops
        self.num_bytes = 0

    def tensor(self, name: str) -> Tensor:
        tensor = self._weights.take(name)
        self.num_bytes += tensor.nbytes
        return tensor

    def linear(self, layer: str, names: Sequence[str], bias: bool = False) -> PackedLinear:
        """One packed weight of the projections `names` of `layer`, concatenated along their outputs."""
        weight_NK = self._joined([f"{layer}.{name}.weight" for name in names])
        bias_N = self._joined([f"{layer}.{name}.bias" for name in names]) if bias else None
        return self.pack(weight_NK, bias_N)

    def experts(self, layers: Sequence[str], names: Sequence[str]) -> Sequence[PackedLinear]:
        """One packed weight for each of `layers`, which are one MLP's experts."""
        packed = self._ops.pack_experts(
            len(layers), lambda expert: self._joined([f"{layers[expert]}.{name}.weight" for name in names])
        )
        self.num_bytes += sum(expert.num_bytes for expert in packed)
        return packed

    def pack(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> PackedLinear:
        packed = self._ops.pack_linear(weight_NK, bias_N)
        self.num_bytes += packed.num_bytes
        return packed

    def _joined(self, names: Sequence[str]) -> Tensor:
        """Concatenated along dimension 0, one source tensor in memory at a time beside the result."""
        first = self._weights.take(names[0])
        if len(names) == 1:
            return first
        parts = [first, *(self._weights.take(name) for name in names[1:])]
        joined = first.new_empty((sum(part.shape[0] for part in parts), *first.shape[1:]))
        row = 0
        while parts:
            part = parts.pop(0)
            joined[row : row + part.shape[0]] = part
            row += part.shape[0]
        return joined
