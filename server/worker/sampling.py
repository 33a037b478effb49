"""The reader of SAMPLE spans: one token per sequence from its last row, log-probabilities where asked.

The noise of a token is a function of (seed, sample index, output position, token id) and of nothing else (R5,
`Ops.sample`), so the same request gives the same text in any batch, after a preemption and after a restart.
No token is ever drawn from a row that is not finite: such a row answers with an error and its neighbours do not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import TokenLogprob
from server.worker.logprobs import token_logprobs
from server.worker.process_logits import JudgedRow, process_logits

NOT_FINITE = "the model's logits are not finite (NaN or infinite); no token can be chosen from them"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one judged row gave: a token and perhaps its log-probability, or an error."""

    token: int = -1
    logprob: TokenLogprob | None = None
    error: str | None = None


def sample_rows(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> list[Reading]:
    """Choose a token for each row. logits_JV: float32 [J, V], raw; it is overwritten."""
    bad = not_finite(logits_JV)
    if not bad:
        return _sample_finite(ops, logits_JV, rows)
    good = [index for index in range(len(rows)) if index not in bad]
    readings = [Reading(error=NOT_FINITE)] * len(rows)
    if good:
        kept = logits_JV[torch.tensor(good, device=logits_JV.device)]
        for index, reading in zip(good, _sample_finite(ops, kept, [rows[i] for i in good]), strict=True):
            readings[index] = reading
    return readings


def not_finite(logits_JV: Tensor) -> set[int]:
    """Rows with a NaN or a plus infinity, or with nothing above minus infinity: one reduction over the logits."""
    is_bad = ~torch.isfinite(logits_JV.amax(dim=1))
    return set(is_bad.nonzero().squeeze(1).tolist()) if bool(is_bad.any()) else set()


def _sample_finite(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> list[Reading]:
    wanted = [index for index, row in enumerate(rows) if row.recipe.sampling.logprobs is not None]
    raw = _log_softmax(logits_JV, wanted) if wanted else None
    errors = process_logits(logits_JV, rows)
    tokens_J = _sample(ops, logits_JV, rows)
    logprobs: dict[int, TokenLogprob] = {}
    if raw is not None:
        num_top = [rows[index].recipe.sampling.logprobs or 0 for index in wanted]
        chosen = tokens_J if len(wanted) == len(rows) else tokens_J[torch.tensor(wanted, device=tokens_J.device)]
        logprobs = dict(zip(wanted, token_logprobs(raw, chosen, num_top), strict=True))
    return [
        Reading(error=errors[index]) if index in errors else Reading(token, logprobs.get(index))
        for index, token in enumerate(tokens_J.tolist())
    ]


def _log_softmax(logits_JV: Tensor, at: list[int]) -> Tensor:
    """Of some rows, in new memory: the logits are about to be changed."""
    if len(at) == logits_JV.shape[0]:
        return torch.log_softmax(logits_JV, dim=1)
    return torch.log_softmax(logits_JV[torch.tensor(at, device=logits_JV.device)], dim=1)


def _sample(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> Tensor:
    device = logits_JV.device
    seeds = torch.tensor([row.recipe.seed for row in rows], dtype=torch.int64, device=device)
    indices = torch.tensor([row.recipe.sampling.sample_index for row in rows], dtype=torch.int64, device=device)
    positions = torch.tensor([row.num_output for row in rows], dtype=torch.int64, device=device)
    greedy = torch.tensor([row.recipe.is_greedy for row in rows], dtype=torch.bool, device=device)
    return ops.sample(logits_JV, seeds, indices, positions, greedy)
