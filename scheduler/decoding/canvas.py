"""The canvas of a bidirectional model as integers: its length, how many tokens a step fixes, spans of some of its rows.

Pure functions. Sources: LLaDA (blocks, quotas), Dream (its schedule); diffusion reference, sections 2.2 and 3.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from scheduler.decoding.auto_threshold import AutoThreshold
from scheduler.decoding.caches import CacheState
from scheduler.decoding.windows import quota
from scheduler.types import (
    MASK_ALL,
    Denoise,
    Diffusion,
    DiffusionModel,
    Fault,
    Limits,
    Read,
    Request,
    Span,
    TokenLogprob,
)

DREAM_SELECTORS = frozenset({"origin", "maskgit_plus", "topk_margin", "entropy"})
DREAM_EPS = 1e-3
"""Dream's noise level falls in a straight line from 1 to this."""
BLOCKLESS_PLANNERS = frozenset({"dsb", "masks"})
"""Their window slides over the whole canvas."""
ADABLOCK_SHARE = 4
"""AdaBlock looks for a delimiter in the first of so many parts of the canvas from the block's start on."""


@dataclass(slots=True)
class Canvas:
    """Where a request's denoising stands.

    tokens      prompt and canvas, masks as the mask id; start = tokens of the prompt
    lo, hi      the block in sequence positions; all of the canvas for planners without blocks
    num_masks   masks that the block had at its start
    step        denoise steps of the block; steps_done of the whole request; num_edits of the block since it was full
    is_cut      the text ends before its length (EoTP)
    fresh       what the last step changed
    logprobs    of fixed tokens, until they are out
    """

    mask_id: int
    tokens: list[int]
    start: int
    auto: AutoThreshold | None
    lo: int = 0
    hi: int = 0
    num_masks: int = 0
    step: int = 0
    steps_done: int = 0
    num_edits: int = 0
    is_cut: bool = False
    fresh: tuple[int, ...] = ()
    cache: CacheState = field(default_factory=CacheState)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    def copy(self) -> Canvas:
        return replace(
            self,
            tokens=list(self.tokens),
            auto=None if self.auto is None else self.auto.copy(),
            cache=replace(self.cache),
            logprobs=dict(self.logprobs),
        )

    @property
    def end(self) -> int:
        return len(self.tokens)

    def masks(self, lo: int, hi: int) -> list[int]:
        """Positions of the masks in [lo, hi)."""
        mask_id, tokens = self.mask_id, self.tokens
        return [position for position in range(lo, hi) if tokens[position] == mask_id]

    @property
    def block_masks(self) -> list[int]:
        return self.masks(self.lo, self.hi)

    def open_block(self, lo: int, size: int) -> None:
        """Begin with the block of `size` tokens from `lo` on, or what is left of the canvas."""
        self.lo, self.hi = lo, min(lo + size, self.end)
        self.num_masks = len(self.block_masks)
        self.step = self.num_edits = 0
        if self.auto is not None:
            self.auto.forget_guesses()

    def cut(self, end: int) -> None:
        """The text ends before `end`."""
        if end < self.end:
            del self.tokens[end:]
            self.hi, self.is_cut = min(self.hi, end), True


def block_size_of(asked: Diffusion, model: DiffusionModel) -> int:
    return model.block_size if asked.block_size is None else asked.block_size


def canvas_length(request: Request, asked: Diffusion, model: DiffusionModel, max_model_len: int) -> int:
    """Tokens of the canvas behind the prompt; they shape the text, because the model sees them all.

    gen_length, or max_tokens rounded up to whole blocks; cut to the context, where the last block is shorter.
    """
    size = block_size_of(asked, model)
    wanted = -(-request.max_tokens // size) * size if asked.gen_length is None else asked.gen_length
    return min(wanted, max_model_len - num_shadows(asked, model) - len(request.prompt))


def num_shadows(asked: Diffusion, model: DiffusionModel) -> int:
    """Rows behind the canvas that stand for a block's own (WINO)."""
    return block_size_of(asked, model) if asked.selector.name == "wino" else 0


def refuse_canvas(request: Request, asked: Diffusion, model: DiffusionModel, limits: Limits) -> Fault | None:
    """A 400 for a canvas that can never be computed, or that the method has no rows for."""
    num_prompt, size = len(request.prompt), block_size_of(asked, model)
    if asked.gen_length is not None and (asked.gen_length < 1 or asked.gen_length % size):
        message = f"gen_length is {asked.gen_length}; it must be a multiple of block_size ({size})"
        return Fault(400, message, "gen_length")
    most = limits.max_model_len - num_shadows(asked, model) - num_prompt
    if (asked.gen_length or 1) > most:
        message = f"behind this prompt the context has room for {max(0, most)} tokens of the {asked.gen_length or 1}"
        return Fault(400, message, "prompt" if asked.gen_length is None else "gen_length")
    if asked.selector.name == "wino" and asked.planner.name not in ("fixed", "sub_blocks"):
        message = f"selector is wino, which goes with planner fixed or sub_blocks here, not {asked.planner.name}"
        return Fault(400, message, "decoding.planner")
    length = canvas_length(request, asked, model, limits.max_model_len)
    if len(request.output) >= length:
        message = f"output has {len(request.output)} tokens already and the canvas has {length}"
        return Fault(400, message, "max_tokens")
    total, room = num_prompt + length + num_shadows(asked, model), limits.num_pages * limits.page_size
    if total > limits.max_batched_tokens:
        message = (
            f"prompt and canvas have {total} tokens, and this model computes them all in one step, which holds "
            f"{limits.max_batched_tokens}. Reduce max_tokens or the prompt, or serve with a larger max_batched_tokens."
        )
        return Fault(400, message, "max_tokens" if num_prompt < limits.max_batched_tokens else "prompt")
    if total > room:
        message = f"prompt and canvas need KV for {total} tokens, but the whole KV cache holds {room}"
        return Fault(400, message, "max_tokens" if num_prompt < room else "prompt")
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
    seq_id: int, tokens: Sequence[int], mask_id: int, rows: set[int] | None, judged: Sequence[int], denoise: Denoise
) -> Span:
    """A span of some rows of a canvas and those that are judged; None = of all, and then `Denoise.state` is empty.

    judged  positions of rows. Shadows of the block [denoise.lo, denoise.hi) follow all rows, and are judged
    """
    end, shadow = len(tokens), denoise.shadow
    if rows is None:
        own = tuple(judged) + tuple(range(end, end + shadow))
        with_shadows = (*tokens, *[mask_id] * shadow)
        denoise = denoise._replace(state=())
        return Span(seq_id, with_shadows, 0, end + shadow, MASK_ALL, own, Read.DENOISE, denoise=denoise)
    positions = sorted(rows.union(judged))
    place = {position: offset for offset, position in enumerate(positions)}
    first = positions[0]
    is_run = positions[-1] - first + 1 == len(positions)
    return Span(
        seq_id,
        tuple(tokens[position] for position in positions),
        first,
        end,
        MASK_ALL,
        tuple(place[row] for row in judged),
        Read.DENOISE,
        denoise=denoise,
        positions=() if is_run else tuple(positions),
    )


def judged_positions(span: Span, shift: int) -> set[int]:
    """Sequence positions that a span's judged rows answer for."""
    assert span.denoise is not None
    rows = span.positions or range(span.start, span.start + len(span.tokens) - span.denoise.shadow)
    return {rows[offset] + shift for offset in span.judged if offset < len(rows)}
