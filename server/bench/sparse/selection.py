"""Which keys a row keeps by some scores, and how much of its attention they have. The rule is `kernels.sparse`'s.

Legend: K kv heads, G query heads of each, D head_dim, L keys that the row sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sparse import FIRST_KEYS, LAST_KEYS


def grouped(q_QD: Tensor, num_kv: int) -> Tensor:
    """[Q, D] -> [K, G, D]."""
    return q_QD.view(num_kv, -1, q_QD.shape[1])


def exact_scores(q_KGD: Tensor, k_LKD: Tensor) -> Tensor:
    """The highest q.k of a group's heads, [K, L]."""
    return torch.einsum("kgd,lkd->kgl", q_KGD, k_LKD).amax(1)


def label_scores(q_KGD: Tensor, k_LKD: Tensor, channels_KC: Tensor) -> Tensor:
    """The same over some channels of each kv head (int64 [K, C]): [K, L]."""
    q_KGC = q_KGD.gather(2, channels_KC.unsqueeze(1).expand(-1, q_KGD.shape[1], -1))
    k_LKC = k_LKD.gather(2, channels_KC.expand(k_LKD.shape[0], -1, -1))
    return torch.einsum("kgc,lkc->kgl", q_KGC, k_LKC).amax(1)


def keep(scores_KL: Tensor, budget: int) -> Tensor:
    """bool [K, L]: the first `FIRST_KEYS`, the last `LAST_KEYS` and the highest scores of the others, `budget` in all.

    Equals: the lowest key first. A budget of L or more keeps everything.
    Raises ValueError if the budget leaves nothing to choose.
    """
    num_keys = scores_KL.shape[1]
    if budget >= num_keys:
        return torch.ones_like(scores_KL, dtype=torch.bool)
    if budget <= FIRST_KEYS + LAST_KEYS:
        raise ValueError(f"budget is {budget} keys, but {FIRST_KEYS + LAST_KEYS} are always kept; it must be above")
    kept = torch.zeros_like(scores_KL, dtype=torch.bool)
    kept[:, :FIRST_KEYS] = kept[:, num_keys - LAST_KEYS :] = True
    middle_KM = scores_KL[:, FIRST_KEYS : num_keys - LAST_KEYS]
    best = middle_KM.sort(dim=1, descending=True, stable=True).indices[:, : budget - FIRST_KEYS - LAST_KEYS]
    return kept.scatter(1, FIRST_KEYS + best, True)


def probabilities(q_KGD: Tensor, k_LKD: Tensor, scale: float) -> Tensor:
    """softmax(scale q.k) over the keys, [K, G, L]."""
    return torch.softmax(torch.einsum("kgd,lkd->kgl", q_KGD, k_LKD) * scale, dim=2)


def mass(p_KGL: Tensor, kept_KL: Tensor) -> Tensor:
    """The share of attention that falls on kept keys, of a kv head the mean over its group: [K]."""
    return (p_KGL * kept_KL.unsqueeze(1)).sum(2).mean(1)
