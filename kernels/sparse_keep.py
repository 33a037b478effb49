"""What a selection keeps of what it has scored: the k best, or the fewest that hold a share of the mass. Plain torch.

The Triton kernels of sparse attention do the same, integer for integer, so their tests compare bits. Both are exact:
scores are float16, mass is counted in units of 2^-30, and no sum depends on its order.
Legend: R rows, K kv heads, U units (keys or pages, then tiles), B most that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASS_ONE = 1 << 30
"""Mass is a probability in these units, rounded down: int32 sums of a softmax stay exact in any order."""


def sortable(scores: Tensor) -> Tensor:
    """float16 as integers 0..65535 of the same order; -0 equals 0, NaN stands at the ends, by its sign."""
    bits = scores.view(torch.int16).int() & 0xFFFF
    bits = bits.masked_fill(bits == 0x8000, 0)
    return torch.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


def to_scores(products: Tensor, scale: float) -> Tensor:
    """q.k as a float16 score. What float16 cannot hold is cut off, and then ties."""
    return (products.float() * scale).clamp(-65504.0, 65504.0).half()


def top_k(scores_RKU: Tensor, counts_R: Tensor, keep_R: Tensor, first_R: Tensor, late_R: Tensor) -> Tensor:
    """Indices of the units that each row keeps for each kv head, ascending, int64 [R, K, max(keep)], -1 behind them.

    scores_RKU  float16; those outside [first, late) are not read and may hold anything
    counts_R    units of the row
    keep_R      how many it keeps, all heads as many; counts_R where that is less
    first_R     units before it are kept, and units from late_R on, within keep_R
    Of equal scores the unit with the lowest index is kept.
    """
    index = torch.arange(scores_RKU.shape[2], device=scores_RKU.device)
    counts, first, late = (part.view(-1, 1, 1) for part in (counts_R, first_R, late_R))
    keep = torch.minimum(keep_R, counts_R).view(-1, 1, 1)
    value = sortable(scores_RKU).masked_fill((index < first) | (index >= late), 1 << 16)
    value = value.masked_fill(index >= counts, -1)
    order = value.sort(dim=2, descending=True, stable=True).indices
    place = torch.arange(int(keep.max()) if len(keep) else 0, device=index.device)
    kept = order[..., : len(place)].masked_fill(place >= keep, scores_RKU.shape[2]).sort(dim=2).values
    return kept.masked_fill(kept == scores_RKU.shape[2], -1)


def physical_ids(page_table_RM: Tensor, indices_RKB: Tensor, num_kv: int, unit: int) -> Tensor:
    """Where logical units lie: (page * K + head) * unit + offset, int32 [R, K, B]; -1 stays.

    unit  1 for pages, the page size for keys. So a pool [P, K, S, D], seen as [P K, 1, S, D] or [P K S, 1, 1, D], has
          one kv head and the list is its page table.
    """
    index = indices_RKB.clamp_min(0).long()
    pages = page_table_RM.long().unsqueeze(1).expand(-1, num_kv, -1).gather(2, index // unit)
    head = torch.arange(num_kv, device=index.device).unsqueeze(1)
    return ((pages * num_kv + head) * unit + index % unit).masked_fill(indices_RKB < 0, -1).int()


def to_mass(probabilities: Tensor) -> Tensor:
    """Probabilities in [0, 1] as int32 in units of 1 / MASS_ONE."""
    return (probabilities.float() * MASS_ONE).floor().int()


def keep_mass(mass_RU: Tensor, counts_R: Tensor, threshold: float) -> Tensor:
    """The fewest of the first `counts` units of each row that hold `threshold` of the mass, bool [R, U].

    mass_RU  int32, of `to_mass`; units from counts_R on are not read
    Units are taken by mass, of equals the lowest index first. A row that never reaches the threshold, by rounding or
    because nothing was scored, keeps all its units (`attention.md` 7, mistake 9).
    """
    index = torch.arange(mass_RU.shape[1], device=mass_RU.device)
    exists = index < counts_R.unsqueeze(1)
    value, order = mass_RU.long().masked_fill(~exists, -1).sort(dim=1, descending=True, stable=True)
    before = value.clamp_min(0).cumsum(1) - value.clamp_min(0)
    target = mass_target(threshold)
    kept = torch.zeros_like(exists).scatter(1, order, before < target)
    return kept & exists


def mass_target(threshold: float) -> int:
    """A share of the mass in its units, rounded up; more than all of it if the share is 1 or more: keep all."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must lie above 0 and at most at 1")
    return MASS_ONE + 1 if threshold == 1 else min(MASS_ONE, int(-(-threshold * MASS_ONE // 1)))
