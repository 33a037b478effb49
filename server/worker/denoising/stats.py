"""What a selector knows of a judged row: the token drawn from it, how sure it is, and how its rivals stand.

Logits are made, processed and measured for a bounded number of rows at a time; afterwards there are a few numbers per
row. Every number is a function of its own row alone (`Ops.row_statistics`). Source of the statistics: diffusion
reference, 2.1 and 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import Ops
from kernels.truncation import NEG_INF
from scheduler.types import TokenLogprob
from server.worker.logprobs import token_logprobs
from server.worker.process_logits import JudgedRow, constrain, temper
from server.worker.sampling import NOT_FINITE, not_finite


class Asked(NamedTuple):
    """A row and what is asked of it.

    row       of the step
    step      denoise step of its block: part of the noise's key
    filtered  confidence is that of the tempered and truncated distribution
    given     a token whose probability is asked; -1 = of none
    best      the likeliest token is asked, not one that is drawn (edits)
    """

    row: int
    judged: JudgedRow
    step: int
    filtered: bool = False
    given: int = -1
    best: bool = False


class RowStats(NamedTuple):
    """A number per row, float32 where it is not said: probabilities after bias, penalties and bans, at temperature 1
    unless `filtered`.

    tokens      int64, drawn with the request's own noise; the likeliest at temperature 0 and where `best` is asked
    confidence  probability of `tokens`
    best        int64, the likeliest token
    top         its probability
    margin      the same less that of the second
    gap         logit of the likeliest less that of the second
    entropy     in nats
    given       probability of the given token; without meaning where none was asked
    """

    tokens: NDArray[np.int64]
    confidence: NDArray[np.float32]
    best: NDArray[np.int64]
    top: NDArray[np.float32]
    margin: NDArray[np.float32]
    gap: NDArray[np.float32]
    entropy: NDArray[np.float32]
    given: NDArray[np.float32]

    def part(self, rows: slice) -> RowStats:
        """Of some rows that follow each other."""
        return RowStats._make(column[rows] for column in self)


class Measured(NamedTuple):
    """The statistics of some rows and, by row, what only some have.

    logprobs  of `RowStats.tokens`, raw, where the request asked
    errors    messages: no token can be drawn from the row
    """

    stats: RowStats
    logprobs: dict[int, TokenLogprob]
    errors: dict[int, str]


def read_stats(
    ops: Ops,
    logits_of: Callable[[list[int]], Tensor],
    asked: Sequence[Asked],
    mask_id: int,
    rows_at_once: int,
) -> Measured:
    """The statistics of some rows, at least one, in their order.

    logits_of  float32 [J, V] of some rows of the step, raw, in memory of its own
    """
    parts: list[RowStats] = []
    logprobs: dict[int, TokenLogprob] = {}
    errors: dict[int, str] = {}
    for start in range(0, len(asked), rows_at_once):
        part = asked[start : start + rows_at_once]
        found = _measure(ops, logits_of([one.row for one in part]), part, mask_id)
        parts.append(found.stats)
        logprobs.update((start + row, logprob) for row, logprob in found.logprobs.items())
        errors.update((start + row, error) for row, error in found.errors.items())
    stats = (
        parts[0] if len(parts) == 1 else RowStats._make(np.concatenate(columns) for columns in zip(*parts, strict=True))
    )
    return Measured(stats, logprobs, errors)


def _measure(ops: Ops, logits_JV: Tensor, asked: Sequence[Asked], mask_id: int) -> Measured:
    device, rows = logits_JV.device, [one.judged for one in asked]
    # A mask is no answer: a sampler that can choose it may choose it for ever (2.1).
    logits_JV[:, mask_id] = NEG_INF
    errors = dict.fromkeys(not_finite(logits_JV), NOT_FINITE)
    if errors:
        logits_JV[torch.tensor(list(errors), device=device)] = 0.0
        logits_JV[:, mask_id] = NEG_INF
    wanted = [index for index, row in enumerate(rows) if row.recipe.sampling.logprobs is not None]
    raw_RV = torch.log_softmax(logits_JV[torch.tensor(wanted, device=device)], dim=1) if wanted else None
    errors = constrain(ops, logits_JV, rows) | errors
    measured_JV = _temper(ops, logits_JV, rows, asked)
    asked_of_J = torch.tensor([max(one.given, 0) for one in asked], device=device)
    found = ops.row_statistics(measured_JV, asked_of_J)
    tokens_J = found.best_id
    if any(not one.best and not one.judged.recipe.is_greedy for one in asked):
        is_best_J = torch.tensor([one.best for one in asked], device=device)
        tokens_J = torch.where(is_best_J, tokens_J, _draw(ops, logits_JV, asked))
    drawn_J = measured_JV.gather(1, tokens_J.unsqueeze(1)).squeeze(1)
    logits_4J = torch.stack((drawn_J, found.best, found.second, found.logit))
    confidence_J, top_J, second_J, given_J = (logits_4J.double() - found.lse.double()).exp()
    gap_J = found.best.double() - found.second.double()
    numbers = torch.stack((confidence_J, top_J, top_J - second_J, gap_J, found.entropy.double(), given_J))
    confidence, top, margin, gap, entropy, given = numbers.float().cpu().numpy()
    logprobs = {}
    if raw_RV is not None:
        num_top = [rows[index].recipe.sampling.logprobs or 0 for index in wanted]
        entries = token_logprobs(raw_RV, tokens_J[torch.tensor(wanted, device=device)], num_top)
        logprobs = dict(zip(wanted, entries, strict=True))
    ids = torch.stack((tokens_J, found.best_id)).cpu().numpy()
    stats = RowStats(ids[0], confidence, ids[1], top, margin, gap, entropy, given)
    return Measured(stats, logprobs, errors)


def _temper(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow], asked: Sequence[Asked]) -> Tensor:
    """Temper in place; returns the distribution that each row's confidence is of, a copy only where the two differ."""
    raw = [i for i, one in enumerate(asked) if not one.filtered and not one.judged.recipe.is_greedy]
    if not raw:
        temper(ops, logits_JV, rows)
        return logits_JV
    if len(raw) == len(asked):
        measured_JV = logits_JV.clone()
        temper(ops, logits_JV, rows)
        return measured_JV
    index = torch.tensor(raw, device=logits_JV.device)
    kept = logits_JV[index]
    temper(ops, logits_JV, rows)
    return logits_JV.index_copy(0, index, kept)


def _draw(ops: Ops, logits_JV: Tensor, asked: Sequence[Asked]) -> Tensor:
    """Tokens as a function of (seed, sample, output position, step) alone (R5)."""
    keys = torch.tensor(
        [
            [one.judged.recipe.seed for one in asked],
            [noise_word(one.judged.recipe.sampling.sample_index, one.step) for one in asked],
            [one.judged.num_output for one in asked],
        ],
        dtype=torch.int64,
        device=logits_JV.device,
    )
    greedy = torch.tensor([one.judged.recipe.is_greedy for one in asked], device=logits_JV.device)
    return ops.sample(logits_JV, keys[0], keys[1], keys[2], greedy)


def noise_word(sample_index: int, step: int) -> int:
    """The counter word of a denoise step: of its own for each step, and none of autoregressive decoding's."""
    return sample_index + (step + 1 << 16)
