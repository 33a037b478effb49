"""Which rows of a step are of block-sparse prompts, as the back end reads it (`kernels/prefill_rows.py`).

A matter of position and of the request alone: rows of the prompt from `PromptAttention.dense` on. Chunks are cut
between regions (`scheduler/chunks.py`), so that a part is a whole region, or the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.prefill_rows import PrefillPart
from kernels.sparse_prefill import PermutedBlocks, XAttention
from scheduler.types import PromptAttention, PromptMethod, Span
from server.worker.sequences import SequenceState


def kernel_method(asked: PromptAttention) -> XAttention | PermutedBlocks:
    if asked.method is PromptMethod.XATTENTION:
        return XAttention(tile=asked.method.tile, threshold=asked.threshold)
    return PermutedBlocks(tile=asked.method.tile, threshold=asked.threshold)


def prefill_parts(
    spans: Sequence[Span], states: Sequence[SequenceState], first_rows: Sequence[int]
) -> list[PrefillPart]:
    """The parts of a step. first_rows: of each span, and the number of rows.

    Raises ValueError for a span that was cut within a region.
    """
    parts = list[PrefillPart]()
    for at, (span, state) in enumerate(zip(spans, states, strict=True)):
        asked = state.request.prompt_attention
        # Spans under another mask are drafts of a model that denoises: their keys are scratch.
        if asked is None or span.mask_block != 1:
            continue
        start, end, region = max(span.start, asked.dense), min(span.kv_len, state.num_prompt), asked.method.region
        if start >= end:
            continue
        if start % region or (end % region and end < state.num_prompt):
            raise ValueError(f"the span of sequence {span.seq_id} ends or begins within a region of {region} rows")
        # Tiles choose each by itself, so that a chunk of them is one call.
        step = region if asked.method is PromptMethod.PBS else end - start
        method, offset = kernel_method(asked), first_rows[at] - span.start
        parts += [
            PrefillPart(offset + first, min(step, end - first), first, at, method) for first in range(start, end, step)
        ]
    return parts
