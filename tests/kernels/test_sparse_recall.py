"""How much of the attention that a budget could hold labels of few channels find, on data like a model's.

Synthetic, as `attention.md` 4.1 states it: the energy of a channel falls as 1 / rank, in queries and keys alike, in
another order in each kv head; scores have a deviation of 3. Mass recall = the mass of the keys that labels choose / of
those that exact scores choose by the same rule, summed over rows and heads. With one query head per kv head the latter
are the keys of most mass; in a group the rule, the highest score of any head, favours heads with large scores.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.label_codes import decode, encode
from kernels.sparse import FIRST_KEYS, LAST_KEYS
from kernels.sparse_keep import to_scores, top_k

NUM_KEYS, HEAD_DIM, NUM_KV, NUM_ROWS = 4096, 128, 2, 6
BUDGET = NUM_KEYS // 16


def world(group: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [R, K, G, D], keys [K, N, D], the channels of each kv head by falling energy [K, D]."""
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(HEAD_DIM, generator=generator) for _ in range(NUM_KV)])
    energy = torch.empty(NUM_KV, HEAD_DIM).scatter_(1, order, (1 / torch.arange(1, HEAD_DIM + 1)).expand(NUM_KV, -1))
    q = torch.randn(NUM_ROWS, NUM_KV, group, HEAD_DIM, generator=generator) * energy.sqrt().unsqueeze(1)
    keys = torch.randn(NUM_KV, NUM_KEYS, HEAD_DIM, generator=generator) * energy.sqrt().unsqueeze(1)
    return q * (3 / torch.einsum("rkgd,knd->rkgn", q, keys).std()), keys, order


def held_mass(q: Tensor, keys: Tensor, channels: Tensor, int4_labels: bool = False) -> float:
    """Attention mass of the keys chosen by these channels, summed over rows and heads."""
    of_q = q.gather(3, channels[None, :, None].expand(len(q), -1, q.shape[2], -1))
    of_keys = keys.gather(2, channels.unsqueeze(1).expand(-1, NUM_KEYS, -1))
    if int4_labels:
        codes, scales = encode(of_keys)
        of_keys = decode(codes, channels.shape[1]) * scales.float().unsqueeze(2)
    scores = to_scores(torch.einsum("rkgc,knc->rkgn", of_q, of_keys).amax(2), 1.0)
    counts, keep, first, late = (
        torch.full((NUM_ROWS,), number) for number in (NUM_KEYS, BUDGET, FIRST_KEYS, NUM_KEYS - LAST_KEYS)
    )
    mass = torch.einsum("rkgd,knd->rkgn", q, keys).softmax(3).sum(2)
    return float(mass.gather(2, top_k(scores, counts, keep, first, late)).sum())


@pytest.mark.parametrize("group", [1, 4])
def test_labels_of_an_eighth_of_the_channels_hold_the_mass(group: int) -> None:
    q, keys, order = world(group)
    exact = held_mass(q, keys, order)
    assert held_mass(q, keys, order[:, : HEAD_DIM // 8]) >= 0.95 * exact
    assert held_mass(q, keys, order[:, : HEAD_DIM // 8], int4_labels=True) >= 0.95 * exact
    assert held_mass(q, keys, order[:, -HEAD_DIM // 8 :]) < 0.5 * exact, "nor is it so easy that any channels would do"


def test_exact_scores_of_single_heads_choose_the_keys_of_most_mass() -> None:
    q, keys, order = world(1)
    mass = torch.einsum("rkgd,knd->rkgn", q, keys).softmax(3).sum(2)
    always = mass[..., :FIRST_KEYS].sum() + mass[..., -LAST_KEYS:].sum()
    best = mass[..., FIRST_KEYS:-LAST_KEYS].topk(BUDGET - FIRST_KEYS - LAST_KEYS).values.sum() + always
    assert held_mass(q, keys, order) >= 0.9999 * float(best)
