"""Each kernel around attention in the interpreter against its plain-torch twin, and whole layers of them together."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kernels import philox
from kernels.blocks import AttentionBlock, DenseLayers, MlpBlock, composed_dense_layers
from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps
from kernels.triton import sample, statistics
from kernels.triton.norm import add_rms_norm
from kernels.triton.ops import TritonOps
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_trees import Piece, World
from tests.kernels.triton.worlds import poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TWIN = ReferenceOps()


@pytest.fixture(scope="module")
def ops() -> TritonOps:
    return TritonOps(num_programs=3)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_twins(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Both compute in float32 and round once (the interpreter cuts bfloat16 off, one unit of 2^-7)."""
    unit = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=scale * unit, atol=scale * unit / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 16, 96, 1000])
def test_norms(ops: TritonOps, size: int, dtype: torch.dtype) -> None:
    x, change, weight = random(5, size, dtype=dtype), random(5, size, dtype=dtype, seed=1), random(size, dtype=dtype)
    with poisoned():
        normed = ops.rms_norm(x, weight, 1e-5)
        both, total = add_rms_norm(change, x, weight, 1e-5)
        heads = ops.rms_norm(x.view(5, 1, size), weight, 1e-5)
    assert_twins(normed, TWIN.rms_norm(x, weight, 1e-5), dtype)
    assert_twins(total, x + change, dtype)
    assert_twins(both, TWIN.rms_norm(total, weight, 1e-5), dtype)
    assert torch.equal(heads.flatten(1), normed)


def test_a_norm_of_a_column_slice_and_of_nothing(ops: TritonOps) -> None:
    x, weight = random(5, 40)[:, 3:19], random(16)
    assert_twins(ops.rms_norm(x, weight, 1e-5), TWIN.rms_norm(x, weight, 1e-5), torch.float32)
    assert ops.rms_norm(x[:0], weight, 1e-5).shape == (0, 16)
    assert ops.silu_mul(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 96, 1030])
def test_silu_mul(ops: TritonOps, width: int, dtype: torch.dtype) -> None:
    x = random(3, 2 * width, dtype=dtype) * 4
    with poisoned():
        actual = ops.silu_mul(x)
    assert_twins(actual, TWIN.silu_mul(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary"), [(16, 16), (80, 80), (24, 8), (96, 48)])
@pytest.mark.parametrize("norms", ["none", "both", "q", "k"])
def test_rope_and_kv_write(ops: TritonOps, norms: str, head_dim: int, rotary: int, dtype: torch.dtype) -> None:
    num_q, num_kv, page = 5, 2, 7
    rows = AttentionRows(
        torch.zeros(1, 1).int(), torch.zeros(3).int(), torch.tensor([9, 0, 4]).int(), torch.ones(3).int(),
        torch.tensor([20, 0, 7]), torch.tensor([0, 3]).int(),
    )  # fmt: skip
    qkv = random(3, (num_q + 2 * num_kv) * head_dim, dtype=dtype)
    angles = random(10, rotary // 2)
    table = torch.cat((angles.cos(), angles.sin()), 1)
    weights = [
        random(head_dim, dtype=dtype, seed=i) if norms in ("both", kind) else None for i, kind in enumerate("qk")
    ]
    results = []
    for back_end in (ops, TWIN):
        k, v = (torch.full((3, num_kv, page, head_dim), math.nan, dtype=dtype) for _ in range(2))
        with poisoned():
            args = (qkv, num_q, num_kv, head_dim, table, weights[0], weights[1], 1e-6, k, v, rows)
            q = ops.qkv_rope_write(*args) if back_end is ops else torch.empty_like(TWIN.qkv_rope_write(*args))
        results.append((TWIN.qkv_rope_write(*args) if back_end is TWIN else q, k, v))
    for actual, expected, what in zip(*results, ("q", "k", "v"), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: nothing else is written"
        # A normed value is rounded before it turns, and turns with another: two units.
        assert_twins(actual.nan_to_num(), expected.nan_to_num(), dtype, 4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 1003, 5000])
def test_row_statistics(ops: TritonOps, vocab: int, dtype: torch.dtype) -> None:
    logits = (random(4, vocab) * 3).to(dtype)
    ids = torch.tensor([0, vocab // 2, vocab - 1, 0])
    logits[1, vocab // 2 + 1 :] = -math.inf
    logits[2, :-1] = -math.inf  # one id is left
    logits[3, vocab // 3] = logits[3, -1] = 30.0  # of equals, the lowest
    with poisoned():
        actual = ops.row_statistics(logits, ids)
    expected = TWIN.row_statistics(logits, ids)
    for field in dataclasses.fields(expected):
        got, want = getattr(actual, field.name), getattr(expected, field.name)
        assert got.dtype == want.dtype
        exact = field.name in ("best_id", "best", "second", "logit")
        torch.testing.assert_close(got, want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5, msg=field.name)


def test_statistics_are_the_definitions() -> None:
    """The twin itself, written out: probabilities in float64."""
    logits = random(3, 50).double() * 2
    p = logits.softmax(-1)
    found = TWIN.row_statistics(logits.float(), torch.tensor([3, 1, 4]))
    torch.testing.assert_close(found.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((found.best - found.lse).exp().double(), p.amax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.second.double(), logits.sort(-1).values[:, -2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 7, 1003, 3000])
def test_draws_are_those_of_the_reference(ops: TritonOps, vocab: int) -> None:
    logits = random(4, vocab) * 2
    logits[1, : vocab - 1] = -math.inf
    logits[3, 2 % vocab] = logits[3, vocab // 2] = 9.0
    seeds = torch.tensor([-(1 << 62) + 5, 3, 77, 1])
    index, positions = torch.tensor([0, (5 << 16) + 1, 2, 3]), torch.tensor([0, 1, 4000, 7])
    greedy = torch.tensor([False, False, False, True])
    for stream in (0, 1, 0xFFFFFFFF):
        with poisoned():
            actual = ops.sample(logits, seeds, index, positions, greedy, stream)
        assert torch.equal(actual, TWIN.sample(logits, seeds, index, positions, greedy, stream))
    assert actual[3] == min(2 % vocab, vocab // 2)


def test_each_word_of_noise_is_the_hosts(ops: TritonOps) -> None:
    """Row v's logits are the host's noise negated, and 1e-5 more at v: only if all words agree does v win in row v."""
    vocab, seed, position = 23, 987654321, 5
    noise = torch.from_numpy(philox.gumbel(seed, 2, position, torch.arange(vocab).numpy(), 9))
    level = -noise.expand(vocab, -1) + torch.eye(vocab) * 1e-5  # all sums are 0 but the row's own token's
    seeds, index, positions = (torch.full((vocab,), value) for value in (seed, 2, position))
    drawn = ops.sample(level.contiguous(), seeds, index, positions, torch.zeros(vocab, dtype=torch.bool), 9)
    assert torch.equal(drawn, torch.arange(vocab))


def test_programs_that_walk_several_blocks_keep_the_best_of_all(
    ops: TritonOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with vocabularies of more than 16,384 ids: the best of an earlier block, of a later one, and equal ones."""
    monkeypatch.setattr(statistics, "_BLOCK", 64)
    monkeypatch.setattr(statistics, "_MAX_SPLITS", 2)
    monkeypatch.setattr(sample, "_QUADS", 16)
    monkeypatch.setattr(sample, "_MAX_SPLITS", 2)
    logits = random(4, 400)
    for row, pair in enumerate([(3, 70), (70, 3), (390, 250), (199, 201)]):
        logits[row, list(pair)] = torch.tensor([9.0, 8.0 + row // 3])
    ids = torch.arange(4)
    actual, expected = ops.row_statistics(logits, ids), TWIN.row_statistics(logits, ids)
    assert torch.equal(actual.best_id, torch.tensor([3, 70, 390, 199]))
    assert torch.equal(actual.second, expected.second)
    torch.testing.assert_close(actual.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    for greedy in (ids < 0, ids >= 0):
        drawn = ops.sample(logits / 4, ids, ids, ids, greedy, 5)
        assert torch.equal(drawn, TWIN.sample(logits / 4, ids, ids, ids, greedy, 5))


def test_draws_of_other_dtypes_are_refused(ops: TritonOps) -> None:
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(TypeError, match="sampling takes float32"):
        ops.sample(torch.ones(1, 4).half(), one, one, one, one == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_are_made_in_order(ops: TritonOps, dtype: torch.dtype) -> None:
    for sources, targets in [([4, 9, 10, 12], [3, 4, 9, 10]), ([5, 5, 6], [6, 7, 5]), ([], [])]:
        k, v = random(3, 2, 5, 12, dtype=dtype), random(3, 2, 5, 12, dtype=dtype, seed=1)
        twins = k.clone(), v.clone()
        moves = torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
        ops.move_kv(k, v, *moves)
        TWIN.move_kv(*twins, *moves)
        assert torch.equal(k, twins[0])
        assert torch.equal(v, twins[1])
    with pytest.raises(ValueError, match="1 slots cannot move to 2"):
        ops.move_kv(k, v, moves[0].new_zeros(1), moves[0].new_zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_layers_equal_their_composition(ops: TritonOps, dtype: torch.dtype) -> None:
    """Residuals are added in the next norm; the definition adds them in the products."""
    shape = Shape(4, 2, 16, 16, dtype)
    hidden, middle = 32, 48
    q_size, width = shape.num_q * shape.head_dim, (shape.num_q + 2 * shape.num_kv) * shape.head_dim
    angles = random(64, shape.head_dim // 2)
    table = torch.cat((angles.cos(), angles.sin()), 1)

    def weight(*size: int, seed: int) -> Tensor:
        return random(*size, dtype=dtype, seed=seed) * float(size[-1] ** -0.5)

    def layers(back_end: ReferenceOps | TritonOps) -> DenseLayers:
        pack = back_end.pack_linear
        return DenseLayers(tuple(
            (
                AttentionBlock(
                    random(hidden, dtype=dtype, seed=n), pack(weight(width, hidden, seed=n + 1)),
                    pack(weight(hidden, q_size, seed=n + 2)), random(16, dtype=dtype, seed=n + 3), None,
                    shape.num_q, shape.num_kv, shape.head_dim, table, 1e-5, 0.25, window,
                ),
                MlpBlock(
                    random(hidden, dtype=dtype, seed=n + 4), pack(weight(2 * middle, hidden, seed=n + 5)),
                    pack(weight(hidden, middle, seed=n + 6)), 1e-5,
                ),
            )
            for n, window in ((10, None), (20, 5))
        ))  # fmt: skip

    results = []
    for back_end in (ops, TWIN):
        world = World(back_end, shape, [Piece(0, 20), Piece(0, 7), Piece(0, 1)])
        rows = world.rows([0, 1, 2])
        kv = [back_end.allocate_kv(8, 16, 2, 16, dtype, torch.device("cpu")) for _ in range(2)]
        for pages in kv:
            pages[0].fill_(math.nan)
            pages[1].fill_(math.nan)
        x = random(28, hidden, dtype=dtype)
        run = layers(back_end)
        results.append(back_end.dense_layers(x, run, kv, rows))
        if back_end is TWIN:
            torch.testing.assert_close(results[1], composed_dense_layers(TWIN, x, run, kv, rows))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
