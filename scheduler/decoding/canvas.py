"""The canvas of a bidirectional model as integers: its length, how many tokens a step fixes, spans of some of its rows.

Pure functions. Sources: LLaDA (blocks, quotas), Dream (its schedule); diffusion reference, sections 2.2 and 3.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from scheduler.decoding.windows import quota
from scheduler.types import MASK_ALL, Denoise, Diffusion, DiffusionModel, Fault, Limits, Read, Request, Span

DREAM_SELECTORS = frozenset({"origin", "maskgit_plus", "topk_margin", "entropy"})
DREAM_EPS = 1e-3
"""Dream's noise level falls in a straight line from 1 to this."""
BLOCKLESS_PLANNERS = frozenset({"dsb", "masks"})
"""Their window slides over the whole canvas."""
ADABLOCK_SHARE = 4
"""AdaBlock looks for a delimiter in the first of so many parts of the canvas from the block's start on."""


def block_size_of(asked: Diffusion, model: DiffusionModel) -> int:
    return model.block_size if asked.block_size is None else asked.block_size


def canvas_length(request: Request, asked: Diffusion, model: DiffusionModel, max_model_len: int) -> int:
    """Tokens of the canvas behind the prompt; they shape the text, because the model sees them all.

    gen_length, or max_tokens rounded up to whole blocks; cut to the context, where the last block is shorter.
    """
    size = block_size_of(asked, model)
    wanted = -(-request.max_tokens // size) * size if asked.gen_length is None else asked.gen_length
    return min(wanted, max_model_len - len(request.prompt))


def refuse_canvas(request: Request, asked: Diffusion, model: DiffusionModel, limits: Limits) -> Fault | None:
    """A 400 for a canvas that can never be computed. The request has passed `admission.refuse_impossible`."""
    num_prompt, size = len(request.prompt), block_size_of(asked, model)
    if request.max_tokens < 1:
        return Fault(400, f"max_tokens is {request.max_tokens}; a model that fills a canvas needs 1", "max_tokens")
    if request.sampling.prompt_logprobs is not None:
        return Fault(400, "a bidirectional model gives no log-probabilities of the prompt", "prompt_logprobs")
    if asked.gen_length is not None and (asked.gen_length < 1 or asked.gen_length % size):
        return Fault(
            400, f"gen_length is {asked.gen_length}; it must be a multiple of block_size ({size})", "gen_length"
        )
    if asked.gen_length is not None and num_prompt + asked.gen_length > limits.max_model_len:
        most = limits.max_model_len - num_prompt
        return Fault(
            400,
            f"gen_length is {asked.gen_length}, but behind this prompt the context has room for {most}",
            "gen_length",
        )
    total = num_prompt + canvas_length(request, asked, model, limits.max_model_len)
    if total > limits.max_batched_tokens:
        return Fault(
            400,
            f"prompt and canvas have {total} tokens, and this model computes them all in one step, which holds "
            f"{limits.max_batched_tokens}. Reduce max_tokens or the prompt, or serve with a larger max_batched_tokens.",
            "max_tokens" if num_prompt < limits.max_batched_tokens else "prompt",
        )
    pages = -(-total // limits.page_size)
    if pages > limits.num_pages:
        room = limits.num_pages * limits.page_size
        return Fault(
            400, f"prompt and canvas need KV for {total} tokens, but the whole KV cache holds {room}", "max_tokens"
        )
    return None


def canvas_quota(asked: Diffusion, total: int, left: int, step: int) -> int:
    """Fewest tokens that a selector with a quota fixes in a step, 1 to `left`.

    total  masks that the block had at its start; left = those it has now
    LLaDA's even shares, unless the selector is one of Dream's: then the share of the masks by which the noise level
    falls, rounded down, and all that is left in the last step. Departure: never less than 1.
    """
    steps = total if asked.steps is None else asked.steps
    if asked.selector.name not in DREAM_SELECTORS or asked.steps is None:
        return min(quota(total, steps, step), left)
    if step >= steps - 1:
        return left
    now, then = (1.0 + (DREAM_EPS - 1.0) * at / steps for at in (step, step + 1))
    return min(max(1, int(left * (1.0 - then / now))), left)


def drawn_order(seed: int, sample_index: int, num_prompt: int, size: int) -> dict[int, bytes]:
    """A key for each position of a canvas: sorted by key they are in random order (R5), drawn before the first step."""

    def key(position: int) -> bytes:
        word = struct.pack("<qqq", seed % (1 << 63), sample_index, position - num_prompt)
        return hashlib.blake2b(word, digest_size=8).digest()

    return {position: key(position) for position in range(num_prompt, size)}


def make_span(
    seq_id: int, canvas: Sequence[int], rows: set[int] | None, judged_rows: Sequence[int], denoise: Denoise
) -> Span:
    """A span of some rows of a canvas and those that are judged; None = of all, and then `Denoise.state` is empty."""
    end = len(canvas)
    if rows is None:
        judged = tuple(judged_rows)
        return Span(seq_id, tuple(canvas), 0, end, MASK_ALL, judged, Read.DENOISE, denoise=denoise._replace(state=()))
    positions = sorted(rows.union(judged_rows))
    place = {position: offset for offset, position in enumerate(positions)}
    first = positions[0]
    is_run = positions[-1] - first + 1 == len(positions)
    return Span(
        seq_id,
        tuple(canvas[position] for position in positions),
        first,
        end,
        MASK_ALL,
        tuple(place[row] for row in judged_rows),
        Read.DENOISE,
        denoise=denoise,
        positions=() if is_run else tuple(positions),
    )


def position_of(span: Span, offset: int) -> int:
    """Sequence position of a span's row."""
    return span.positions[offset] if span.positions else span.start + offset
