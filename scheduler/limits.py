"""What the scheduler may use. Part of the vocabulary: `scheduler.types` hands it on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may use. Lengths in tokens.

    max_batched_tokens    cap of the token budget of a step (R1)
    max_seqs              sequences running at once; never above max_batched_tokens
    max_model_len         prompt + output of one sequence
    num_pages, page_size  the KV pool
    watermark_pages       pages that admission leaves free
    max_prefill_share     most of a step's prefill budget one prompt takes while others wait, in (0, 1]
    max_queued_requests, max_queued_tokens   beyond these `add` refuses
    tbt_slo_s             seconds between two tokens, kept by 99 in 100 steps; None = auto: `tbt_auto_factor` x a step
                          of all who are here, if they decoded already
    """

    max_batched_tokens: int
    max_seqs: int
    max_model_len: int
    num_pages: int
    page_size: int
    watermark_pages: int = 1
    max_prefill_share: float = 0.5
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    tbt_slo_s: float | None = None
    tbt_auto_factor: float = 2.1
    enable_prefix_caching: bool = True
