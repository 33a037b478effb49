"""Draws of a drafter from logits that are already processed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Ops
from server.worker.process_logits import JudgedRow
from server.worker.verification import draft_stream

COUPLED_STREAM = 0


def draw(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> Tensor:
    """One token per row, int64 [J]: the best of a greedy row, else a sample with the target's own noise.

    Both then draw the same token wherever their distributions agree.
    """
    return _sample(ops, logits_JV, rows, [row.num_output for row in rows], COUPLED_STREAM)


def draw_apart(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow], depths: Sequence[int]) -> Tensor:
    """`draw` with noise that no other draw of the sequence shares, for drafts that are verified by rejection.

    depths  of each row: how many drafts lie before the one it draws
    """
    tokens_J = torch.empty(len(rows), dtype=torch.int64, device=logits_JV.device)
    for depth in sorted(set(depths)):
        at = [index for index, other in enumerate(depths) if other == depth]
        chosen, index = [rows[i] for i in at], torch.tensor(at, device=logits_JV.device)
        starts = [row.num_output - depth for row in chosen]
        tokens_J[index] = _sample(ops, logits_JV[index], chosen, starts, draft_stream(depth))
    return tokens_J


def _sample(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow], positions: Sequence[int], stream: int) -> Tensor:
    def tensor(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_JV.device)

    return ops.sample(
        logits_JV,
        tensor([row.recipe.seed for row in rows]),
        tensor([row.recipe.sampling.sample_index for row in rows]),
        tensor(positions),
        tensor([row.recipe.is_greedy for row in rows], torch.bool),
        stream,
    )
