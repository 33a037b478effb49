"""The GPU report's checks of sparse attention, interpreted: they pass on right kernels and fail on wrong ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.triton.ops import TritonOps
from kernels.triton.sparse import attend, gpu_checks

CPU = torch.device("cpu")


@pytest.mark.slow
def test_right_kernels_pass_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller than on a GPU."""
    monkeypatch.setattr(gpu_checks, "SHAPES", [(3, 1, 32, 4, False)])
    shares = dict(gpu_checks.row_checks(TritonOps(num_programs=3), CPU, (140, 110, 150, 240, 40)))
    shares |= dict(gpu_checks.keep_checks(CPU, 3000))
    shares |= dict(gpu_checks.prefill_checks(CPU, 300))
    shares |= dict(gpu_checks.host_checks(TritonOps(num_programs=3), CPU, 2))
    assert len(shares) == 15 + 7 + 8 + 4
    assert {what: share for what, share in shares.items() if not share <= 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["score_keys", "score_pages", "score_codes", "best_of_pages"])
def test_a_wrong_choice_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are off by one unit."""
    monkeypatch.setattr(gpu_checks, "SHAPES", [(3, 1, 32, 4, wrong == "score_codes")])
    real = getattr(attend, wrong)

    def shifted(*args: object) -> Tensor | None:
        made: Tensor | None = real(*args)
        halves = (part for part in (made, *args) if isinstance(part, Tensor) and part.dtype == torch.float16)
        scores = next(halves)
        scores.copy_(scores.roll(1, dims=2))
        return made

    monkeypatch.setattr(attend, wrong, shifted)
    shares = [share for _, share in gpu_checks.row_checks(TritonOps(num_programs=3), CPU, (140, 110, 150, 240, 40))]
    assert max(shares, default=math.nan) > 1
