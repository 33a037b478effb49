"""The GPU report's checks, run interpreted: they pass on right kernels and fail on wrong ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kernels.triton import gpu_checks
from kernels.triton.gpu_checks import Span, attention_checks, make_world, repeat_checks, twin_checks, worst_error
from kernels.triton.ops import TritonOps

CPU = torch.device("cpu")


def test_right_kernels_pass_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A selection: on a GPU all run."""
    monkeypatch.setattr(gpu_checks, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(gpu_checks, "SHAPES", [(2, 1, 128, 64, None), (3, 1, 80, 32, 37)])
    ops = TritonOps(num_programs=3)
    shares = dict(attention_checks(ops, CPU, gpu_checks.SMALL))
    monkeypatch.setattr(gpu_checks, "DTYPES", (torch.bfloat16, torch.float16, torch.float32))
    shares |= dict(twin_checks(ops, CPU, 900))
    assert len(shares) == 2 + 3 * 6 + 6 + 3
    assert {what: share for what, share in shares.items() if not share <= 1} == {}
    assert [differing for _, differing in repeat_checks(ops, CPU, [Span(70, 1), Span(9, 9)], 1, 1)] == [0, 0, 0]


@pytest.mark.parametrize("wrong", ["visible", "tree", "positions"])
def test_wrong_masks_are_seen(wrong: str) -> None:
    world = make_world(gpu_checks.SMALL, 2, 1, 16, 16, torch.float32, CPU)
    rows = world.rows
    assert rows.tree is not None
    changes: dict[str, dict[str, Any]] = {
        "visible": {"visible": (rows.visible - 1).clamp_min(1)},
        "tree": {"tree": rows.tree & ~1 | (rows.tree >> 1 & 1)},
        "positions": {"positions": rows.positions + 1},
    }
    window = 9 if wrong == "positions" else None
    ops = TritonOps(num_programs=2)
    for change, is_right in (({}, True), (changes[wrong], False)):
        changed = dataclasses.replace(rows, **change)
        out = ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, changed, 0.25, window)
        assert (worst_error(world, out, 0.25, window) <= 1) == is_right
