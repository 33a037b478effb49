"""What the time of a step depends on. Part of the vocabulary: `scheduler.types` hands it on."""

from __future__ import annotations

from typing import NamedTuple


class StepFeatures(NamedTuple):
    """What the time of a step depends on.

    tokens           query rows of the step: prefill, decode and draft
    prefill_tokens   of these, prompt rows (recomputed output included)
    decode_seqs      sequences that decode
    context_tokens   keys read by decodes: the sum of their kv_len (the rows of one sequence read its keys once)
    prefill_context  keys read by prefill rows: the sum of (KV index + 1) over those rows
    judged           rows whose logits are read, besides one for each decoding sequence: drafts, ends of prompts, rows
                     of prompt logprobs
    draft_context    the sum of kv_len over draft rows: arithmetic, as the keys are in the cache by then
    """

    tokens: int
    prefill_tokens: int = 0
    decode_seqs: int = 0
    context_tokens: int = 0
    prefill_context: int = 0
    judged: int = 0
    draft_context: int = 0


class StepSample(NamedTuple):
    """One measured step, in wall seconds; `Worker.profile` makes some at start to seed the step-time model."""

    features: StepFeatures
    seconds: float
