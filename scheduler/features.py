"""What the time of a step depends on. Part of the vocabulary: `scheduler.types` hands it on."""

from __future__ import annotations

from typing import NamedTuple


class StepFeatures(NamedTuple):
    """What the time of a step depends on.

    tokens           query rows of the step, prefill and decode
    prefill_tokens   of these, prompt rows (recomputed output included)
    decode_seqs      sequences that decode
    context_tokens   keys read by decodes: the sum of their kv_len
    prefill_context  keys read by prefill rows: the sum of (KV index + 1) over those rows
    """

    tokens: int
    prefill_tokens: int = 0
    decode_seqs: int = 0
    context_tokens: int = 0
    prefill_context: int = 0


class StepSample(NamedTuple):
    """One measured step, in wall seconds; `Worker.profile` makes some at start to seed the step-time model."""

    features: StepFeatures
    seconds: float
