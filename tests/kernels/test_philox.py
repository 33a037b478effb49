"""The host's noise is the kernels' noise; and with 23-bit uniforms no draw is ever infinite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.philox import gumbel, uniform
from kernels.reference import ReferenceOps, gumbel_noise

KEYS = [(0, 0, 0, 0), (2**63 - 1, 3, 17, 1), (-(2**63), 0, 2**31, 2), (-1, 2**32 - 1, 2**32 - 1, 2**32 - 1)]


@pytest.fixture(params=["reference", "compiled"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return back_end(request.param)


def back_end(name: str) -> Ops:
    if name == "reference":
        return ReferenceOps()
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that the compiled kernels draw the same noise")
    return CpuOps(num_threads=2)


@pytest.mark.parametrize("key", KEYS)
def test_the_host_draws_the_same_integers_as_the_reference(key: tuple[int, int, int, int]) -> None:
    seed, sample_index, position, stream = key
    noise = gumbel_noise(
        1003, torch.tensor([seed]), torch.tensor([sample_index]), torch.tensor([position]), stream=stream
    )
    want = noise[0].numpy()
    got = gumbel(seed, sample_index, position, np.arange(1003), stream)
    assert got.dtype == np.float32
    # Equal integers give equal uniforms; torch and numpy may round the second logarithm differently by one step.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    assert np.array_equal(gumbel(seed, sample_index, position, np.arange(20, dtype=np.uint32), stream), got[:20])
    scattered = np.array([[1002, 5], [0, 777]], dtype=np.int32)
    assert np.array_equal(gumbel(seed, sample_index, position, scattered, stream), got[scattered])
    for index in (0, 1, 2, 3, 4, 1002):
        u = uniform(seed, sample_index, position, stream, index)
        assert got[index] == np.float32(-math.log(-math.log(u)))


def test_an_unsigned_seed_is_the_signed_one_with_the_same_bits() -> None:
    assert uniform(2**64 - 5, 1, 2, 3) == uniform(-5, 1, 2, 3)


def test_every_kernel_takes_the_token_of_the_hosts_noise_in_every_stream(ops: Ops) -> None:
    rows, vocab = 24, 500
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(rows, vocab, generator=generator)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    sample_index, positions = torch.arange(rows) % 3, torch.arange(rows) * 5
    greedy = torch.arange(rows) % 8 == 0
    seen = []
    for stream in (0, 1, 2, 70):
        got = ops.sample(logits, seeds, sample_index, positions, greedy, stream=stream)
        for row in range(rows):
            score = logits[row].numpy().astype(np.float64)
            if not greedy[row]:
                score = score + gumbel(
                    int(seeds[row]), int(sample_index[row]), int(positions[row]), np.arange(vocab), stream
                )
            # The kernel's logarithms are float32: nothing but near ties may fall the other way.
            assert score.max() - score[got[row]] < 1e-5
        seen.append(got)
    assert torch.equal(ops.sample(logits, seeds, sample_index, positions, greedy), seen[0])
    assert all((seen[0] != other).sum() > rows // 2 for other in seen[1:])


@pytest.mark.parametrize(
    "num_rows", [pytest.param(2_048), pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["sample", "full"]
)
def test_a_certain_token_wins_every_row_of_a_large_vocabulary(num_rows: int) -> None:
    """With 24-bit uniforms the top value rounds to 1 in float32, its Gumbel is infinite, and 1 row in 128 is random.

    The other tokens lie 45 nats below: the largest Gumbel is 16.6, the smallest -2.9.
    """
    ops, vocab, part = back_end("compiled"), 131_072, 512
    logits = torch.full((part, vocab), -45.0)
    logits[:, 77_777] = 0.0
    zeros, seeds = torch.zeros(part, dtype=torch.int64), torch.arange(part)
    for first in range(0, num_rows, part):
        got = ops.sample(logits, seeds, zeros, zeros + first // part, zeros.bool())
        assert (got == 77_777).all()


@pytest.mark.parametrize(
    ("position", "token", "noise"),
    [pytest.param(26, 138, 16.635532, id="largest"), pytest.param(9, 81_087, -2.811541, id="smallest")],
)
def test_the_extreme_uniforms_give_the_extreme_finite_noise(ops: Ops, position: int, token: int, noise: float) -> None:
    """Seed 1 draws 1 - 2^-24 and 2^-24 here, the ends of the range (found by search)."""
    rival = token - 7
    assert uniform(1, 0, position, 0, token) == (1 - 2**-24 if noise > 0 else 2**-24)
    assert gumbel(1, 0, position, np.array([token]))[0] == pytest.approx(noise, abs=1e-5)
    logits = torch.full((3, token + 9), float("-inf"))
    logits[:, token] = 0.0
    # A rival just below, just above, and none: where the noise were infinite, one of the three would go wrong.
    behind = noise - float(gumbel(1, 0, position, np.array([rival]))[0])
    logits[0, rival], logits[1, rival] = behind - 1e-3, behind + 1e-3
    zeros = torch.zeros(3, dtype=torch.int64)
    got = ops.sample(logits, zeros + 1, zeros, zeros + position, zeros.bool())
    assert got.tolist() == [token, rival, token]
