"""One block while it is denoised: its tokens, masks among them, the step it has come to, and what may change next.

Integers only. Which block comes next and what is emitted of it is `block_diffusion.py`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from scheduler.decoding.base import BadOutcome
from scheduler.decoding.windows import plan_window, quota
from scheduler.types import (
    Denoised,
    Diffusion,
    DiffusionModel,
    Fault,
    Limits,
    Request,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True)
class BlockRules:
    """What a selector may do to a block.

    most_steps     steps after which the block ends (`Denoise.is_last`)
    post_edits     steps of a full block that only edit; 0 = a full block is done
    may_remask     fixed tokens can become masks again
    is_final_late  nothing is final before the block is done: tokens are emitted then
    judges_block   every position is judged, not only masks; judges_masks: all masks, not only those of the window
    fills_block    a step may fix all masks of the block, whatever the window (Prophet)
    """

    most_steps: int
    post_edits: int = 0
    may_remask: bool = False
    is_final_late: bool = False
    judges_block: bool = False
    judges_masks: bool = False
    fills_block: bool = False


def block_rules(how: Diffusion, size: int) -> BlockRules:
    selector = how.selector.name
    if selector == "edit":
        edits = int(how.selector["max_post_edits"])
        return BlockRules(size + edits, edits, is_final_late=True, judges_block=True)
    if selector == "wino":
        return BlockRules(2 * size, may_remask=True, is_final_late=True, judges_block=True)
    judges_masks = selector == "auto" or how.stopper.name in ("eotp", "prophet")
    fills_block = how.stopper.name == "prophet"
    return BlockRules(size, judges_block=selector == "learn2pd", judges_masks=judges_masks, fills_block=fills_block)


def shadow_rows(how: Diffusion, size: int) -> int:
    """Rows behind a block's own that stand for them (WINO). Their keys have slots of their own, behind the block's."""
    return size if how.selector.name == "wino" else 0


def most_tokens(how: Diffusion, size: int, max_model_len: int) -> int:
    """Tokens that a sequence can have: whole blocks only, so that the last one is denoised like any other."""
    return (max_model_len - shadow_rows(how, size)) // size * size


def refuse_blocks(request: Request, how: Diffusion, model: DiffusionModel, limits: Limits) -> Fault | None:
    """A 400 for blocks that can never be computed, or that the method has no rows for."""
    size, selector = model.block_size, how.selector.name
    if selector == "learn2pd" and model.shift:
        # No row of a block answers for its first token, and the filter wants all of them.
        why = "selector is learn2pd; it needs a model whose rows answer for their own tokens"
        return Fault(400, why, "decoding.selector")
    if 2 * size > limits.max_batched_tokens:
        return Fault(
            400,
            f"a denoise step may need {2 * size} rows, two blocks of this model, but a step has at most "
            f"{limits.max_batched_tokens}. Serve with a larger max_batched_tokens.",
            "decoding",
        )
    num_prompt, most = len(request.prompt), most_tokens(how, size, limits.max_model_len)
    if num_prompt + len(request.output) >= most:
        return Fault(
            400,
            f"in blocks of {size} the context holds {most} tokens, which leaves nothing to generate behind a prompt of "
            f"{num_prompt}. Reduce the length of the prompt.",
            "prompt",
        )
    total = min(most, num_prompt + request.max_tokens)
    needed = -(-total // size) * size + shadow_rows(how, size)
    room = limits.num_pages * limits.page_size
    if needed > room:
        return Fault(
            400,
            f"prompt ({num_prompt} tokens) and max_tokens ({request.max_tokens}) need KV for {needed} tokens in whole "
            f"blocks, but the KV cache holds {room}. Reduce max_tokens or the prompt.",
            "max_tokens" if num_prompt < room else "prompt",
        )
    return None


@dataclass(slots=True)
class Block:
    """Sequence positions [lo, lo + len(tokens)).

    known         offset of the first token that is not of the prompt: what is before it never changes
    step          denoise steps it has had; first_step of these only carried a token over from the block before
    num_full      steps it has had since it was full (`edit`)
    is_settled    the last step changed nothing
    end           offset at which the text ends (`Denoised.end`): nothing from there on is wanted
    opened, closed   `adablock`'s window: where it begins, and the end the worker gave it, if it did
    fresh_window  the window in which the cached rows are of the last full step (`sub_block` cache)
    """

    how: Diffusion
    rules: BlockRules
    mask_id: int
    lo: int
    tokens: list[int]
    known: int
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    step: int = 0
    first_step: int = 0
    num_masks: int = 0
    num_full: int = 0
    is_settled: bool = False
    end: int = 0
    opened: int = 0
    closed: int | None = None
    fresh_window: tuple[int, int] | None = None

    @classmethod
    def start(cls, how: Diffusion, rules: BlockRules, mask_id: int, lo: int, size: int, prompt: Sequence[int]) -> Block:
        """The block at `lo` as its first step finds it: what the prompt has of it, then masks."""
        tokens = list(prompt[lo : lo + size])
        known = len(tokens)
        tokens += [mask_id] * (size - known)
        return cls(how, rules, mask_id, lo, tokens, known, [None] * size, num_masks=size - known, end=size)

    def copy(self) -> Block:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return Block(**fields | {"tokens": list(self.tokens), "logprobs": list(self.logprobs)})

    @property
    def hi(self) -> int:
        return self.lo + len(self.tokens)

    @property
    def is_full(self) -> bool:
        """No mask is left before the end."""
        return self.mask_id not in self.tokens[: self.end]

    @property
    def is_done(self) -> bool:
        return self.is_full and (self.is_settled or self.num_full >= self.rules.post_edits)

    def window(self) -> tuple[int, int]:
        """Sequence positions [first, end) that may be fixed in the next step."""
        if self.is_full:
            return self.lo, self.hi
        if self.is_last:
            return self.lo, self.lo + self.end
        if self.how.planner.name == "adablock":
            first = self.tokens.index(self.mask_id, self.opened)
            return self.lo + first, self.lo + (self.end if self.closed is None else min(self.closed, self.end))
        first, end = plan_window(self.how.planner, self.tokens, self.mask_id, 0, self.end, self.known)
        return self.lo + first, self.lo + end

    def judged(self, first: int, end: int, shift: int) -> tuple[int, ...]:
        """Offsets of the rows, of those at positions [first, end), that answer for positions of the block somebody
        wants to know about."""
        rules = self.rules
        low, high = (self.lo, self.hi) if rules.judges_block or rules.judges_masks else self.window()
        return tuple(
            position - shift - first
            for position in range(max(low, first + shift), min(high, end))
            if rules.judges_block or self.tokens[position - self.lo] == self.mask_id
        )

    @property
    def is_last(self) -> bool:
        """The next step is the last the block may have. `edit` has its extra steps behind those that fill the block."""
        if self.rules.post_edits and not self.is_full:
            return self.step + 1 >= len(self.tokens)
        return self.step + 1 >= self.rules.most_steps or self.num_full + 1 >= self.rules.post_edits > 0

    @property
    def quota(self) -> int:
        num_steps = min(self.num_masks, self.how.steps or self.num_masks)
        return quota(self.num_masks, max(1, num_steps), self.step - self.first_step)

    @property
    def progress(self) -> float:
        """Share of its steps that is over, in [0, 1). Of the block, not of the request: the length that a request may
        have does not change its text."""
        num_steps = max(1, min(self.num_masks, self.how.steps or self.num_masks))
        return min(self.step - self.first_step, num_steps - 1) / num_steps

    def check(self, window: tuple[int, int], tokens: Sequence[int], denoised: Denoised, is_last: bool) -> None:
        """Raise BadOutcome unless these changes may be made to the block."""
        positions = denoised.positions
        if len(tokens) != len(positions):
            raise BadOutcome(f"the worker returned {len(tokens)} tokens for {len(positions)} positions")
        if any(a >= b for a, b in pairwise(positions)):
            raise BadOutcome(f"the positions that changed are not ascending: {positions}")
        if self.rules.fills_block:
            window = (self.lo, self.hi)
        masks = {p for p in range(*window) if self.tokens[p - self.lo] == self.mask_id}
        num_fixed = 0
        for position, token in zip(positions, tokens, strict=True):
            was_mask = position in masks
            num_fixed += was_mask and token != self.mask_id
            if not was_mask and not (self.rules.is_final_late and self.lo + self.known <= position < self.hi):
                raise BadOutcome(f"the worker changed position {position}, no mask of the window {window}")
            if token == self.mask_id and (was_mask or is_last or not self.rules.may_remask):
                raise BadOutcome(f"the worker put the mask id at position {position}")
        if masks and not num_fixed and (is_last or not self.rules.is_final_late):
            raise BadOutcome(f"the worker fixed none of {len(masks)} masks in the window {window}")
        self._check_ends(window, denoised)

    def _check_ends(self, window: tuple[int, int], denoised: Denoised) -> None:
        if denoised.end is not None and denoised.end < self.lo + self.known:
            raise BadOutcome(f"the text would end at {denoised.end}, before the first token of the block")
        if denoised.window_end is not None and not window[0] < denoised.window_end <= self.hi:
            raise BadOutcome(f"the window {window} cannot end at {denoised.window_end}")

    def apply(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], denoised: Denoised) -> None:
        """Make checked changes; one more step is over."""
        was_full = self.is_full
        for position, token, logprob in zip(denoised.positions, tokens, logprobs, strict=True):
            self.tokens[position - self.lo] = token
            self.logprobs[position - self.lo] = logprob
        self.step += 1
        self.num_full += was_full
        self.is_settled = was_full and not denoised.positions
        if denoised.end is not None:
            self.end = min(self.end, denoised.end - self.lo)
        if denoised.window_end is not None and self.closed is None:
            self.closed = denoised.window_end - self.lo
        self._open_next()

    def _open_next(self) -> None:
        """`adablock`: a window that is full is followed by one to the end of the block, until the worker ends it."""
        closed = self.closed
        if closed is not None and self.mask_id not in self.tokens[:closed]:
            self.opened, self.closed = closed, None
