"""From raw logits to what is sampled: every rule of a request that touches its distribution (R7: the only copy).

The order is frozen: logit_bias, repetition / presence / frequency penalties, then what is banned (min_tokens, allowed
ids, bad words), the grammar's mask, temperature, min_p, top_k, top_p. Rows without a feature pay nothing for it; a
batch of plain rows is one division, or nothing when all are greedy. Works in place on float32 logits.
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
from scheduler.types import Sampling
from server.worker.grammar import GrammarMask
from server.worker.recipe import CONSTRAINED, FILTERS, Feature, Recipe
from server.worker.sequences import Counts

_UNFILTERED = Sampling()


class JudgedRow(NamedTuple):
    """One row of logits and what its rules look at.

    history     the sequence's prompt and output tokens
    num_output  output position of the token this row decides
    counts      of `history` and `drafts`; there if the recipe has penalties
    mask        after `history` and `drafts`; there if the recipe has a grammar
    drafts      what stands between `history` and the token this row decides: none but on a verified row, and in a
                block, where it may be masks
    behind      what stands after that token: nothing but in a block
    """

    recipe: Recipe
    history: Sequence[int]
    num_output: int
    counts: Counts | None = None
    mask: GrammarMask | None = None
    drafts: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


def process_logits(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> dict[int, str]:
    """Apply each row's rules to its logits, in place. Returns {row: message} for rows that no token can answer.

    logits_JV  float32 [J, V], finite; banned tokens become -inf
    A row with a message is left with no meaning and must not be sampled.
    """
    errors = constrain(logits_JV, rows)
    temper(ops, logits_JV, rows)
    return errors


def constrain(logits_JV: Tensor, rows: Sequence[JudgedRow]) -> dict[int, str]:
    """The first half: bias, penalties, bans and grammar. For readers that measure the distribution in between."""
    used = _used(rows)
    errors: dict[int, str] = {}
    if used & Feature.BIAS:
        _add_bias(logits_JV, rows)
    if used & Feature.PENALTY:
        _penalise(logits_JV, rows)
    if used & (Feature.MIN_TOKENS | Feature.BAD_WORDS):
        _ban(logits_JV, rows)
    if used & Feature.ALLOWED:
        _keep_allowed(logits_JV, rows)
    if used & Feature.GRAMMAR:
        _mask_by_grammar(logits_JV, rows, errors)
    if used & CONSTRAINED:
        _find_empty(logits_JV, rows, errors)
    return errors


def temper(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    """The second half: temperature, min_p, top_k, top_p."""
    _divide_by_temperature(logits_JV, rows)
    if _used(rows) & FILTERS:
        ops.truncate(logits_JV, *_filters(rows, logits_JV.device))


def _used(rows: Sequence[JudgedRow]) -> int:
    used = 0
    for row in rows:
        used |= row.recipe.features
    return used


def _with(rows: Sequence[JudgedRow], feature: Feature) -> list[int]:
    bits = int(feature)
    return [index for index, row in enumerate(rows) if row.recipe.features & bits]


def _on_rows(logits_JV: Tensor, at: list[int], change: Callable[[Tensor, list[int]], None]) -> None:
    """Run `change` on some rows: on the whole if they are all of it, else on a copy that is put back."""
    if len(at) == logits_JV.shape[0]:
        change(logits_JV, at)
        return
    index = torch.tensor(at, device=logits_JV.device)
    part = logits_JV[index]
    change(part, at)
    logits_JV[index] = part


def _cells(device: torch.device, ids: list[NDArray[np.int64]], at: list[int]) -> tuple[Tensor, Tensor]:
    """Index pair (row, token id) of the cells `ids[i]` of rows `at[i]`."""
    row = np.repeat(np.asarray(at, dtype=np.int64), [part.size for part in ids])
    return torch.from_numpy(row).to(device), torch.from_numpy(np.concatenate(ids)).to(device)


def _add_bias(logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    at = _with(rows, Feature.BIAS)
    cells = _cells(logits_JV.device, [rows[i].recipe.bias_ids for i in at], at)
    values = torch.from_numpy(np.concatenate([rows[i].recipe.bias_values for i in at])).to(logits_JV.device)
    logits_JV.index_put_(cells, values, accumulate=True)


def _penalise(logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    """Repetition (prompt and output tokens) divides or multiplies; frequency and presence (output tokens) subtract."""
    at, found = [], []
    for index in _with(rows, Feature.PENALTY):
        counts = rows[index].counts
        assert counts is not None, "a sequence with penalties has counts"
        at.append(index)
        found.append(counts)
    sizes = [counts.ids.size for counts in found]
    cells = _cells(logits_JV.device, [counts.ids for counts in found], at)

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.float32), sizes)).to(logits_JV.device)

    samplings = [rows[i].recipe.sampling for i in at]
    repetition = spread([sampling.repetition_penalty for sampling in samplings])
    frequency = spread([sampling.frequency_penalty for sampling in samplings])
    presence = spread([sampling.presence_penalty for sampling in samplings])
    count = torch.from_numpy(np.concatenate([counts.counts for counts in found])).to(logits_JV.device)
    values = logits_JV[cells]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits_JV[cells] = values - frequency * count - presence * (count > 0)


def _ban(logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    """Ban EOS and stop ids while the output is too short, and the last token of every bad word about to be complete."""
    at: list[int] = []
    banned: list[NDArray[np.int64]] = []
    for index in _with(rows, Feature.MIN_TOKENS | Feature.BAD_WORDS):
        row = rows[index]
        # A complete grammar has nothing left but the end, however short the output.
        is_complete = row.mask is not None and row.mask.is_complete
        if row.num_output < row.recipe.min_tokens and not is_complete:
            at.append(index)
            banned.append(row.recipe.end_ids)
        words = _ends_of_bad_words(row)
        if words:
            at.append(index)
            banned.append(np.asarray(words, dtype=np.int64))
    if at:
        logits_JV[_cells(logits_JV.device, banned, at)] = NEG_INF


def _ends_of_bad_words(row: JudgedRow) -> list[int]:
    """Tokens that would complete a bad word; a word half in the prompt does not count."""
    if not row.recipe.bad_words:
        return []
    longest = min(max(len(start) for start, _ in row.recipe.bad_words), row.num_output)
    tail = [*row.history[max(0, len(row.history) - longest) :], *row.drafts]
    tail = tail[len(tail) - longest :]
    if row.behind:
        return _gaps_of_bad_words(row, tail)
    return [
        last for start, last in row.recipe.bad_words if len(start) <= longest and tail[longest - len(start) :] == start
    ]


def _gaps_of_bad_words(row: JudgedRow, tail: list[int]) -> list[int]:
    """The same where tokens stand on both sides: any token of a word may be the one that is missing."""
    found = []
    for start, last in row.recipe.bad_words:
        word = [*start, last]
        for place, token in enumerate(word):
            behind = word[place + 1 :]
            is_begun = place <= len(tail) and tail[len(tail) - place :] == word[:place]
            if is_begun and list(row.behind[: len(behind)]) == behind:
                found.append(token)
    return found


def _keep_allowed(logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    for index in _with(rows, Feature.ALLOWED):
        allowed = torch.from_numpy(rows[index].recipe.allowed_ids).to(logits_JV.device)
        kept = logits_JV[index, allowed]
        logits_JV[index].fill_(NEG_INF)
        logits_JV[index, allowed] = kept


def _mask_by_grammar(logits_JV: Tensor, rows: Sequence[JudgedRow], errors: dict[int, str]) -> None:
    at = _with(rows, Feature.GRAMMAR)
    masks = []
    for index in at:
        mask = rows[index].mask
        assert mask is not None, "a row of a sequence with a grammar has a mask"
        masks.append(mask)
        if mask.error is not None:
            errors[index] = mask.error
    bits = np.stack([mask.bits for mask in masks])
    is_banned = np.unpackbits(bits.view(np.uint8), axis=1, count=logits_JV.shape[1], bitorder="little") == 0
    banned = torch.from_numpy(is_banned).to(logits_JV.device)

    def apply(part: Tensor, _: list[int]) -> None:
        part.masked_fill_(banned, NEG_INF)

    _on_rows(logits_JV, at, apply)


def _find_empty(logits_JV: Tensor, rows: Sequence[JudgedRow], errors: dict[int, str]) -> None:
    """Rows whose constraints contradict each other: no token is left. Such a row is cleared so that nothing is NaN."""
    at = _with(rows, CONSTRAINED)
    index = torch.tensor(at, device=logits_JV.device)
    is_empty = torch.isneginf(logits_JV[index].amax(dim=1))
    for row in index[is_empty].tolist():
        features = [feature.name for feature in CONSTRAINED & Feature(rows[row].recipe.features) if feature.name]
        errors.setdefault(
            row, f"no token is allowed at output position {rows[row].num_output} by {', '.join(features)}"
        )
        logits_JV[row].zero_()


def _divide_by_temperature(logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    temperatures = [row.recipe.temperature for row in rows]
    if any(temperature != 1.0 for temperature in temperatures):
        divisor = torch.tensor(temperatures, dtype=torch.float32, device=logits_JV.device)
        logits_JV.div_(divisor.unsqueeze(1))


def _filters(rows: Sequence[JudgedRow], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(min_p, top_k, top_p) of each row as `Ops.truncate` takes them, off where its recipe does not ask."""
    asked = [row.recipe.sampling if row.recipe.features & FILTERS else _UNFILTERED for row in rows]
    return (
        torch.tensor([one.min_p for one in asked], dtype=torch.float32, device=device),
        torch.tensor([one.top_k for one in asked], dtype=torch.int64, device=device),
        torch.tensor([one.top_p for one in asked], dtype=torch.float64, device=device),
    )
