"""Learn2PD's filter: from the confidences of a whole block to which of its masks are right already.

Two linear layers with a ReLU between them, a file beside the checkpoint that was trained for one model and one block
size. Source: Bao et al., "Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel
Decoding" (2025).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

FILTER_FILE = "learn2pd.safetensors"
Floats = NDArray[np.float32]


class Filter:
    """sigmoid(w2 relu(w1 x + b1) + b2) of one block's confidences."""

    def __init__(self, w1: Floats, b1: Floats, w2: Floats, b2: Floats) -> None:
        """w1 [N, B], b1 [N], w2 [B, N], b2 [B]; B is the block size."""
        self.block_size = int(w1.shape[1])
        self._w1, self._b1, self._w2, self._b2 = w1, b1, w2, b2

    def __call__(self, confidences_B: Floats) -> Floats:
        """In (0, 1) for each position of the block, fixed ones too."""
        hidden_N = np.maximum(self._w1 @ confidences_B + self._b1, 0)
        logits_B: Floats = self._w2 @ hidden_N + self._b2
        # The logistic function, without an exponential that could overflow.
        passed_B: Floats = 0.5 + 0.5 * np.tanh(0.5 * logits_B)
        return passed_B


def load_filter(folder: Path) -> Filter | None:
    """The filter in a checkpoint's folder, None if there is none. Raises ValueError if it is not one."""
    path = folder / FILTER_FILE
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    w1 = tensors.get("w1", np.zeros((0, 0)))
    wanted = {"w1": w1.shape, "b1": w1.shape[:1], "w2": w1.shape[::-1], "b2": w1.shape[1:]}
    if shapes != wanted or w1.ndim != 2 or w1.size == 0:
        raise ValueError(f"{path} holds {shapes}; a filter is w1 [N, B], b1 [N], w2 [B, N], b2 [B]")
    arrays = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"{path} holds numbers that are not finite; train it anew")
    return Filter(**arrays)
