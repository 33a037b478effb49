"""Block planners as integers: which part of a block may be fixed in a step, and how many of its masks.

Pure functions of the block as it stands. `adablock`'s window also depends on what the worker reported, and is kept by
the block (block.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.types import Choice


def plan_window(
    planner: Choice, tokens: Sequence[int], mask_id: int, first: int, end: int, origin: int
) -> tuple[int, int]:
    """Offsets [first, end) into `tokens` that may be fixed, with at least one mask among them.

    first, end   the part of `tokens` that is open at all; it has masks
    origin       offset of the first token that was a mask at the block's start (DSB counts from there)
    Source       Fast-dLLM v2 (sub_blocks), DSB, Elastic-Cache (masks); diffusion reference, section 5. Departure: in a
                 block-causal model within one block, which is never left before it is full.
    """
    if planner.name in ("fixed", "adablock"):
        return first, end
    masks = [offset for offset in range(first, end) if tokens[offset] == mask_id]
    if planner.name == "sub_blocks":
        size = int(planner["sub_block"])
        start = masks[0] // size * size
        return max(first, start), min(start + size, end)
    if planner.name == "dsb":
        num_fixed = end - origin - len([offset for offset in range(origin, end) if tokens[offset] == mask_id])
        right = origin + int(planner["first"]) + num_fixed
        most = int(planner["most"])
        if most:
            right = min(right, masks[0] + most)
        return masks[0], min(right, end)
    if planner.name == "masks":
        return masks[0], masks[: int(planner["width"])][-1] + 1
    raise ValueError(f"planner is {planner.name}, which has no window here")


def quota(num_masks: int, num_steps: int, step: int) -> int:
    """Masks that step number `step` of a block fixes where `num_masks` are spread over `num_steps`; at least 1.

    Source: LLaDA's get_num_transfer_tokens (diffusion reference 2.2); past the last step 1 each.
    """
    if step >= num_steps:
        return 1
    return max(1, num_masks // num_steps + (step < num_masks % num_steps))
