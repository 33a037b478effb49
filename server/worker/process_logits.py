"""From raw logits to what is sampled: every rule of a request that touches its distribution (R7: the only copy).

The order is frozen: logit_bias, repetition / presence / frequency penalties, then what is banned (min_tokens, allowed
ids, bad words), the grammar's mask, temperature, min_p, top_k, top_p. Rows without a feature pay nothing for it; a
batch of plain rows is one division, or nothing when all are greedy. Works in place on float32 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.edits import Cells, Edits, Masks, Penalties
from kernels.ops import Ops
from kernels.truncation import Filters
from scheduler.types import Sampling
from server.worker.grammar import GrammarMask
from server.worker.recipe import CONSTRAINED, FILTERS, Feature, Recipe
from server.worker.sequences import Counts
from server.worker.transfer import upload

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
    return start_processing(ops, logits_JV, rows).told(rows)


class Processed(NamedTuple):
    """What went wrong with some rows: what the host knows already, and what the device has to tell.

    errors    {row: message}
    at        the rows that are constrained
    is_empty  bool [len(at)], on the device: no token is left; None = nobody is constrained
    """

    errors: dict[int, str]
    at: Sequence[int] = ()
    is_empty: Tensor | None = None

    def told(self, rows: Sequence[JudgedRow]) -> dict[int, str]:
        """{row: message} for rows that no token can answer. Waits for the device."""
        if self.is_empty is None:
            return self.errors
        empty = (row for row, is_empty in zip(self.at, self.is_empty.tolist(), strict=True) if is_empty)
        return {row: why_empty(rows, row) for row in empty} | self.errors


def start_processing(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> Processed:
    """`process_logits` without a look at what came out: on a device of its own, nothing waits for it."""
    processed = _edit(ops, logits_JV, rows, _temperatures(rows))
    _filter(ops, logits_JV, rows)
    return processed


def why_empty(rows: Sequence[JudgedRow], row: int) -> str:
    features = [feature.name for feature in CONSTRAINED & Feature(rows[row].recipe.features) if feature.name]
    return f"no token is allowed at output position {rows[row].num_output} by {', '.join(features)}"


def can_look(tensor: Tensor) -> bool:
    """Whether asking for its values waits for nobody. Elsewhere a pass over everything costs less than the wait."""
    return tensor.device.type == "cpu"


def clear_rows(logits_JV: Tensor, is_bad_J: Tensor) -> None:
    """Write zeros over some rows, so that nothing that follows is NaN."""
    if not can_look(logits_JV) or bool(is_bad_J.any()):
        logits_JV.masked_fill_(is_bad_J.unsqueeze(1), 0.0)


def constrain(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> dict[int, str]:
    """The first half: bias, penalties, bans and grammar. For readers that measure the distribution in between."""
    return _edit(ops, logits_JV, rows, None).told(rows)


def temper(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    """The second half: temperature, min_p, top_k, top_p."""
    ops.edit_logits(logits_JV, Edits(temperatures=_temperatures(rows)))
    _filter(ops, logits_JV, rows)


def _edit(
    ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow], temperatures: NDArray[np.float32] | None
) -> Processed:
    used = _used(rows)
    errors: dict[int, str] = {}
    edits = Edits(
        bias=_bias(rows) if used & Feature.BIAS else None,
        penalties=_penalties(rows) if used & Feature.PENALTY else None,
        banned=_banned(rows) if used & (Feature.MIN_TOKENS | Feature.BAD_WORDS) else None,
        masks=_masks(rows, logits_JV.shape[1], errors) if used & (Feature.ALLOWED | Feature.GRAMMAR) else None,
        temperatures=temperatures,
    )
    ops.edit_logits(logits_JV, edits)
    if not used & CONSTRAINED:
        return Processed(errors)
    at = _with(rows, CONSTRAINED)
    return Processed(errors, at, _clear_empty(logits_JV, at))


def _filter(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> None:
    if _used(rows) & FILTERS:
        ops.truncate(logits_JV, _filters(rows))


def _used(rows: Sequence[JudgedRow]) -> int:
    used = 0
    for row in rows:
        used |= row.recipe.features
    return used


def _with(rows: Sequence[JudgedRow], feature: Feature) -> list[int]:
    bits = int(feature)
    return [index for index, row in enumerate(rows) if row.recipe.features & bits]


def _cells(at: list[int], ids: list[NDArray[np.int64]], values: list[NDArray[np.float32]] | None = None) -> Cells:
    """Tokens `ids[i]` of rows `at[i]`."""
    rows = np.repeat(np.asarray(at, dtype=np.int64), [part.size for part in ids])
    return Cells(rows, np.concatenate(ids), None if values is None else np.concatenate(values))


def _bias(rows: Sequence[JudgedRow]) -> Cells:
    at = _with(rows, Feature.BIAS)
    return _cells(at, [rows[i].recipe.bias_ids for i in at], [rows[i].recipe.bias_values for i in at])


def _penalties(rows: Sequence[JudgedRow]) -> Penalties:
    """Repetition is of prompt and output tokens, frequency and presence of output tokens."""
    at, found = [], []
    for index in _with(rows, Feature.PENALTY):
        counts = rows[index].counts
        assert counts is not None, "a sequence with penalties has counts"
        at.append(index)
        found.append(counts)
    samplings = [row.recipe.sampling for row in rows]
    return Penalties(
        _cells(at, [counts.ids for counts in found], [counts.counts for counts in found]),
        np.asarray([sampling.repetition_penalty for sampling in samplings], dtype=np.float32),
        np.asarray([sampling.frequency_penalty for sampling in samplings], dtype=np.float32),
        np.asarray([sampling.presence_penalty for sampling in samplings], dtype=np.float32),
    )


def _banned(rows: Sequence[JudgedRow]) -> Cells | None:
    """EOS and stop ids while the output is too short, and the last token of every bad word about to be complete."""
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
    return _cells(at, banned) if at else None


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


def _masks(rows: Sequence[JudgedRow], vocab_size: int, errors: dict[int, str]) -> Masks:
    """Of rows with allowed ids, with a grammar, or with both, which then must agree."""
    at = _with(rows, Feature.ALLOWED | Feature.GRAMMAR)
    bits = np.empty((len(at), (vocab_size + 31) // 32), dtype=np.int32)
    for place, index in enumerate(at):
        row = rows[index]
        bits[place] = -1
        if row.recipe.features & Feature.ALLOWED:
            bits[place] = _bits(row.recipe.allowed_ids, vocab_size)
        if row.recipe.features & Feature.GRAMMAR:
            mask = row.mask
            assert mask is not None, "a row of a sequence with a grammar has a mask"
            bits[place] &= mask.bits
            if mask.error is not None:
                errors[index] = mask.error
    return Masks(np.asarray(at, dtype=np.int64), bits)


def _bits(ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.int32]:
    is_set = np.zeros((vocab_size + 31) // 32 * 32, dtype=bool)
    is_set[ids] = True
    return np.packbits(is_set, bitorder="little").view(np.int32)


def _clear_empty(logits_JV: Tensor, at: Sequence[int]) -> Tensor:
    """Which of the rows `at` have constraints that contradict each other: no token is left. They are cleared."""
    (index,) = upload([np.asarray(at, dtype=np.int64)], logits_JV.device)
    part_RV = logits_JV[index]
    is_empty = torch.isneginf(part_RV.amax(dim=1))
    if not can_look(logits_JV) or bool(is_empty.any()):
        logits_JV[index] = part_RV.masked_fill_(is_empty.unsqueeze(1), 0.0)
    return is_empty


def _temperatures(rows: Sequence[JudgedRow]) -> NDArray[np.float32] | None:
    temperatures = [row.recipe.temperature for row in rows]
    if all(temperature == 1.0 for temperature in temperatures):
        return None
    return np.asarray(temperatures, dtype=np.float32)


def _filters(rows: Sequence[JudgedRow]) -> Filters:
    """Of each row, off where its recipe does not ask."""
    asked = [row.recipe.sampling if row.recipe.features & FILTERS else _UNFILTERED for row in rows]
    return Filters(
        np.asarray([one.min_p for one in asked], dtype=np.float32),
        np.asarray([one.top_k for one in asked], dtype=np.int64),
        np.asarray([one.top_p for one in asked], dtype=np.float64),
    )
