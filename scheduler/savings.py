"""What the offers of a step are worth: the measure of whether more are asked for (`asking.py`)."""

from __future__ import annotations

from typing import NamedTuple

from scheduler.goodput import Allocation, Offers, Outlook


class Saving(NamedTuple):
    """Tokens that an offer is expected to bring, and the seconds that they save."""

    tokens: float
    seconds: float


def savings(
    offers: Offers, allocation: Allocation, outlook: Outlook, token_s: float, row_s: float, share_s: float
) -> list[Saving]:
    """What each offer is worth to its step where all that are like it draft.

    A draft saves the time that its token would take by plain decoding, less its own row. Of what verifying costs once
    a step each offer bears a share: one that waits alone, in a crowd that is not asked, would seem worthless where all
    of them would pay many times over. Where a step has no room for all drafts that are worth their rows, those count
    that the allocation found room for.

    token_s  seconds of a plain step for each token that it brings; row_s  seconds that one draft more takes; share_s
    seconds that an offer bears
    """
    lengths = [sum(survival * token_s > row_s for survival in offer) for offer in offers]
    count, prefill = sum(lengths), allocation.prefill
    bound_s = outlook.draft_bound_s if prefill <= outlook.fewest else min(outlook.draft_bound_s, outlook.bound_s)
    if count + prefill > outlook.room or (count and outlook.seconds(count, prefill) > bound_s):
        lengths = allocation.lengths
    tokens = [sum(offer[:length]) for offer, length in zip(offers, lengths, strict=True)]
    return [
        Saving(expected, max(0.0, expected * token_s - length * row_s - share_s))
        for expected, length in zip(tokens, lengths, strict=True)
    ]
