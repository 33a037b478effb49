"""Which channels of a head carry its scores: Double Sparsity's offline statistics and their file.

Source: Yang et al., "Post-Training Sparse Attention with Double Sparsity" (2024). Departures: sums over *all* windows
(the published script keeps those of the last one), one list per kv head (its group's sums added) in place of one per
query head.
Legend: T tokens, Q query heads, K kv heads, D head_dim, L layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

STATISTICS = ("qk", "k", "q")


class ChannelStatistics:
    """Sums of |q_d k_d|, |k_d| or |q_d| after RoPE, of every token with itself, per layer and kv head."""

    def __init__(self, statistic: str, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        if statistic not in STATISTICS:
            raise ValueError(f"statistic is {statistic!r}, must be one of {', '.join(STATISTICS)}")
        self.statistic = statistic
        self.num_tokens = 0
        self._sums_LKD = torch.zeros(num_layers, num_kv_heads, head_dim, dtype=torch.float64)

    def add(self, layer: int, q_TQD: Tensor, k_TKD: Tensor) -> None:
        """Take in one layer of one window. Windows add up."""
        num_tokens, num_kv, head_dim = k_TKD.shape
        q_TKGD, k_TK1D = q_TQD.view(num_tokens, num_kv, -1, head_dim).double(), k_TKD.double().unsqueeze(2)
        if self.statistic == "qk":
            products = q_TKGD * k_TK1D
        else:
            products = k_TK1D if self.statistic == "k" else q_TKGD
        self._sums_LKD[layer] += products.abs().sum(dim=(0, 2))
        self.num_tokens += num_tokens if layer == 0 else 0

    def means(self) -> Tensor:
        """float64 [L, K, D], group sums a token. Raises ValueError if nothing was added."""
        if self.num_tokens == 0:
            raise ValueError("no tokens were read, so no channel is better than another")
        return self._sums_LKD / self.num_tokens

    def channels(self) -> Tensor:
        """int16 [L, K, D]: channels by falling mean, of equals the lowest first."""
        return self.means().sort(dim=2, descending=True, stable=True).indices.to(torch.int16)

    def save(self, path: Path, model_hash: str) -> None:
        """Write `channels` and, as metadata, what they were made of."""
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"model_hash": model_hash, "statistic": self.statistic, "tokens": str(self.num_tokens)}
        save_file({"channels": self.channels()}, path, metadata=told)
        path.chmod(0o644)
