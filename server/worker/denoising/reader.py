"""The reader of DENOISE spans: from the rows of a step to what each block changes.

A pure function of span, request and logits: no neighbour, no earlier step and no clock enters it, so a step may be run
again and a request gives the same tokens alone and in a crowd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import Ops
from kernels.philox import uniform
from scheduler.types import Denoised, DiffusionModel, EosRule, Outcome, Read, Request, Span, TokenLogprob
from server.worker.denoising.block import MAX_SHADOWED, UNKNOWN, Block, completes_bad_word, judged_rows, make_block
from server.worker.denoising.editing import edits, narrow_out
from server.worker.denoising.learn2pd import Filter
from server.worker.denoising.planning import adablock
from server.worker.denoising.selectors import BY_NAME, Masks
from server.worker.denoising.stats import Asked, RowStats, noise_word, read_stats
from server.worker.denoising.stopping import all_in, eotp
from server.worker.sequences import SequenceState

CHOICE_STREAM = 0xFFFF_FFFF
"""The stream of noise that chooses positions; drafts count theirs from the other end."""


class Denoising(NamedTuple):
    """What one DENOISE span gave. Fields as in `Outcome`."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    denoised: Denoised = Denoised()

    def outcome(self, seq_id: int) -> Outcome:
        return Outcome(seq_id, self.tokens, self.logprobs, denoised=self.denoised)


class Change(NamedTuple):
    """A position's new token. row: of the statistics, where its log-probability is; UNKNOWN for a mask set again."""

    position: int
    token: int
    row: int


class DenoiseReader:
    """Reads the DENOISE spans of a step. `learnt`: Learn2PD's filter, where the checkpoint has one."""

    def __init__(self, ops: Ops, model: DiffusionModel, rows_at_once: int, learnt: Filter | None = None) -> None:
        self._ops, self._model, self._rows_at_once, self._learnt = ops, model, rows_at_once, learnt

    def check(self, request: Request) -> None:
        """Raise ValueError, with a sentence for the user, for a request that this model cannot denoise as it asks."""
        decoding = request.decoding
        if decoding is None:
            return
        name, size = decoding.selector.name, decoding.block_size or self._model.block_size
        if request.sampling.grammar is not None and name != "sequential":
            raise ValueError(f"a grammar is followed from left to right: selector is {name}, but must be sequential")
        if name == "wino" and (self._model.shift or size > MAX_SHADOWED):
            raise ValueError(
                "wino needs a model whose rows answer for their own position"
                if self._model.shift
                else f"wino needs blocks of {MAX_SHADOWED} tokens at most; these have {size}"
            )
        if name == "learn2pd" and (self._learnt is None or self._learnt.block_size != size):
            trained = "none" if self._learnt is None else f"one for blocks of {self._learnt.block_size}"
            raise ValueError(f"learn2pd needs a filter trained for blocks of {size}; this checkpoint has {trained}")

    def read(
        self,
        logits_of: Callable[[list[int]], Tensor],
        spans: Sequence[Span],
        states: Sequence[SequenceState],
        first_rows: Sequence[int],
        errors: dict[int, str],
    ) -> dict[int, Denoising]:
        """{index of a span: what it gave}, for the DENOISE spans; errors of spans are added to `errors`.

        logits_of  raw logits [J, V] of some rows of the step; first_rows: row of each span's first token
        Raises ValueError for spans that break the rules of `Span` and `Denoise`.
        """
        readings: dict[int, Denoising] = {}
        blocks: list[tuple[int, Block, slice]] = []
        asked: list[Asked] = []
        for index, (span, state) in enumerate(zip(spans, states, strict=True)):
            if span.read is not Read.DENOISE or index in errors:
                continue
            block = make_block(span, state, self._model)
            rows = judged_rows(block)
            if isinstance(rows, str):
                errors[index] = rows
                continue
            step, filtered, first = block.denoise.step, block.decoding.filtered, len(asked)
            num_drawn = len(block.rows)
            asked += [
                Asked(first_rows[index] + row.offset, judged, step, filtered, row.given, place >= num_drawn)
                for place, (row, judged) in enumerate(zip(block.all_rows, rows, strict=True))
            ]
            blocks.append((index, block, slice(first, len(asked))))
        if not asked:
            return readings
        measured = read_stats(self._ops, logits_of, asked, self._model.mask_id, self._rows_at_once)
        for index, block, part in blocks:
            failed = [measured.errors[row] for row in range(part.start, part.stop) if row in measured.errors]
            if failed:
                errors[index] = failed[0]
                continue
            changes, denoised = self._decide(block, measured.stats.part(part))
            logprobs: tuple[TokenLogprob, ...] = ()
            if block.state.request.sampling.logprobs is not None:
                logprobs = tuple(_logprob(measured.logprobs, part.start, change) for change in changes)
            readings[index] = Denoising(tuple(change.token for change in changes), logprobs, denoised)
        return readings

    def _decide(self, block: Block, stats: RowStats) -> tuple[list[Change], Denoised]:
        """stats: of `block.all_rows`. Changes ascend by position."""
        denoise, decoding = block.denoise, block.decoding
        positions = np.array([row.target for row in block.rows], dtype=np.int64)
        window_end = self._window_end(block, positions, stats)
        end = denoise.window[1] if window_end is None else window_end
        rows = np.flatnonzero((positions >= denoise.window[0]) & (positions < end))
        num_masks = positions.size
        if decoding.stopper.name == "prophet" and all_in(stats.gap[:num_masks], denoise.progress, decoding.stopper):
            chosen = np.arange(num_masks)
        elif denoise.is_last or not rows.size:
            chosen = rows
        else:
            select = BY_NAME[decoding.selector.name]
            chosen = rows[select(self._masks(block, positions, stats, rows), decoding.selector)]
        surest = chosen[np.argsort(-stats.confidence[chosen], kind="stable")]
        wanted = [Change(int(positions[row]), int(stats.tokens[row]), int(row)) for row in surest]
        changes = _without_bad_words(block, [*wanted, *self._edits(block, stats)])
        if decoding.selector.name == "wino" and not denoise.is_last:
            changes += self._masked_again(block, stats, len(changes))
        changes.sort()
        return changes, self._denoised(block, positions, stats, changes, window_end)

    def _window_end(self, block: Block, positions: NDArray[np.int64], stats: RowStats) -> int | None:
        """Where AdaBlock ends a window that is all masks; None = it had no choice to make."""
        first, end = block.denoise.window
        inside = np.flatnonzero((positions >= first) & (positions < end))
        if block.decoding.planner.name != "adablock" or inside.size < end - first:
            return None
        default = min(end, first + (block.decoding.block_size or self._model.block_size))
        return adablock(
            positions[inside],
            stats.best[inside],
            stats.top[inside],
            default,
            block.decoding.delimiters,
            block.decoding.planner,
        )

    def _masks(self, block: Block, positions: NDArray[np.int64], stats: RowStats, rows: NDArray[np.intp]) -> Masks:
        confidence, margin, entropy = stats.confidence[rows], stats.margin[rows], stats.entropy[rows]
        if block.decoding.eos is EosRule.LAST:
            is_end = np.isin(stats.tokens[rows], block.state.recipe.end_ids)
            confidence = np.where(is_end, np.float32(-np.inf), confidence)
            margin = np.where(is_end, np.float32(-np.inf), margin)
            entropy = np.where(is_end, np.float32(np.inf), entropy)
        recipe = block.state.recipe
        word = noise_word(recipe.sampling.sample_index, block.denoise.step)
        outputs = (positions[rows] - block.state.num_prompt).tolist()

        def noise() -> NDArray[np.float64]:
            return np.array([uniform(recipe.seed, word, output, CHOICE_STREAM) for output in outputs])

        verdicts = None
        if block.decoding.selector.name == "learn2pd":
            verdicts = self._verdicts(block, stats, positions[rows])
        # With a grammar only the leftmost mask has a row, so that its quota is one whatever was asked.
        quota = max(1, block.denoise.quota)
        return Masks(positions[rows], confidence, margin, entropy, quota, block.denoise.threshold, noise, verdicts)

    def _verdicts(self, block: Block, stats: RowStats, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The filter's word on each of `positions`. It reads the confidences of a whole block: of the judged rows.

        A canvas that was cut (EoTP) may end inside the block. Departure: what would stand behind counts as sure.
        """
        targets = np.array([row.target for row in (*block.rows, *block.fixed)], dtype=np.int64)
        first, size, learnt = int(targets.min()), int(np.ptp(targets)) + 1, self._learnt
        is_whole = learnt is not None and (size == learnt.block_size or first + size == block.denoise.hi)
        if learnt is None or targets.size != size or not is_whole or size > learnt.block_size:
            raise ValueError(f"span of sequence {block.span.seq_id} judges {targets.tolist()} for learn2pd: no block")
        confidences = np.ones(learnt.block_size, dtype=np.float32)
        confidences[targets - first] = stats.top[: targets.size]
        verdicts: NDArray[np.float32] = learnt(confidences)[positions - first]
        return verdicts

    def _edits(self, block: Block, stats: RowStats) -> list[Change]:
        if block.decoding.selector.name != "edit":
            return []
        first = len(block.rows)
        part = slice(first, first + len(block.fixed))
        lo = block.denoise.lo
        tokens = np.array([block.tokens[row.target - lo] for row in block.fixed], dtype=np.int64)
        found = np.flatnonzero(edits(tokens, stats.best[part], stats.top[part], block.decoding.selector)).tolist()
        return [Change(block.fixed[i].target, int(stats.best[first + i]), first + i) for i in found]

    def _masked_again(self, block: Block, stats: RowStats, num_fixed: int) -> list[Change]:
        first = len(block.rows) + len(block.fixed)
        again = narrow_out(stats.given[first:], num_fixed, block.decoding.selector)
        return [Change(block.shadows[i].target, block.mask_id, UNKNOWN) for i in np.flatnonzero(again).tolist()]

    def _denoised(
        self,
        block: Block,
        positions: NDArray[np.int64],
        stats: RowStats,
        changes: Sequence[Change],
        window_end: int | None,
    ) -> Denoised:
        changed = {change.position: change.token for change in changes}
        left = np.array([row for row, at in enumerate(positions.tolist()) if at not in changed], dtype=np.int64)
        end = None
        if block.decoding.stopper.name == "eotp":
            lo = max(block.denoise.lo, block.state.num_prompt)
            output = enumerate(block.tokens[lo - block.denoise.lo :], lo)
            fixed = {at: changed.get(at, token) for at, token in output}
            end = eotp(fixed, positions[left].tolist(), stats.best[left], stats.top[left], block.state.recipe.stop_ids)
        guesses: tuple[tuple[int, int, float], ...] = ()
        if block.decoding.selector.name == "auto":
            guesses = tuple(
                zip(positions[left].tolist(), stats.best[left].tolist(), stats.top[left].tolist(), strict=True)
            )
        return Denoised(tuple(change.position for change in changes), end, window_end, guesses=guesses)


def _logprob(logprobs: Mapping[int, TokenLogprob], first: int, change: Change) -> TokenLogprob:
    """A mask set again has none of its own; the entry keeps its place."""
    return TokenLogprob(change.token, 0.0, 0) if change.row == UNKNOWN else logprobs[first + change.row]


def _without_bad_words(block: Block, changes: list[Change]) -> list[Change]:
    """The changes, in order, that make no bad word together with those before them: each alone makes none."""
    if not block.state.recipe.bad_words:
        return changes
    tokens, kept = list(block.tokens), []
    for change in changes:
        place = change.position - block.denoise.lo
        before, tokens[place] = tokens[place], change.token
        if completes_bad_word(block, tokens, change.position):
            tokens[place] = before
        else:
            kept.append(change)
    return kept
