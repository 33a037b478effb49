"""`diffusion`: the rest of the current block, denoised in the forward that decodes anyway, drafts the next tokens.

Only for a dual-mode checkpoint: one trained on next tokens and on masked blocks. Behind a decoding span stand mask rows
to the end of its block (diffusion reference, 7.0): each answers for its own position and sees everything up to the end
of the block, while token rows stay causal and never see a mask. So a step costs some rows more and no forward more, and
verification, in the next step, is the ordinary causal one: the text is that of plain decoding.

The first mask row stands where this step's token now is: how likely it holds that token tells how far the block's guess
goes with the text. Positions are drawn independently, each with the target's own noise at its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import Drafts, Read, Span, VerifyMode
from server.worker.drafters.base import Want
from server.worker.drafters.config import MASK_DRAFTER
from server.worker.drafters.drawing import draw, draw_apart
from server.worker.drafters.lane import LEAST_SURVIVAL
from server.worker.drafters.paged_forward import DraftingModel
from server.worker.info import WorkerInfo
from server.worker.probes import Probe
from server.worker.process_logits import JudgedRow, process_logits
from server.worker.recipe import Feature
from server.worker.sampling import not_finite
from server.worker.sequences import SequenceState

NAME = MASK_DRAFTER
LEAST_CONSISTENT = 0.05
"""Below this ratio to the likeliest token at the first mask, the block's guess is of another text."""
_OF_HISTORY = Feature.PENALTY | Feature.BAD_WORDS | Feature.GRAMMAR
"""Rules that look at the tokens before a position: those of a block are not known when it is drawn."""


class BlockProber:
    """Appends the mask rows of `Span.num_masks` (probes.py). How many there are is the scheduler's to say: they are
    part of its budget, and they end with their block."""

    def __init__(self, mask_id: int, block_size: int) -> None:
        self._mask_id, self._block_size = mask_id, block_size

    def probes(self, spans: Sequence[Span], states: Sequence[SequenceState]) -> list[Probe]:
        found = []
        for index, span in enumerate(spans):
            count = span.num_masks
            if count and (state := states[index]).failure is None and _is_decoding(span, state):
                start = span.start + len(span.tokens)
                masks = (self._mask_id,) * count
                found.append(Probe(index, Span(span.seq_id, masks, start, start + count, self._block_size)))
        return found


def _is_decoding(span: Span, state: SequenceState) -> bool:
    """The span's last row decides the sequence's next token, or its drafts may all be right."""
    if span.read is Read.VERIFY:
        return True
    return bool(span.judged) and span.start + len(span.tokens) == len(state.history)


class DiffusionDrafter:
    """`Drafter` that reads the mask rows of the step that has just run."""

    name = NAME
    is_sequential = False
    needs_top = 0
    num_bytes = 0

    def __init__(self, model: DraftingModel, ops: Ops, mask_id: int) -> None:
        self._model, self._ops, self._mask_id = model, ops, mask_id

    def serves(self, state: SequenceState) -> bool:
        return True

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        offers: list[Drafts | None] = [None] * len(wants)
        parts = [(index, want, want.probed) for index, want in enumerate(wants) if want.probed is not None]
        if parts:
            logits_RV = self._model.logits(torch.cat([probed for _, _, probed in parts]))
            first = 0
            for index, want, probed in parts:
                offers[index] = self._offer(want, logits_RV[first : first + probed.shape[0]])
                first += probed.shape[0]
        return offers

    def release(self, seq_id: int, state: SequenceState) -> None:
        """Nothing is kept of a sequence."""

    def _offer(self, want: Want, logits_RV: Tensor) -> Drafts | None:
        """logits_RV: of the positions from the sequence's last token on, a row each."""
        if not_finite(logits_RV):
            return None
        # The last token, too, was output: row i is at output position num_output - 1 + i.
        rows = [_row(want, i - 1) for i in range(logits_RV.shape[0])]
        logits_RV[:, self._mask_id] = float("-inf")
        if process_logits(self._ops, logits_RV, rows):
            return None
        probs_RV = torch.softmax(logits_RV, dim=1)
        best = probs_RV.amax(dim=1).tolist()
        consistency = float(probs_RV[0, want.tokens[-1]]) / best[0]
        if consistency < LEAST_CONSISTENT:
            return None
        count = min(want.num_drafts, len(rows) - 1)
        return self._drawn(want, logits_RV[1 : count + 1], rows[1 : count + 1], probs_RV, best, consistency)

    def _drawn(
        self,
        want: Want,
        logits_JV: Tensor,
        rows: list[JudgedRow],
        probs_RV: Tensor,
        best: list[float],
        consistency: float,
    ) -> Drafts:
        is_coupled = want.state.request.speculation.verify is VerifyMode.COUPLED
        if is_coupled:
            tokens = draw(self._ops, logits_JV, rows).tolist()
        else:
            tokens = draw_apart(self._ops, logits_JV, rows, range(len(rows))).tolist()
        if not is_coupled and not want.state.recipe.is_greedy:
            want.state.draft_q = probs_RV[1 : len(rows) + 1].clone()
        survivals, survival = [], consistency
        for chance in best[1 : len(rows) + 1]:
            survival = max(LEAST_SURVIVAL, survival * min(1.0, chance))
            survivals.append(survival)
        return Drafts(tuple(tokens), tuple(survivals), NAME)


def _row(want: Want, offset: int) -> JudgedRow:
    """The rules at the position `offset` after the first draft's; those that look at tokens in between are left out."""
    recipe = want.state.recipe
    if recipe.features & _OF_HISTORY:
        recipe = replace(recipe, features=recipe.features & ~_OF_HISTORY)
    return JudgedRow(recipe, want.tokens, want.num_output + offset)


def build_diffusion(model: DraftingModel, ops: Ops, info: WorkerInfo) -> DiffusionDrafter:
    """The drafter of a dual-mode model. Raises ValueError if the checkpoint names no mask token or block size."""
    if info.diffusion is None or not info.diffusion.is_dual:
        raise ValueError(
            "drafters names 'diffusion', but this model is not dual-mode: its config.json has no mask_token_id and "
            "block_size; leave diffusion out"
        )
    return DiffusionDrafter(model, ops, info.diffusion.mask_id)


def make_prober(info: WorkerInfo) -> BlockProber | None:
    """What appends the mask rows, if `diffusion` is among the drafters."""
    if info.diffusion is None or NAME not in dict(info.drafters):
        return None
    return BlockProber(info.diffusion.mask_id, info.diffusion.block_size)
