"""Which experts a row goes to, and with what weights: the one definition, in plain torch, for every back end.

A handful of numbers per row beside the experts' products, so nothing is gained by compiling it. A row's choice depends
on its own logits alone, bit by bit (rule 1 of kernels/README.md). Legend of shapes in kernels/ops.py; k chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_VECTORS = 64
"""Elements that torch's vector loops take at once, or a multiple of it."""


@dataclass(frozen=True, eq=False)
class Router:
    """How router logits become a choice.

    top_k           experts per row
    norm_topk_prob  the weights of the chosen are scaled to sum to one
    is_sigmoid      scores are sigmoids, each for itself; else a softmax over all E experts
    bias_E          float32, added to the scores for choosing, not for weighing; or None
    num_groups, top_groups  experts lie in `num_groups` equal groups in order; only those of the row's `top_groups` best
                    groups can be chosen, a group counting as the sum of its two best (biased) scores
    scale           factor on the weights
    Source          sigmoid, bias and groups: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.1.2.
    """

    top_k: int
    norm_topk_prob: bool
    is_sigmoid: bool = False
    bias_E: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


def choose_experts(logits_TE: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """(weights float32 [T, k], experts int64 [T, k]), best first."""
    logits_TE = logits_TE.float()
    scores_TE = _sigmoid(logits_TE) if router.is_sigmoid else torch.softmax(logits_TE, dim=-1)
    ranks_TE = scores_TE if router.bias_E is None else scores_TE + router.bias_E
    if router.top_groups < router.num_groups:
        ranks_TE = _best_groups(ranks_TE, router.num_groups, router.top_groups)
    weights_Tk, experts_Tk = ranks_TE.topk(router.top_k, dim=-1)
    if ranks_TE is not scores_TE:
        weights_Tk = scores_TE.gather(1, experts_Tk)
    if router.norm_topk_prob:
        total_T1 = weights_Tk.sum(-1, keepdim=True)
        # Sigmoids may all be next to nothing, a softmax's largest values never.
        weights_Tk = weights_Tk / (total_T1 + 1e-20 if router.is_sigmoid else total_T1)
    return (weights_Tk if router.scale == 1.0 else weights_Tk * router.scale), experts_Tk


def _sigmoid(logits_TE: Tensor) -> Tensor:
    """Rows padded to whole vectors: torch computes what is left over after them with another rounding, and which row
    that hits would depend on how many rows there are."""
    num_experts = logits_TE.shape[1]
    return torch.sigmoid(F.pad(logits_TE, (0, -num_experts % _VECTORS)))[:, :num_experts]


def _best_groups(ranks_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """`ranks_TE` with minus infinity outside each row's best groups."""
    groups_TGX = ranks_TE.view(ranks_TE.shape[0], num_groups, -1)
    best_Tg = groups_TGX.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
    is_out_TG = torch.ones(groups_TGX.shape[:2], dtype=torch.bool, device=ranks_TE.device).scatter_(1, best_Tg, False)
    return groups_TGX.masked_fill(is_out_TG.unsqueeze(2), float("-inf")).flatten(1)
