"""The rules of speculative sampling by rejection: which drafts stand, and from what distribution the next token comes.

A rule gets the target's distribution p at every row of a span and what the drafts were drawn from, asks for yes-or-no
draws and ends with weights for the token after the last accepted draft. Averaged over the drafts, the text then follows
p exactly. The rules only decide: the same lines run on float32 rows here and under exact enumeration in the tests.

What a caller must not do (speculative reference, 2.5). These rules are exact only if
- each draft really was drawn from the q it is verified with, with noise that nothing else has used; a draft that was
  not drawn at all (looked up, or the best of q) goes without q. A drawn one may go without, too: then all of this does
  not apply to it, and it is accepted less often;
- whether a draft is submitted was decided without looking at which token it is: by anything known before it was drawn,
  or by the shape of its q, but never by q(draft), nor by a grammar that forbids it (p is 0 there and the rule copes);
- siblings come in the order in which they were drawn.
Coupled verification (verification.py) has none of these duties.

Sources: Leviathan et al. (2023) and Chen et al. (2023) for chains; Sun et al., "Block Verification Accelerates
Speculative Decoding" (2024); Miao et al., "SpecInfer" (2024) for siblings with replacement; Jeon et al., "Recursive
Speculative Decoding" (2024) for siblings without. Departure: where a residual vanishes numerically, p takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Accept = Callable[[float], bool]
"""Says yes with the given probability, independently each time; outside [0, 1] means the nearer end, NaN means no."""

NO_RESIDUAL = 1e-12
"""A residual with no more mass than this is rounding: p and q are the same."""


class Choice(NamedTuple):
    """path: row 0 and the accepted drafts' rows. weights: [V], in proportion to which the next token is drawn."""

    path: tuple[int, ...]
    weights: Floats


def choose_by_token(
    p_RV: Floats,
    q_MV: Floats | None,
    drafts: Sequence[int],
    parents: Sequence[int],
    accept: Accept,
    with_replacement: bool = False,
) -> Choice:
    """Walk from the root: at each node offer the children one by one; the first that is accepted is the next node.

    p_RV     target distributions, a row per node (the root and M drafts); rows that cannot be reached may be anything
    q_MV     for each draft the distribution at its parent from which it was drawn, siblings included; None = the drafts
             were not drawn: each is verified as if q were certain of it
    drafts   tokens of rows 1, 2, ...; ids outside the vocabulary are never accepted
    parents  `Span.parents`, with an entry for the root; () = a chain
    with_replacement  whether siblings were drawn independently, or each among what the earlier ones left
    """
    children: list[list[int]] = [[] for _ in range(len(drafts) + 1)]
    for row in range(1, len(drafts) + 1):
        children[parents[row] if parents else row - 1].append(row)
    path = [0]
    while True:
        target, source, accepted = p_RV[path[-1]], None, None
        for row in children[path[-1]]:
            draft = drafts[row - 1]
            if not 0 <= draft < len(target):
                continue
            if q_MV is None:
                likelihood_ratio = float(target[draft])
            else:
                source = q_MV[row - 1] if source is None else source
                if not source[draft] > 0:
                    continue  # q cannot have given it: as if it had not been offered
                likelihood_ratio = float(target[draft]) / float(source[draft])
            if accept(likelihood_ratio):
                accepted = row
                break
            target = _residual(target, source, draft, 1.0)
            if source is not None and not with_replacement:
                source = _without(source, draft)
        if accepted is None:
            return Choice(tuple(path), target)
        path.append(accepted)


def choose_by_block(p_RV: Floats, q_MV: Floats | None, drafts: Sequence[int], accept: Accept) -> Choice:
    """Judge a chain as a whole: of all prefixes that pass, the longest stands. At least as many as token by token.

    p_RV, q_MV as in `choose_by_token`. With u_j uniform, tau is the largest j with u_j <= h_j, where
    c_j = min(1, c_{j-1} p_{j-1}(d_j) / q_j(d_j)), h_j = m_j / (m_j + 1 - c_j), m_j = sum max(c_j p_j - q_{j+1}, 0),
    and h_k = c_k for the last. The next token comes from max(c_tau p_tau - q_{tau+1}, 0), or p_k after all k.
    """
    weight, tau, tau_weight = 1.0, 0, 1.0
    for row, draft in enumerate(drafts, start=1):
        if not 0 <= draft < p_RV.shape[1]:
            break
        drawn_with = 1.0 if q_MV is None else float(q_MV[row - 1][draft])
        likelihood_ratio = float(p_RV[row - 1][draft]) / drawn_with if drawn_with > 0 else 0.0
        if not likelihood_ratio > 0:
            break  # its weight and all later ones are 0
        weight = min(1.0, weight * likelihood_ratio)
        if row == len(drafts):
            passes = weight
        else:
            left = float(_excess(p_RV[row], None if q_MV is None else q_MV[row], drafts[row], weight).sum())
            passes = left / (left + 1 - weight) if weight < 1 or left > 0 else 1.0
        if accept(passes):
            tau, tau_weight = row, weight
    path = tuple(range(tau + 1))
    if tau == len(drafts):
        return Choice(path, p_RV[tau])
    return Choice(path, _residual(p_RV[tau], None if q_MV is None else q_MV[tau], drafts[tau], tau_weight))


def _excess(p_V: Floats, q_V: Floats | None, draft: int, weight: float) -> Floats:
    """max(weight p - q, 0); without q, q is 1 at the draft, which weight p never exceeds."""
    excess = p_V * p_V.dtype.type(weight)
    if q_V is None:
        if 0 <= draft < len(excess):
            excess[draft] = 0
        return excess
    return np.maximum(excess - q_V, 0)


def _residual(p_V: Floats, q_V: Floats | None, draft: int, weight: float) -> Floats:
    excess = _excess(p_V, q_V, draft, weight)
    total = excess.sum()
    return p_V if total <= NO_RESIDUAL else excess / total


def _without(q_V: Floats, token: int) -> Floats:
    rest = q_V.copy()
    rest[token] = 0
    total = rest.sum()
    return rest / total if total > 0 else rest
