"""How much of the attention that a budget could hold labels of few channels find, on data like a model's.

Synthetic, as `attention.md` 4.1 states it: the energy of a channel falls as 1 / rank, in queries and keys alike, in
another order in each kv head; scores have a deviation of 3. Mass recall = sum of p over the kept keys / over the best.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.sparse import FIRST_KEYS, LAST_KEYS
from kernels.sparse_keep import to_scores, top_k

NUM_KEYS, HEAD_DIM, GROUP, NUM_KV, NUM_ROWS = 4096, 128, 4, 2, 6
BUDGET = NUM_KEYS // 16


def world() -> tuple[Tensor, Tensor, Tensor]:
    """q [R, K, G, D], keys [K, N, D], the channels of each kv head by falling energy [K, D]."""
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(HEAD_DIM, generator=generator) for _ in range(NUM_KV)])
    energy = torch.empty(NUM_KV, HEAD_DIM).scatter_(1, order, (1 / torch.arange(1, HEAD_DIM + 1)).expand(NUM_KV, -1))
    q = torch.randn(NUM_ROWS, NUM_KV, GROUP, HEAD_DIM, generator=generator) * energy.sqrt().unsqueeze(1)
    keys = torch.randn(NUM_KV, NUM_KEYS, HEAD_DIM, generator=generator) * energy.sqrt().unsqueeze(1)
    spread = (torch.einsum("rkgd,knd->rkgn", q, keys)).std()
    return q * (3 / spread), keys, order


def mass_recall(scores_RKN: Tensor, q: Tensor, keys: Tensor) -> float:
    """Mean over rows and heads; the oracle keeps the keys with the highest q.k of any head of the group."""
    probabilities = torch.einsum("rkgd,knd->rkgn", q, keys).softmax(3)
    counts, keep, first, late = (
        torch.full((NUM_ROWS,), number) for number in (NUM_KEYS, BUDGET, FIRST_KEYS, NUM_KEYS - LAST_KEYS)
    )
    exact = to_scores(torch.einsum("rkgd,knd->rkgn", q, keys).amax(2), 1.0)
    held = []
    for scores in (scores_RKN, exact):
        index = top_k(scores, counts, keep, first, late)
        held.append(probabilities.gather(3, index.unsqueeze(2).expand(-1, -1, GROUP, -1)).sum(3))
    return float((held[0] / held[1]).mean())


@pytest.mark.parametrize(("num_channels", "least"), [(HEAD_DIM, 1.0), (HEAD_DIM // 8, 0.95)])
def test_labels_of_the_strongest_channels_hold_the_mass(num_channels: int, least: float) -> None:
    q, keys, order = world()
    channels = order[:, :num_channels]
    of_q = q.gather(3, channels[None, :, None].expand(NUM_ROWS, -1, GROUP, -1))
    of_keys = keys.gather(2, channels.unsqueeze(1).expand(-1, NUM_KEYS, -1))
    found = mass_recall(to_scores(torch.einsum("rkgc,knc->rkgn", of_q, of_keys).amax(2), 1.0), q, keys)
    assert found >= least - 1e-6


def test_channels_in_no_order_hold_less() -> None:
    """The data is not so easy that any channels would do."""
    q, keys, order = world()
    channels = order[:, -(HEAD_DIM // 8) :]
    of_q = q.gather(3, channels[None, :, None].expand(NUM_ROWS, -1, GROUP, -1))
    of_keys = keys.gather(2, channels.unsqueeze(1).expand(-1, NUM_KEYS, -1))
    assert mass_recall(to_scores(torch.einsum("rkgc,knc->rkgn", of_q, of_keys).amax(2), 1.0), q, keys) < 0.9
