"""The reader of prompt rows: the log-probability of the prompt token that follows each judged row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scheduler.types import Read, Span, TokenLogprob
from server.worker.logprobs import token_logprobs
from server.worker.sampling import not_finite
from server.worker.sequences import SequenceState


def read_prompts(
    logits_of: Callable[[list[int]], Tensor],
    spans: Sequence[Span],
    states: Sequence[SequenceState],
    first_rows: Sequence[int],
    rows_at_once: int,
) -> tuple[dict[int, list[TokenLogprob]], set[int]]:
    """{index of a span: log-probabilities of the prompt tokens after its judged rows}, and the spans that have a row
    whose logits are not finite.

    logits_of   raw logits [J, V] of some rows of the step
    first_rows  row of the step of each span's first token
    """
    found: list[tuple[int, int, int]] = []
    for index, (span, state) in enumerate(zip(spans, states, strict=True)):
        if state.request.sampling.prompt_logprobs is None or span.read in (Read.NOTHING, Read.DENOISE):
            continue
        targets = ((offset, span.start + offset + 1) for offset in span.judged)
        found += [(index, first_rows[index] + row, state.history[at]) for row, at in targets if at < state.num_prompt]
    logprobs: dict[int, list[TokenLogprob]] = {}
    broken: set[int] = set()
    for start in range(0, len(found), rows_at_once):
        part = found[start : start + rows_at_once]
        logits_JV = logits_of([row for _, row, _ in part])
        broken.update(part[place][0] for place in not_finite(logits_JV))
        tokens = torch.tensor([token for _, _, token in part], device=logits_JV.device)
        num_top = [states[index].request.sampling.prompt_logprobs or 0 for index, _, _ in part]
        read = token_logprobs(torch.log_softmax(logits_JV, dim=1), tokens, num_top)
        for (index, _, _), logprob in zip(part, read, strict=True):
            logprobs.setdefault(index, []).append(logprob)
    return logprobs, broken
