"""The two losses of the dual-mode model, and the step that adds them.

A token row answers for the next token (causal mask), a mask row for its own position (block-diffusion mask), so that
one head serves both modes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from server.embedded.batches import IGNORED, Batch
from server.embedded.model import TinyModel, causal_mask, noisy_clean_mask

Trunk = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`TinyModel.forward`, compiled or not: (ids, positions, mask) -> hidden."""


def _cross_entropy(model: TinyModel, hidden: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """Mean over the kept rows; the head runs on those alone. hidden [B, L, H], targets and keep [B, L]."""
    logits = model.logits(hidden[keep])
    return F.cross_entropy(logits.float(), targets[keep])


def causal_loss(model: TinyModel, trunk: Trunk, batch: Batch) -> Tensor:
    """Next-token loss over all rows, in nats a token."""
    hidden = trunk(batch.ids, batch.positions, causal_mask(batch.docs, batch.positions))
    return _cross_entropy(model, hidden, batch.next_ids, batch.next_ids != IGNORED)


def diffusion_loss(model: TinyModel, trunk: Trunk, batch: Batch) -> Tensor:
    """Loss of the masked tokens of the task rows, in nats a token: the plain mean, as in Fast-dLLM v2."""
    rows = batch.num_task_rows
    clean, docs, positions = batch.ids[:rows], batch.docs[:rows], batch.positions[:rows]
    hidden = trunk(
        torch.cat((batch.noisy_ids, clean), dim=1),
        torch.cat((positions, positions), dim=1),
        noisy_clean_mask(docs, positions),
    )
    return _cross_entropy(model, hidden[:, : clean.shape[1]], clean, batch.noisy_ids != clean)
