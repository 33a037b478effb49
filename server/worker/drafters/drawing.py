"""Draws of a drafter from logits that are already processed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Ops
from server.worker.process_logits import JudgedRow

COUPLED_STREAM = 0
"""The target's own noise: both draw the same token wherever their distributions agree."""
DRAFT_STREAM = 3
"""Noise of drafts that must not follow the target's; 1 and 2 are the rejection rules' own."""


def draw(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow], stream: int) -> Tensor:
    """One token per row, int64 [J]: the best of a greedy row, else a sample with the noise of its position."""

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_JV.device)

    return ops.sample(
        logits_JV,
        tensor([row.recipe.seed for row in rows]),
        tensor([row.recipe.sampling.sample_index for row in rows]),
        tensor([row.num_output for row in rows]),
        tensor([row.recipe.is_greedy for row in rows], torch.bool),
        stream,
    )
