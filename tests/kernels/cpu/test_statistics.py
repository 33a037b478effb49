"""The compiled row statistics against the plain-torch ones, and a row's own numbers in other company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu.build import best_variant, find_compiler
from kernels.cpu.ops import CpuOps
from kernels.reference import ReferenceOps

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: shows that compiled = reference")


@pytest.fixture(scope="module", params=[best_variant(), "generic"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(num_threads=2, variant=request.param)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocab", [1, 2, 16, 17, 1000, 4099])
def test_row_statistics_equal_the_reference_and_do_not_depend_on_company(ops: CpuOps, vocab: int) -> None:
    logits = random(24, vocab) * torch.logspace(-2, 2, 24)[:, None]
    logits[4:8, 1 : vocab // 2] = float("-inf")
    logits[9, :] = 3.5
    logits[10, :] = float("-inf")
    logits[10, vocab - 1] = -80.0
    logits[11, vocab // 3] = logits[11, vocab - 1] = logits[11].amax() + 1
    ids = torch.arange(24) % vocab
    found, wanted = ops.row_statistics(logits, ids), ReferenceOps().row_statistics(logits, ids)
    assert torch.equal(found.best_id, wanted.best_id)
    for name in ("best", "second", "logit"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("lse", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-6, atol=1e-5)
    alone = ops.row_statistics(logits[7:8], ids[7:8])
    assert all(torch.equal(getattr(alone, name), getattr(found, name)[7:8]) for name in ("best", "lse", "entropy"))


def test_row_statistics_refuse_an_id_that_is_no_token(ops: CpuOps) -> None:
    with pytest.raises(IndexError, match="8 tokens"):
        ops.row_statistics(random(2, 8), torch.tensor([0, 8]))
