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

import torch
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import Drafts, Outcome, TokenLogprob, VerifyMode
from server.worker.drafters.base import RowTops
from server.worker.judged import Judged
from server.worker.logprobs import token_logprobs
from server.worker.process_logits import JudgedRow, process_logits
from server.worker.verification import Judgement, Verdict, verify_coupled, verify_sampled

NOT_FINITE = "the model's logits are not finite (NaN or infinite); no token can be chosen from them"
FAILED = -1
"""Stands for the token of a row that none can be drawn from; no draft equals it."""
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
    prompt_logprobs: Sequence[TokenLogprob],
    drafts: Drafts | None,
) -> Outcome:
    """What a step says of a span that was sampled, verified or only computed."""
    if error is not None:
        return Outcome(seq_id, error=error)
    if reading is None:
        return Outcome(seq_id, prompt_logprobs=tuple(prompt_logprobs))
    return Outcome(seq_id, reading.tokens, reading.logprobs, tuple(prompt_logprobs), drafts=drafts)


def read_tokens(
    ops: Ops, logits_JV: Tensor, judged: Sequence[Judged], num_top: int = 0, tops_of: Sequence[int] = ()
) -> list[Reading]:
    """Choose the tokens of some spans.

    logits_JV  float32 [J, V], raw: the rows of all spans one after the other; it is overwritten
    num_top    best tokens to report of each row on the paths of the spans `tops_of`, indices into `judged`
    """
    rows = [row for one in judged for row in one.rows]
    errors = dict.fromkeys(not_finite(logits_JV), NOT_FINITE)
    if errors:
        logits_JV[torch.tensor(list(errors), device=logits_JV.device)] = 0.0
    wanted = [index for index, row in enumerate(rows) if row.recipe.sampling.logprobs is not None]
    raw = _log_softmax(logits_JV, wanted) if wanted else None
    errors = process_logits(ops, logits_JV, rows) | errors
    samples = _sample(ops, logits_JV, rows).tolist()
    for index in errors:
        samples[index] = FAILED
    firsts = [0]
    for one in judged:
        firsts.append(firsts[-1] + len(one.rows))
    rejecting = [index for index, one in enumerate(judged) if one.drafts and one.mode is not VerifyMode.COUPLED]
    verdicts = _verify_sampled(ops, logits_JV, judged, rejecting, firsts, errors) if rejecting else {}
    readings = [
        _read(one, samples, first, errors, verdicts.get(index))
        for index, (one, first) in enumerate(zip(judged, firsts, strict=False))
    ]
    if raw is not None:
        _add_logprobs(readings, judged, firsts, raw, wanted)
    if num_top:
        _add_tops(readings, judged, tops_of, firsts, logits_JV, num_top)
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
    return values_JV[torch.tensor(at, device=values_JV.device)]


def _sample(ops: Ops, logits_JV: Tensor, rows: Sequence[JudgedRow]) -> Tensor:
    device = logits_JV.device
    keys = torch.tensor(
        [
            [row.recipe.seed for row in rows],
            [row.recipe.sampling.sample_index for row in rows],
            [row.num_output for row in rows],
        ],
        dtype=torch.int64,
        device=device,
    )
    greedy = torch.tensor([row.recipe.is_greedy for row in rows], dtype=torch.bool, device=device)
    return ops.sample(logits_JV, keys[0], keys[1], keys[2], greedy)


def _add_logprobs(
    readings: list[Reading], judged: Sequence[Judged], firsts: Sequence[int], raw_RV: Tensor, wanted: list[int]
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
