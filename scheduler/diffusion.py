"""What is said about diffusion: asked by requests, carried by spans, told by outcomes, counted in usage. Part of the
vocabulary: `scheduler.types` hands it on. The catalogue of methods is `scheduler/policies.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

_MASK_BITS = 64
"""A block and its shadows (WINO) are one visibility mask per row."""


class Topology(StrEnum):
    """Which keys a row of a diffusion model sees (diffusion reference, section 1).

    BLOCK_CAUSAL   all blocks up to and with its own: finished blocks are final, their KV is exact and shareable
    BIDIRECTIONAL  the whole canvas, masks included: nothing is ever final before the end, every cache approximates
    """

    BLOCK_CAUSAL = "block_causal"
    BIDIRECTIONAL = "bidirectional"


class EosRule(StrEnum):
    """FREE: as any token; NEVER: its logit is minus infinity; LAST: it may be predicted, but only fixed when nothing
    else is left (its confidence counts as minus infinity). Diffusion reference 2.5.
    """

    FREE = "free"
    NEVER = "never"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class DiffusionModel:
    """What the scheduler and the API must know of a model that can denoise.

    mask_id        never sampled, never emitted
    block_size     unit of denoising; for BIDIRECTIONAL models the default only
    shift          0: row i answers for token i; 1: row i answers for token i + 1 (Dream, Fast-dLLM v2)
    is_dual        it answers autoregressive requests too (causal mask)
    policy         the default of requests that name none: a key of `policies.POLICIES`
    learnt_block   block size for which it brings a Learn2PD filter; 0 = none
    """

    mask_id: int
    block_size: int
    topology: Topology = Topology.BLOCK_CAUSAL
    shift: int = 0
    is_dual: bool = False
    policy: str = "auto"
    learnt_block: int = 0

    def misfit(self, decoding: Diffusion) -> tuple[str, str] | None:
        """(field, what is wrong with it) of a method that these weights were not trained for, or None."""
        selector = decoding.selector.name
        if selector == "edit" and self.is_dual:
            return "selector", "selector is edit, but this model's tokens answer for the next one, not for themselves"
        size = decoding.block_size or self.block_size
        if selector == "wino" and (self.shift or 2 * size > _MASK_BITS):
            why = "answers for the next position" if self.shift else f"has blocks of {size}; {_MASK_BITS // 2} at most"
            return "selector", f"selector is wino, whose shadows answer for their own position; this model {why}"
        if selector == "learn2pd" and self.learnt_block != size:
            trained = f"has one for blocks of {self.learnt_block}" if self.learnt_block else "has none"
            return "selector", f"selector is learn2pd, which needs a filter for blocks of {size}; this model {trained}"
        return None


@dataclass(frozen=True, slots=True)
class Choice:
    """One method of the catalogue with all its parameters, defaults filled in."""

    name: str
    values: tuple[tuple[str, float], ...] = ()

    def __getitem__(self, parameter: str) -> float:
        for name, value in self.values:
            if name == parameter:
                return value
        raise KeyError(f"{self.name} has no parameter {parameter!r}")


@dataclass(frozen=True, slots=True)
class Diffusion:
    """How a request is denoised: Selector x BlockPlanner x KVPlanner x Stopper (diffusion reference, 9.2).

    policy       the name it was asked under
    selector     which masks of the window are fixed (and which tokens edited or masked again) in a step
    planner      which part of the block, the window, may be fixed
    cache        which rows are computed; "exact" for block-causal models
    stopper      when the text ends early
    steps        denoising steps that a block's masks are spread over by selectors with a quota; None = one per token
    block_size   of bidirectional models, a divisor of gen_length; None = the model's. Fixed by block-causal models
    gen_length   tokens of a bidirectional canvas; None = from max_tokens, rounded up to whole blocks
    filtered     confidence is that of the tempered and truncated distribution, not of the raw one (2.3)
    delimiters   token ids that end a line or a clause (AdaBlock); the API fills them in
    snapshots    deltas carry the block as it stands, masks included
    """

    policy: str
    selector: Choice
    planner: Choice = Choice("fixed")
    cache: Choice = Choice("exact")
    stopper: Choice = Choice("eos")
    steps: int | None = None
    block_size: int | None = None
    gen_length: int | None = None
    filtered: bool = False
    eos: EosRule = EosRule.FREE
    delimiters: tuple[int, ...] = ()
    snapshots: bool = False


class Denoise(NamedTuple):
    """How the judged rows of a DENOISE span are read. A function of the sequence's own past alone (R5).

    lo, hi      the block (or canvas) in sequence positions; its tokens are in the span, masks as the mask id, or
                `state` has them
    step        denoise steps this block has had: part of the noise's key
    quota       fewest tokens that selectors with a quota fix in this step; at least 1
    window      sequence positions [first, end) that may be fixed in this step, inside [lo, hi)
    progress    share of the request's denoise steps that is over, in [0, 1) (Prophet)
    threshold   in place of the selector's own, from `auto`'s controller; None = the selector's own
    is_last     fix everything in the window: the guard against a block without end
    shadow      so many rows at the end of the span are shadows of the block's rows (WINO): same positions, each sees
                the block without its original, and itself
    state       tokens of [lo, hi) where the span does not bring them all (cached rows); () = the span does
    """

    lo: int
    hi: int
    step: int
    quota: int
    window: tuple[int, int]
    progress: float = 0.0
    threshold: float | None = None
    is_last: bool = False
    shadow: int = 0
    state: tuple[int, ...] = ()


class Denoised(NamedTuple):
    """What a DENOISE span changed. `Outcome.tokens` (and logprobs) run parallel to `positions`.

    positions   sequence positions that have a new token: a mask fixed, a token edited, or one masked again (its token
                is then the mask id); each once, ascending
    end         the text ends before this position, whatever stands behind it (EoTP); None = no such news
    window_end  where the planner ended the block's window (AdaBlock); None = it had no choice to make
    is_stale    cached keys have drifted: all rows are due next (Elastic-Cache)
    tracked     rows to bring next time, whose attention tells of drift; never masks (Elastic-Cache)
    guesses     (position, token, confidence) of masks that are left, for the `auto` controller; () where not asked
    """

    positions: tuple[int, ...] = ()
    end: int | None = None
    window_end: int | None = None
    is_stale: bool = False
    tracked: tuple[int, ...] = ()
    guesses: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class DecodingUsage:
    """What denoising a request took: forwards that fixed tokens, passes that only wrote final KV, rows of both.

    A request's total is the sum of its deltas'.
    """

    forwards: int = 0
    commit_passes: int = 0
    rows: int = 0

    def __add__(self, other: DecodingUsage) -> DecodingUsage:
        return DecodingUsage(
            self.forwards + other.forwards, self.commit_passes + other.commit_passes, self.rows + other.rows
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A block while it fills: tokens from sequence position `start` on, masks as the mask id."""

    start: int
    tokens: tuple[int, ...]
    step: int
