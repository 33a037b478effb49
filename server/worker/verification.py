"""Which drafts of a VERIFY span stand, and which tokens the span gives. Pure decisions: no tensor of the model in here.

Coupled verification is the default (speculative reference, 2.2): the target draws its own token on every row with the
noise of that row's output position, and drafts only decide how many of those draws count. So the text is the one that
plain decoding gives, whatever was drafted, and greedy decoding is the same code at temperature 0.

The rejection modes keep the distribution but not the text, and put duties on drafters: rejection.py states them. Their
noise comes from streams of its own: 0 is the coupled draw's, 1 decides acceptance, 2 draws the tokens that are no
drafts, 3 and up are the drafters' (`draft_stream`). Acceptance and drafts are keyed by the output position at which the
span begins, because a block verification has looked at noise beyond the tokens it gives.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.ops import Ops
from kernels.philox import uniform
from scheduler.types import MAX_TREE_NODES, VerifyMode
from server.worker.recipe import Recipe
from server.worker.rejection import Choice, Floats, choose_by_block, choose_by_token

_ACCEPT_STREAM, _OWN_STREAM, _FIRST_DRAFT_STREAM = 1, 2, 3


class Verdict(NamedTuple):
    """What a VERIFY span gives.

    tokens  the accepted drafts, then one token of the target's own: at least one, at most all drafts and one
    path    of each token the offset in the span of the row it comes from, ascending; path[0] = 0. The rows path[1:]
            are the accepted drafts: their KV belongs at start + 1, start + 2, ... and the last one's logits gave the
            last token
    """

    tokens: tuple[int, ...]
    path: tuple[int, ...]


def verify_coupled(samples: Sequence[int], drafts: Sequence[int], parents: Sequence[int] = ()) -> Verdict:
    """Follow the target's own tokens through the drafts for as long as they agree.

    samples  the token drawn on each row of the span, len(drafts) + 1 of them. A row behind a draft that the rules ban
             is never reached, so anything may stand there; so may -1 on a row that failed, which then ends the path
    drafts   tokens of rows 1, 2, ...
    parents  as `Span.parents`, () = a chain. Of children with the same token the first is taken
    """
    if not parents:
        num_accepted = 0
        for draft, sample in zip(drafts, samples, strict=False):
            if draft != sample:
                break
            num_accepted += 1
        return Verdict(tuple(samples[: num_accepted + 1]), tuple(range(num_accepted + 1)))
    path, tokens, at = [0], [samples[0]], 0
    # Parents come before their children, so one pass over the rows meets every node of the path in order.
    for row in range(1, len(parents)):
        if parents[row] == at and drafts[row - 1] == tokens[-1]:
            at = row
            path.append(row)
            tokens.append(samples[row])
    return Verdict(tuple(tokens), tuple(path))


class Judgement(NamedTuple):
    """A VERIFY span in a rejection mode.

    num_output  output position of the token that row 0 decides
    parents     as `Span.parents`, () = a chain
    draft_q     float32 [len(drafts), V], any device: for each draft the processed distribution (probabilities, not
                logits) at its parent from which it was drawn, with nothing taken out for siblings. None = the drafts
                were not drawn but looked up, or are the best of their distributions
    with_replacement  whether siblings were drawn independently of each other
    """

    drafts: Sequence[int]
    mode: VerifyMode
    recipe: Recipe
    num_output: int
    parents: Sequence[int] = ()
    draft_q: Tensor | None = None
    with_replacement: bool = False


def draft_stream(node: int, draw: int = 0) -> int:
    """The noise stream for drawing the children of a span's node (its offset; 0 = the root) in a rejection mode.

    Its position is the `num_output` of the span's row 0, whatever the node's depth. No two steps of a sequence share
    one, so that no noise that an earlier verification has looked at comes back. draw: of children drawn with
    replacement the how-manieth; those drawn without share one draw, best first (Gumbel top-m).
    """
    return _FIRST_DRAFT_STREAM + node + MAX_TREE_NODES * draw


def verify_sampled(
    ops: Ops, logits_JV: Tensor, judgements: Sequence[Judgement], failed: Collection[int] = ()
) -> list[Verdict]:
    """Verify spans by rejection (token by token or block) and draw each one's last token.

    logits_JV  float32, processed, left as it is: 1 + len(drafts) rows for each judgement, in order. Rows behind a draft
               that the rules ban are not reached and may hold anything
    failed     rows of logits_JV from which no token may be drawn (those with a NaN too): such a row ends its path, with
               token -1
    A token depends on the request's seed, sample index and output position and on how many drafts were verified there,
    never on other sequences: the same distribution as coupled verification, but not the same text.
    Raises ValueError for a mode that is not a rejection mode, a tree in block mode, or a draft_q of the wrong shape.
    """
    if not judgements:
        return []
    p_JV = _probabilities(ops, logits_JV, judgements)
    p_JV[list(failed)] = np.nan
    choices, first = [], 0
    for judgement in judgements:
        end = first + 1 + len(judgement.drafts)
        choices.append(_choose(p_JV[first:end], judgement))
        first = end
    weights = np.stack([choice.weights for choice in choices])
    has_failed = ~np.isfinite(weights.sum(axis=1))
    weights[has_failed] = 1.0
    log_weights = torch.from_numpy(weights).log_().to(logits_JV.device)
    positions = [one.num_output + len(choice.path) - 1 for one, choice in zip(judgements, choices, strict=True)]
    recipes = [judgement.recipe for judgement in judgements]
    last = _draw(ops, log_weights, recipes, positions, [recipe.is_greedy for recipe in recipes])
    verdicts = []
    for judgement, choice, token, failed in zip(judgements, choices, last, has_failed.tolist(), strict=True):
        accepted = [judgement.drafts[row - 1] for row in choice.path[1:]]
        verdicts.append(Verdict((*accepted, -1 if failed else token), choice.path))
    return verdicts


def _choose(p_RV: Floats, judgement: Judgement) -> Choice:
    drafts, parents = judgement.drafts, judgement.parents
    q_MV = None
    if judgement.draft_q is not None:
        expected = (len(drafts), p_RV.shape[1])
        if tuple(judgement.draft_q.shape) != expected:
            raise ValueError(f"draft_q has shape {list(judgement.draft_q.shape)}; {expected} drafts and tokens are due")
        q_MV = judgement.draft_q.cpu().numpy()
    recipe = judgement.recipe
    accept = _Uniforms(recipe.seed, recipe.sampling.sample_index, judgement.num_output)
    if judgement.mode is VerifyMode.REJECTION:
        return choose_by_token(p_RV, q_MV, drafts, parents, accept, judgement.with_replacement)
    if judgement.mode is not VerifyMode.BLOCK:
        raise ValueError(f"verify is {judgement.mode.value!r}, which compares tokens and does not reject")
    if parents and any(parent != row - 1 for row, parent in enumerate(parents)):
        raise ValueError("a draft tree cannot be verified in block mode; only a chain can")
    return choose_by_block(p_RV, q_MV, drafts, accept)


class _Uniforms:
    """Accept draws of one span, each from a number of its own; the span's output position keeps steps apart."""

    def __init__(self, seed: int, sample_index: int, position: int) -> None:
        self._key, self._count = (seed, sample_index, position, _ACCEPT_STREAM), 0

    def __call__(self, probability: float) -> bool:
        if probability >= 1:
            return True
        if not probability > 0:
            return False
        self._count += 1
        return uniform(*self._key, index=self._count - 1) <= probability


def _probabilities(ops: Ops, logits_JV: Tensor, judgements: Sequence[Judgement]) -> Floats:
    """float32 [J, V]; a greedy sequence's rows are certain of the token that plain greedy decoding takes."""
    p_JV = torch.softmax(logits_JV, dim=1)
    recipes = [one.recipe for one in judgements for _ in range(1 + len(one.drafts))]
    if len(recipes) != logits_JV.shape[0]:
        raise ValueError(f"the spans have {len(recipes)} rows, but {logits_JV.shape[0]} rows of logits are given")
    greedy = [row for row, recipe in enumerate(recipes) if recipe.is_greedy]
    if greedy:
        at = torch.tensor(greedy, device=logits_JV.device)
        best = _draw(ops, logits_JV[at], [recipes[row] for row in greedy], [0] * len(greedy), [True] * len(greedy))
        failed = p_JV[at].isnan().any(dim=1)
        certain = torch.zeros_like(p_JV[at]).scatter_(1, torch.tensor(best, device=at.device).unsqueeze(1), 1.0)
        certain[failed] = float("nan")
        p_JV[at] = certain
    probabilities: Floats = p_JV.cpu().numpy()
    return probabilities


def _draw(
    ops: Ops, logits_NV: Tensor, recipes: Sequence[Recipe], positions: Sequence[int], greedy: Sequence[bool]
) -> list[int]:
    """A token of each row, with the noise of the target's own draws in the rejection modes."""
    device = logits_NV.device
    keys = ([one.seed for one in recipes], [one.sampling.sample_index for one in recipes], positions)
    seeds, indices, at = (torch.tensor(key, dtype=torch.int64, device=device) for key in keys)
    is_greedy = torch.tensor(greedy, dtype=torch.bool, device=device)
    tokens: list[int] = ops.sample(logits_NV, seeds, indices, at, is_greedy, stream=_OWN_STREAM).tolist()
    return tokens
