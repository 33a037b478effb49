"""A DENOISE span as its reader sees it: the block's tokens, and which judged row answers for which of its positions.

Also what each of these rows' rules look at. Nothing here outlives the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.types import Denoise, Diffusion, DiffusionModel, Span
from server.worker.process_logits import JudgedRow
from server.worker.sequences import SequenceState

MAX_SHADOWED = 32
"""Longest block that can have shadow rows: a row's mask has 64 bits, for the block and for the shadows."""
_READS_FIXED = frozenset({"edit", "learn2pd"})
"""Selectors that read the rows of fixed tokens, too."""
UNKNOWN = -1
"""No token: what a row is asked about where it is not asked about a given one."""


class Row(NamedTuple):
    """One judged row that is read.

    offset     in the span
    target     sequence position it answers for
    given      the token whose probability is asked (WINO's shadows); UNKNOWN = none
    """

    offset: int
    target: int
    given: int = UNKNOWN


@dataclass(slots=True)
class Block:
    """What a DENOISE span is about.

    tokens    of [lo, hi), masks as the mask id
    rows      of masked positions, ascending; at most one each
    fixed     rows of fixed positions, where the selector reads them
    shadows   of fixed output positions, where there are shadow rows
    """

    span: Span
    state: SequenceState
    denoise: Denoise
    decoding: Diffusion
    mask_id: int
    tokens: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)
    fixed: list[Row] = field(default_factory=list)
    shadows: list[Row] = field(default_factory=list)

    @property
    def all_rows(self) -> list[Row]:
        return [*self.rows, *self.fixed, *self.shadows]

    def is_mask(self, position: int) -> bool:
        return self.tokens[position - self.denoise.lo] == self.mask_id


def make_block(span: Span, state: SequenceState, model: DiffusionModel) -> Block:
    """Raises ValueError for a span that breaks the rules of `Span` and `Denoise`."""
    denoise, decoding = span.denoise, state.request.decoding
    if denoise is None or decoding is None:
        missing = "denoise" if denoise is None else "decoding in its request"
        raise ValueError(f"span of sequence {span.seq_id} is to be denoised, but there is no {missing}")
    block = Block(span, state, denoise, decoding, model.mask_id, block_tokens(span, denoise))
    num_own = len(span.tokens) - denoise.shadow
    if span.judged and not 0 <= min(span.judged) <= max(span.judged) < len(span.tokens):
        # The row would be another sequence's.
        raise ValueError(f"span of sequence {span.seq_id} judges rows {span.judged}, but has {len(span.tokens)}")
    is_bounded = state.matcher is not None
    for offset in span.judged:
        if offset >= num_own:
            target = denoise.lo + offset - num_own
            _place(block, Row(offset, target, block.tokens[target - denoise.lo]), block.shadows)
            continue
        target = (span.positions[offset] if span.positions else span.start + offset) + model.shift
        if not denoise.lo <= target < denoise.hi:
            raise ValueError(
                f"span of sequence {span.seq_id} judges a row for position {target}, which is not in its block "
                f"[{denoise.lo}, {denoise.hi})"
            )
        if not block.is_mask(target):
            _place(block, Row(offset, target), block.fixed)
        elif not (is_bounded and block.rows):
            # A grammar knows what may follow the tokens so far, and nothing of what stands behind a mask.
            block.rows.append(Row(offset, target))
    first, end = denoise.window
    if not any(first <= row.target < end for row in block.rows) and not block.fixed:
        raise ValueError(f"span of sequence {span.seq_id} judges no row for a mask of its window [{first}, {end})")
    return block


def _place(block: Block, row: Row, rows: list[Row]) -> None:
    """Keep a row of a fixed position if anybody reads it. The prompt's tokens are neither edited nor masked again."""
    is_read = rows is block.shadows or block.decoding.selector.name in _READS_FIXED
    is_prompt = row.target < block.state.num_prompt and block.decoding.selector.name != "learn2pd"
    if is_read and not is_prompt and not block.is_mask(row.target):
        rows.append(row)


def block_tokens(span: Span, denoise: Denoise) -> tuple[int, ...]:
    """Tokens of [lo, hi). Raises ValueError if neither the span nor `Denoise.state` brings them all."""
    lo, hi, num_own = denoise.lo, denoise.hi, len(span.tokens) - denoise.shadow
    if denoise.state:
        tokens = denoise.state
    elif span.positions:
        tokens = tuple(t for p, t in zip(span.positions, span.tokens[:num_own], strict=True) if lo <= p < hi)
    else:
        tokens = span.tokens[max(0, lo - span.start) : min(num_own, hi - span.start)] if span.start <= lo else ()
    if not 0 <= lo < hi or len(tokens) != hi - lo:
        raise ValueError(f"span of sequence {span.seq_id} has {len(tokens)} tokens of its block [{lo}, {hi})")
    first, end = denoise.window
    if not lo <= first < end <= hi:
        raise ValueError(f"span of sequence {span.seq_id} has window [{first}, {end}) in its block [{lo}, {hi})")
    return tokens


def judged_rows(block: Block) -> list[JudgedRow] | str:
    """What the rules of each of `block.all_rows` look at, or an error that ends the sequence."""
    state, lo = block.state, block.denoise.lo
    if state.matcher is not None:
        if block.decoding.selector.name != "sequential":
            return f"a grammar is followed from left to right; {block.decoding.selector.name} fixes tokens in any order"
        if (error := state.matcher.catch_up(state.history)) is not None:
            return error
    if state.counts is not None:
        state.counts.catch_up(state.history)
    return [_judged_row(block, row.target, block.tokens[: row.target - lo]) for row in block.all_rows]


def _judged_row(block: Block, target: int, before: tuple[int, ...]) -> JudgedRow:
    state, lo = block.state, block.denoise.lo
    first = max(0, state.num_prompt - lo)
    counts = None
    if state.counts is not None:
        # Output tokens on both sides, but not the one that is decided anew.
        output = [*block.tokens[first : target - lo], *block.tokens[max(first, target + 1 - lo) :]]
        counts = state.counts.after([token for token in output if token != block.mask_id])
    mask = None if state.matcher is None else state.matcher.masks([before[first:]])[0]
    behind = block.tokens[target + 1 - lo :]
    return JudgedRow(state.recipe, state.history, target - state.num_prompt, counts, mask, before, behind)


def completes_bad_word(block: Block, tokens: Sequence[int], position: int) -> bool:
    """Whether the token at `position` is part of a bad word in `tokens`, the block as it would be."""
    recipe, lo = block.state.recipe, block.denoise.lo
    longest = max((len(start) for start, _ in recipe.bad_words), default=-1)
    if longest < 0:
        return False
    before = block.state.history[max(block.state.num_prompt, lo - longest) : lo]
    output = [*before, *tokens[max(0, block.state.num_prompt - lo) :]]
    place = position - max(lo, block.state.num_prompt) + len(before)
    for start, last in recipe.bad_words:
        word = [*start, last]
        begins = range(max(0, place - len(word) + 1), place + 1)
        if any(output[begin : begin + len(word)] == word for begin in begins):
            return True
    return False
