"""The compiled CPU kernels against the plain-torch reference, and against themselves in other company."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers, MlpBlock, composed_attention_block, composed_dense_layers
from kernels.cpu.build import best_variant, find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows, PackedLinear
from kernels.reference import ReferenceOps, gumbel_noise
from kernels.routing import Router
from tests.kernels.cpu.worlds import Shape, World, rows_of

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: shows that compiled = reference")

# bf16 keeps 8 bits: one rounding of the result is 2^-9 relative, and where a kernel feeds rounded values (p in p.v)
# into a product the error is that of its inputs, so 2^-7 of the largest output bounds both.


def assert_close(got: Tensor, want: Tensor) -> None:
    """Within the tolerance of got's dtype."""
    bound = 2**-7 if got.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), want.float(), rtol=bound, atol=bound)


@pytest.fixture(scope="module", params=[best_variant(), "generic"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(num_threads=2, variant=request.param)


@pytest.fixture
def reference() -> ReferenceOps:
    return ReferenceOps()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 24, 37, 390])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (96, 96), (33, 50), (7, 31), (200, 257)])
def test_linear_equals_the_reference_for_any_shape(
    ops: CpuOps, reference: ReferenceOps, dtype: torch.dtype, rows: int, n: int, k: int
) -> None:
    x, w = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, seed=1) * k**-0.5
    bias, residual = random(n, dtype=dtype, seed=2), random(rows, n, dtype=dtype, seed=3)
    got = ops.linear(x, ops.pack_linear(w, bias), residual)
    want = x.float() @ w.float().T + bias.float() + residual.float()
    assert_close(got, want)
    assert_close(ops.linear(x, ops.pack_linear(w)), x.float() @ w.float().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_and_not_rounded_on_the_way(ops: CpuOps, dtype: torch.dtype) -> None:
    x, w = random(5, 96, dtype=dtype), random(1000, 96, dtype=dtype, seed=1)
    got = ops.logits(x, ops.pack_linear(w))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x.float() @ w.float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_linear_layer_is_bitwise_the_same_alone_and_in_a_crowd(
    dtype: torch.dtype, quantization: str | None
) -> None:
    ops, alone = CpuOps(quantization, num_threads=2), CpuOps(quantization, num_threads=1)
    for n, k in [(96, 160), (64, 131)]:
        x, w = random(400, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
        packed, single = ops.pack_linear(w), alone.pack_linear(w)
        crowd = ops.linear(x, packed)
        for first, end in [(0, 1), (399, 400), (5, 17), (5, 18), (100, 132)]:
            assert torch.equal(alone.linear(x[first:end], single), crowd[first:end])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_equal_the_reference_grid_and_take_less_memory(dtype: torch.dtype, quantization: str) -> None:
    ops, reference = CpuOps(quantization, num_threads=2), ReferenceOps(quantization)
    x, w = random(9, 200, dtype=dtype), random(100, 200, dtype=dtype, seed=1) * 200**-0.5
    packed, dense = ops.pack_linear(w), reference.pack_linear(w)
    want = x.float() @ dense.weight_NK.float().T
    assert_close(ops.linear(x, packed), want)
    assert packed.num_bytes < dense.num_bytes * (0.75 if quantization == "int8" else 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 96), (3, 50), (40, 768)])
def test_norm_and_activation_equal_the_reference(
    ops: CpuOps, reference: ReferenceOps, dtype: torch.dtype, rows: int, size: int
) -> None:
    x, weight = random(rows, size, dtype=dtype) * 3, random(size, dtype=dtype, seed=1)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    both = random(rows, 2 * size, dtype=dtype, seed=2) * 5
    both[0, 0], both[0, 1] = 100.0, -100.0
    assert_close(ops.silu_mul(both), reference.silu_mul(both))


SHAPES = [
    Shape(num_q=4, num_kv=4, head_dim=32, page_size=16),
    Shape(num_q=12, num_kv=4, head_dim=64, page_size=16),
    Shape(num_q=16, num_kv=2, head_dim=128, page_size=32),
    Shape(num_q=2, num_kv=1, head_dim=24, page_size=4),
    Shape(num_q=6, num_kv=2, head_dim=80, page_size=7),
    Shape(num_q=8, num_kv=1, head_dim=48, page_size=128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 21])
def test_attention_equals_the_reference_around_page_ends_with_nan_everywhere_else(
    ops: CpuOps, reference: ReferenceOps, shape: Shape, dtype: torch.dtype, window: int | None
) -> None:
    shape = Shape(shape.num_q, shape.num_kv, shape.head_dim, shape.page_size, dtype)
    page = shape.page_size
    lengths = [1, max(1, page - 1), page, page + 1, 2 * page + 3, 150]
    spans = {i: (0, length) for i, length in enumerate(lengths)}
    got = World(ops, shape, lengths).step(spans, window)
    want = World(reference, shape, lengths).step(spans, window)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 33])
def test_attention_is_bitwise_the_same_alone_in_a_crowd_and_under_any_chunking(
    dtype: torch.dtype, window: int | None
) -> None:
    ops = CpuOps(num_threads=2)
    for shape in (Shape(12, 4, 64, 16, dtype), Shape(3, 1, 40, 5, dtype)):
        lengths = [150, 1, 17, 90]
        crowd = World(ops, shape, lengths).step({i: (0, n) for i, n in enumerate(lengths)}, window)[:150]
        for chunk in (1, 7, 16, 150):
            world = World(CpuOps(num_threads=1), shape, lengths)
            parts = [world.step({0: (at, min(150, at + chunk))}, window) for at in range(0, 150, chunk)]
            assert torch.equal(torch.cat(parts), crowd)


def test_rows_that_see_past_their_own_position_attend_like_the_reference(ops: CpuOps, reference: ReferenceOps) -> None:
    shape = Shape(4, 2, 32, 8)
    got = []
    for each in (ops, reference):
        world = World(each, shape, [30])
        world.step({0: (0, 20)})
        rows = rows_of([(20, 30)], world.pages, 8)
        block = AttentionRows(
            rows.page_table,
            rows.row_seq,
            rows.positions,
            torch.full((10,), 30, dtype=torch.int32),
            rows.slots,
            rows.span_starts,
        )
        q = each.qkv_rope_write(world.qkv[0][20:30], 4, 2, 32, world.cos_sin, None, None, 1e-6, world.k, world.v, block)
        got.append(each.paged_attention(q, world.k, world.v, block, 0.2))
    assert_close(got[0], got[1])


def test_a_nan_in_a_query_reaches_its_own_row_and_no_other(ops: CpuOps) -> None:
    world = World(ops, Shape(), [20, 9])
    clean = world.step({0: (0, 20), 1: (0, 9)})
    broken = World(ops, Shape(), [20, 9])
    broken.qkv[0][19, 0] = float("nan")
    got = broken.step({0: (0, 20), 1: (0, 9)})
    assert got[19, 0].isnan().all()
    assert torch.equal(torch.cat((got[:19], got[20:])), torch.cat((clean[:19], clean[20:])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary", [64, 32])
def test_qk_norm_and_partial_rotation_equal_the_reference(
    ops: CpuOps, reference: ReferenceOps, dtype: torch.dtype, rotary: int
) -> None:
    angles = random(40, rotary // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    q_norm, k_norm = random(64, dtype=dtype, seed=4), random(64, dtype=dtype, seed=5)
    rows = rows_of([(0, 33)], [[2, 0, 1]], 16)
    outputs = []
    for each in (ops, reference):
        k, v = each.allocate_kv(3, 16, 2, 64, dtype, torch.device("cpu"))
        q = each.qkv_rope_write(random(33, 512, dtype=dtype), 4, 2, 64, cos_sin, q_norm, k_norm, 1e-6, k, v, rows)
        outputs.append((q, each.paged_attention(q, k, v, rows, 0.125)))
    assert_close(outputs[0][0], outputs[1][0])
    # The stored keys are rounded after the norm's own rounding differs by one bf16 step, scores move by 2^-8 of ~5.
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outputs[0][1].float(), outputs[1][1].float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("vocab", [5, 64, 1000, 8192])
def test_sampling_takes_the_token_that_the_specified_noise_picks(ops: CpuOps, vocab: int) -> None:
    rows = 16
    logits = random(rows, vocab) * 3
    logits[:, 2] = float("-inf")
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(1))
    sample, position = torch.arange(rows) % 3, torch.arange(rows) * 7
    greedy = torch.arange(rows) % 4 == 0
    got = ops.sample(logits, seeds, sample, position, greedy)
    noisy = logits + gumbel_noise(vocab, seeds, sample, position)
    want = torch.where(greedy, logits.argmax(1), noisy.argmax(1))
    # Two logarithms in fp32 and in fp64 may order near ties differently, nothing else.
    score = torch.where(greedy[:, None], logits, noisy)
    best, taken = score.gather(1, want[:, None]), score.gather(1, got[:, None])
    assert ((best - taken) < 1e-5).all()
    assert (got[greedy] == want[greedy]).all()


def test_sampling_breaks_ties_by_the_lowest_id_and_survives_a_row_with_everything_banned(ops: CpuOps) -> None:
    logits = torch.full((2, 100), float("-inf"))
    logits[0, 37] = logits[0, 80] = logits[0, 21] = 1.0
    zeros = torch.zeros(2, dtype=torch.int64)
    assert ops.sample(logits, zeros, zeros, zeros, torch.tensor([True, True])).tolist() == [21, 0]


def test_sampled_frequencies_follow_the_softmax(ops: CpuOps) -> None:
    rows = 4000
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf"), -1.0]]).repeat(rows, 1)
    zeros = torch.zeros(rows, dtype=torch.int64)
    got = ops.sample(logits, zeros + 11, zeros, torch.arange(rows), zeros.bool())
    share = torch.bincount(got, minlength=5) / rows
    torch.testing.assert_close(share, logits[0].softmax(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("router", [Router(2, True), Router(3, True, True, torch.randn(6), 3, 2, 2.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_the_reference_and_rows_do_not_depend_on_company(
    ops: CpuOps, reference: ReferenceOps, dtype: torch.dtype, router: Router
) -> None:
    x, logits = random(23, 64, dtype=dtype), random(23, 6, seed=1)
    up = [random(96, 64, dtype=dtype, seed=10 + i) / 8 for i in range(6)]
    down = [random(64, 48, dtype=dtype, seed=20 + i) / 7 for i in range(6)]
    packed = [ops.pack_linear(w) for w in up], [ops.pack_linear(w) for w in down]
    got = ops.moe(x, logits, router, *packed)
    want = reference.moe(
        x, logits, router, [reference.pack_linear(w) for w in up], [reference.pack_linear(w) for w in down]
    )
    assert_close(got, want)
    alone = ops.moe(x[4:5], logits[4:5], router, *packed)
    assert torch.equal(alone, got[4:5])


def dense_layers(ops: CpuOps, dtype: torch.dtype, num_layers: int, positions: int) -> DenseLayers:
    """Layers of hidden 96, 4 query and 2 kv heads of 32, MLP 80; each has weights, norms and a window of its own."""

    def layer(seed: int) -> tuple[AttentionBlock, MlpBlock]:
        def weight(n: int, k: int) -> PackedLinear:
            matrix = random(n, k, dtype=dtype, seed=seed + n) * k**-0.5
            return ops.pack_linear(matrix, random(n, dtype=dtype, seed=seed + n + 1))

        norm, head_norm = random(96, dtype=dtype, seed=seed + 5), random(32, dtype=dtype, seed=seed + 6)
        window = (7, None, 20)[seed // 1000 % 3]
        block = AttentionBlock(
            norm, weight(256, 96), weight(96, 128), head_norm, head_norm, 4, 2, 32, cos_sin, 1e-6, 0.2, window
        )
        return block, MlpBlock(norm, weight(160, 96), weight(96, 80), 1e-6)

    angles = random(positions, 16)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    return DenseLayers(tuple(layer(1000 * i) for i in range(num_layers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 40])
def test_fused_layers_equal_their_composition_bit_for_bit(ops: CpuOps, dtype: torch.dtype, count: int) -> None:
    run = dense_layers(ops, dtype, 3, count)
    x, rows = random(count, 96, dtype=dtype), rows_of([(0, count)], [[0, 3, 1, 2]], 16)

    def pages() -> list[tuple[Tensor, Tensor]]:
        return [ops.allocate_kv(4, 16, 2, 32, dtype, torch.device("cpu")) for _ in run.layers]

    kept = x.clone()
    assert torch.equal(ops.dense_layers(x, run, pages(), rows), composed_dense_layers(ops, x, run, pages(), rows))
    assert torch.equal(x, kept)
    block, kv = run.layers[0][0], pages()[0]
    fused, composed = ops.attention_block(x, block, *kv, rows), composed_attention_block(ops, x, block, *kv, rows)
    assert torch.equal(fused, composed)


def test_a_run_of_layers_follows_its_pages_when_they_are_replaced(ops: CpuOps) -> None:
    run = dense_layers(ops, torch.float32, 2, 40)
    x = random(40, 96)
    rows = rows_of([(0, 40)], [[0, 3, 1, 2]], 16)
    wide = rows_of([(0, 40)], [[1, 0]], 32)
    first = ops.dense_layers(x, run, kv_of(ops, 16), rows)
    assert_close(ops.dense_layers(x, run, kv_of(ops, 32), wide), first)
    assert torch.equal(ops.dense_layers(x, run, kv_of(ops, 16), rows), first)


def kv_of(ops: CpuOps, page_size: int) -> list[tuple[Tensor, Tensor]]:
    return [ops.allocate_kv(64 // page_size, page_size, 2, 32, torch.float32, torch.device("cpu")) for _ in range(2)]


def test_layers_that_do_not_fit_each_other_are_refused(ops: CpuOps) -> None:
    run, x = dense_layers(ops, torch.float32, 2, 4), random(4, 96)
    rows = rows_of([(0, 4)], [[0]], 16)
    with pytest.raises(ValueError, match="2 layers got the pages of 1"):
        ops.dense_layers(x, run, kv_of(ops, 16)[:1], rows)
    with pytest.raises(ValueError, match="must have the same heads"):
        ops.dense_layers(x, run, [kv_of(ops, 16)[0], kv_of(ops, 32)[0]], rows)
    attention, mlp = run.layers[0]
    crossed = DenseLayers(((attention, dataclasses.replace(mlp, down=attention.qkv)),))
    with pytest.raises(ValueError, match="rows have 80 features, but the weight takes 96"):
        ops.dense_layers(x, crossed, kv_of(ops, 16)[:1], rows)


def test_onednn_takes_over_from_the_given_row_count_where_it_is_asked_for() -> None:
    ops, plain = CpuOps(num_threads=2, onednn_rows=16), CpuOps(num_threads=2, onednn_rows=None)
    w, bias = random(64, 96, dtype=torch.bfloat16) / 10, random(64, dtype=torch.bfloat16, seed=1)
    packed, own = ops.pack_linear(w, bias), plain.pack_linear(w, bias)
    for count in (15, 16, 40):
        x, residual = random(count, 96, dtype=torch.bfloat16), random(count, 64, dtype=torch.bfloat16, seed=2)
        # Two roundings more: of the product, and of its sum with the residual.
        want = plain.linear(x, own, residual)
        torch.testing.assert_close(ops.linear(x, packed, residual).float(), want.float(), rtol=2**-6, atol=2**-6)
        assert count >= 16 or torch.equal(ops.linear(x, packed, residual), want)
    assert packed.onednn is not None
    assert own.onednn is None
    assert packed.num_bytes > own.num_bytes
    assert CpuOps("int8", onednn_rows=16).pack_linear(w).onednn is None


def test_rows_that_point_outside_their_memory_are_refused(ops: CpuOps) -> None:
    world = World(ops, Shape(), [20])
    rows = rows_of([(0, 20)], world.pages, 16)
    args = (4, 2, 64, world.cos_sin, None, None, 1e-6, world.k, world.v)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"slots": rows.slots + 1000}, "slot lies outside"),
        ({"visible": rows.visible + 1000}, "sees more keys"),
        ({"positions": rows.positions + 1000}, "rotary positions"),
        ({"row_seq": rows.row_seq[:3]}, "describe 3 rows"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            ops.qkv_rope_write(world.qkv[0], *args, dataclasses.replace(rows, **change))
    with pytest.raises(TypeError, match=r"visible is torch\.int64"):
        ops.qkv_rope_write(world.qkv[0], *args, dataclasses.replace(rows, visible=rows.visible.long()))


def test_a_step_without_rows_is_legal(ops: CpuOps) -> None:
    packed = ops.pack_linear(random(64, 32))
    assert ops.linear(random(0, 32), packed).shape == (0, 64)
    assert ops.rms_norm(random(0, 32), random(32), 1e-6).shape == (0, 32)
    zeros = torch.zeros(0, dtype=torch.int64)
    assert ops.sample(random(0, 10), zeros, zeros, zeros, zeros.bool()).shape == (0,)


def test_mismatched_arguments_are_refused_with_the_numbers(ops: CpuOps) -> None:
    packed = ops.pack_linear(random(64, 32))
    with pytest.raises(ValueError, match="31 features, but the weight takes 32"):
        ops.linear(random(2, 31), packed)
    with pytest.raises(TypeError, match="bfloat16"):
        ops.linear(random(2, 32, dtype=torch.bfloat16), packed)
    with pytest.raises(TypeError, match="float16"):
        ops.rms_norm(random(2, 32).half(), random(32).half(), 1e-6)
    with pytest.raises(ValueError, match="num_threads is 0"):
        CpuOps(num_threads=0)


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    ops = CpuOps(num_threads=2)
    packed, x = ops.pack_linear(random(2048, 64)), random(4, 64)
    want = ops.linear(x, packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.linear(x, packed), want) else 1)
    deadline = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, "the forked child hangs"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0
