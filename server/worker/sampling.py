"""The reader of judged rows: one token for a sampled row, the accepted drafts and one more for a verified span.

The noise of a token is a function of (seed, sample index, output position, token id) and of nothing else (R5,
`Ops.sample`), so the same request gives the same text in any batch, after a preemption and after a restart, with
drafts and without. All rows of a step are sampled in one call, whoever brought them.
No token is ever drawn from a row that is not finite: such a row answers with an error and its neighbours do not notice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import Drafts, Outcome, TokenLogprob, VerifyMode
from server.worker.drafters.base import RowTops
from server.worker.judged import Judged
from server.worker.logprobs import Weighed, token_logprobs, weigh
from server.worker.process_logits import JudgedRow, clear_rows, start_processing, why_empty
from server.worker.transfer import Download, upload
from server.worker.verification import Judgement, Verdict, verify_coupled, verify_sampled

NOT_FINITE = "the model's logits are not finite (NaN or infinite); no token can be chosen from them"
FAILED = -1
"""Stands for the token of a row that none can be drawn from; no draft equals it."""
_EMPTY = -3
"""The same where its constraints leave none: what no draft is either (`judged.NO_TOKEN`)."""
_PLAIN_PATH = (0,)


class Reading(NamedTuple):
    """What a span's judged rows gave: tokens and, for each, the judged row it comes from; or an error.

    logprobs  one per token where the request asked
    tops      best tokens of the rows of the path where they were asked for
    """

    tokens: tuple[int, ...] = ()
    path: tuple[int, ...] = ()
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    tops: RowTops | None = None


def outcome_of(
    seq_id: int,
    reading: Reading | None,
    error: str | None,
    prompt_logprobs: Sequence[TokenLogprob] = (),
    drafts: Drafts | None = None,
) -> Outcome:
    """What a step says of a span that was sampled, verified or only computed."""
    if error is not None:
        return Outcome(seq_id, error=error)
    if reading is None:
        return Outcome(seq_id, prompt_logprobs=tuple(prompt_logprobs))
    return Outcome(seq_id, reading.tokens, reading.logprobs, tuple(prompt_logprobs), drafts=drafts)


class Chosen(NamedTuple):
    """The tokens of some spans' judged rows, chosen on the device; the host has not seen them.

    rows       the judged rows of all spans, one after the other; firsts: where each span's begin, and their number
    ids_J      int64 [J], on the device: a token, or `FAILED`, or `_EMPTY`
    ids        the same on its way to the host
    errors     {row: message} where the host knows already
    logits_JV  processed, for who reads more of them than a token; raw_RV: log-probabilities of the rows `wanted`
    """

    judged: Sequence[Judged]
    rows: list[JudgedRow]
    firsts: list[int]
    ids_J: Tensor
    ids: Download
    errors: dict[int, str]
    logits_JV: Tensor | None = None
    raw_RV: Tensor | None = None
    wanted: Sequence[int] = ()
    weighed: Weighed | None = None

    @property
    def num_top(self) -> list[int]:
        """Alternatives that the rows `wanted` report."""
        return [self.rows[row].recipe.sampling.logprobs or 0 for row in self.wanted]

    def light(self) -> Chosen:
        """Without what takes memory: spans of one row each, which are only to be read."""
        weighed = None
        if self.raw_RV is not None:
            # A row without a token reports nothing in the end.
            tokens_R = _take(self.ids_J, self.wanted).clamp(min=0)
            weighed = weigh(self.raw_RV, tokens_R, max(self.num_top))
        return self._replace(logits_JV=None, raw_RV=None, weighed=weighed)


def read_tokens(
    ops: Ops, logits_JV: Tensor, judged: Sequence[Judged], num_top: int = 0, tops_of: Sequence[int] = ()
) -> list[Reading]:
    """Choose the tokens of some spans and read them; as the two halves below."""
    return read_chosen(ops, choose_tokens(ops, logits_JV, judged), num_top, tops_of)


def choose_tokens(ops: Ops, logits_JV: Tensor, judged: Sequence[Judged]) -> Chosen:
    """The device's half: nothing here waits for it.

    logits_JV  float32 [J, V], raw: the rows of all spans one after the other; it is overwritten
    """
    rows = [row for one in judged for row in one.rows]
    firsts = [0]
    for one in judged:
        firsts.append(firsts[-1] + len(one.rows))
    is_bad_J = ~torch.isfinite(logits_JV.amax(dim=1))
    clear_rows(logits_JV, is_bad_J)
    wanted = [index for index, row in enumerate(rows) if row.recipe.sampling.logprobs is not None]
    raw = _log_softmax(logits_JV, wanted) if wanted else None
    processed = start_processing(ops, logits_JV, rows)
    ids_J = _sample(ops, logits_JV, rows)
    if processed.is_empty is not None:
        (at,) = upload([np.asarray(processed.at, dtype=np.int64)], logits_JV.device)
        ids_J.index_copy_(0, at, ids_J[at].masked_fill_(processed.is_empty, _EMPTY))
    ids_J.masked_fill_(is_bad_J, FAILED)
    return Chosen(judged, rows, firsts, ids_J, Download(ids_J), processed.errors, logits_JV, raw, wanted)


def read_chosen(ops: Ops, chosen: Chosen, num_top: int = 0, tops_of: Sequence[int] = ()) -> list[Reading]:
    """The host's half. Waits for the tokens, and for nothing that was begun after them.

    num_top    best tokens to report of each row on the paths of the spans `tops_of`, indices into `chosen.judged`
    """
    judged, firsts = chosen.judged, chosen.firsts
    samples: list[int] = chosen.ids.wait().tolist()
    errors = {row: why_empty(chosen.rows, row) for row, token in enumerate(samples) if token == _EMPTY}
    errors |= chosen.errors
    errors |= {row: NOT_FINITE for row, token in enumerate(samples) if token == FAILED}
    for index in errors:
        samples[index] = FAILED
    rejecting = [index for index, one in enumerate(judged) if one.drafts and one.mode is not VerifyMode.COUPLED]
    verdicts: dict[int, Verdict] = {}
    if rejecting and chosen.logits_JV is not None:
        verdicts = _verify_sampled(ops, chosen.logits_JV, judged, rejecting, firsts, errors)
    readings = [
        _read(one, samples, first, errors, verdicts.get(index))
        for index, (one, first) in enumerate(zip(judged, firsts, strict=False))
    ]
    if chosen.weighed is not None:
        for index, entry in zip(chosen.wanted, chosen.weighed.told(chosen.num_top), strict=True):
            if readings[index].error is None:
                readings[index] = readings[index]._replace(logprobs=(entry,))
    if chosen.raw_RV is not None:
        _add_logprobs(readings, judged, firsts, chosen.raw_RV, chosen.wanted)
    if num_top and chosen.logits_JV is not None:
        _add_tops(readings, judged, tops_of, firsts, chosen.logits_JV, num_top)
    return readings


def _read(judged: Judged, samples: list[int], first: int, errors: dict[int, str], verdict: Verdict | None) -> Reading:
    """The tokens of one span, whose rows begin at `first`. verdict: where that is not the coupled one.

    A row that fails ends the path before it, as if its draft had not been there: the next step begins with that row and
    reports what is wrong, as a step without drafts would have done. Only the first row fails its sequence.
    """
    if samples[first] == FAILED:
        return Reading(error=errors[first])
    if not judged.drafts:
        return Reading((samples[first],), _PLAIN_PATH)
    tokens, path = verdict or verify_coupled(samples[first : first + len(judged.rows)], judged.drafts, judged.parents)
    if tokens[-1] == FAILED:
        tokens, path = tokens[:-1], path[:-1]
    return Reading(tokens, path)


def _verify_sampled(
    ops: Ops,
    logits_JV: Tensor,
    judged: Sequence[Judged],
    rejecting: list[int],
    firsts: list[int],
    errors: dict[int, str],
) -> dict[int, Verdict]:
    """{index of a span: its verdict} of the spans `rejecting`, which ask for a rejection mode."""
    rows = [row for index in rejecting for row in range(firsts[index], firsts[index + 1])]
    failed = [place for place, row in enumerate(rows) if row in errors]
    judgements = [
        Judgement(one.drafts, one.mode, one.rows[0].recipe, one.rows[0].num_output, one.parents, one.draft_q)
        for one in (judged[index] for index in rejecting)
    ]
    return dict(zip(rejecting, verify_sampled(ops, _take(logits_JV, rows), judgements, failed), strict=True))


def not_finite(logits_JV: Tensor) -> list[int]:
    """Rows with a NaN or a plus infinity, or with nothing above minus infinity: one reduction over the logits."""
    return [row for row, peak in enumerate(logits_JV.amax(dim=1).tolist()) if not math.isfinite(peak)]


def _log_softmax(logits_JV: Tensor, at: list[int]) -> Tensor:
    """Of some rows, in new memory: the logits are about to be changed."""
    return torch.log_softmax(_take(logits_JV, at), dim=1)


def _take(values_JV: Tensor, at: Sequence[int]) -> Tensor:
    """Some rows, ascending; the whole if they are all of it."""
    if len(at) == values_JV.shape[0]:
        return values_JV
    (index,) = upload([np.asarray(at, dtype=np.int64)], values_JV.device)
    return values_JV[index]


def _sample(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> Tensor:
    keys = np.asarray(
        [
            [row.recipe.seed for row in rows],
            [row.recipe.sampling.sample_index for row in rows],
            [row.num_output for row in rows],
            [row.recipe.is_greedy for row in rows],
        ],
        dtype=np.int64,
    )
    seeds, sample_index, positions, greedy = upload(list(keys), logits_JV.device)
    return ops.sample(logits_JV, seeds, sample_index, positions, greedy != 0)


def _add_logprobs(
    readings: list[Reading], judged: Sequence[Judged], firsts: Sequence[int], raw_RV: Tensor, wanted: Sequence[int]
) -> None:
    """raw_RV: log-probabilities of the rows `wanted`. Rows beside the path are left out: nobody sees their tokens."""
    places = {row: place for place, row in enumerate(wanted)}
    at = [index for index, first in enumerate(firsts[:-1]) if first in places and readings[index].error is None]
    if not at:
        return
    rows = [places[firsts[index] + row] for index in at for row in readings[index].path]
    tokens = torch.tensor([token for index in at for token in readings[index].tokens], device=raw_RV.device)
    num_top = [judged[index].rows[0].recipe.sampling.logprobs or 0 for index in at for _ in readings[index].path]
    found = iter(token_logprobs(_take(raw_RV, rows), tokens, num_top))
    for index in at:
        logprobs = tuple(next(found) for _ in readings[index].path)
        readings[index] = readings[index]._replace(logprobs=logprobs)


def _add_tops(
    readings: list[Reading],
    judged: Sequence[Judged],
    tops_of: Sequence[int],
    firsts: Sequence[int],
    logits_JV: Tensor,
    num_top: int,
) -> None:
    """logits_JV: processed."""
    at = [index for index in tops_of if readings[index].error is None]
    if not at:
        return
    rows = [firsts[index] + row for index in at for row in readings[index].path]
    best = torch.log_softmax(_take(logits_JV, rows), dim=1).topk(min(num_top, logits_JV.shape[1]), dim=1)
    ids, logprobs = best.indices.to(torch.int32).cpu().numpy(), best.values.cpu().numpy()
    start = 0
    for index in at:
        path = readings[index].path
        end = start + len(path)
        ends = tuple(len(row.history) + len(row.drafts) for row in (judged[index].rows[place] for place in path))
        tops = RowTops(ends, ids[start:end], logprobs[start:end])
        readings[index] = readings[index]._replace(tops=tops)
        start = end
