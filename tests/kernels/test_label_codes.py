"""Labels of 4 bits: what a code is, and that back ends write the same bits and choose the same keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.cpu.build import best_variant, find_compiler
from kernels.cpu.ops import CpuOps
from kernels.label_codes import decode, encode, num_bytes
from kernels.ops import Ops
from kernels.reference import ReferenceOps
from kernels.sparse import Method, least_budget
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_sparse import CHOOSES, SHAPES, SparseWorld, Wish

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: shows that compiled = reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_channels", [1, 2, 5, 16])
def test_codes_are_the_nearest_multiples_of_the_scale(num_channels: int, dtype: torch.dtype) -> None:
    labels = (torch.randn(300, num_channels, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    codes, scales = encode(labels)
    assert codes.shape == (300, num_bytes(num_channels))
    steps = decode(codes, num_channels)
    assert steps.abs().max() == 7
    error = (labels.float() - steps * scales.float()[:, None]).abs()
    # Half a step; the largest element may miss its own by the rounding of the scale, 2^-9 of it.
    assert bool((error <= scales.float()[:, None] * (0.5 + 7 * 2**-8)).all())


def test_a_tie_goes_to_the_code_closer_to_zero_and_no_key_is_no_division_by_zero() -> None:
    codes, scales = encode(torch.tensor([[7.0, 0.5, -0.5, 1.5, 1.5001], [0.0, -0.0, 0.0, 0.0, 0.0]]))
    assert scales.tolist() == [1.0, 0.0]
    assert decode(codes, 5).tolist() == [[7.0, 0.0, 0.0, 1.0, 2.0], [0.0] * 5]


def test_a_label_is_a_function_of_its_own_key() -> None:
    labels = torch.randn(50, 4, 9, generator=torch.Generator().manual_seed(2))
    together = encode(labels)
    for at in (0, 17, 49):
        alone = encode(labels[at])
        assert torch.equal(alone[0], together[0][at])
        assert torch.equal(alone[1], together[1][at])


def written(ops: Ops, shape: Shape, length: int, whole: bool) -> SparseWorld:
    world = SparseWorld(ops, shape, [length], whole=whole, int4_labels=True)
    world.write(world.rows({0: (0, length)}, {}), {0: (0, length)})
    return world


@needs_compiler
@pytest.mark.parametrize("variant", ["best", "generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_codes_and_scales_are_the_bits_of_the_reference(
    shape: Shape, dtype: torch.dtype, variant: str
) -> None:
    shape, length = replace(shape, dtype=dtype), 90
    ops = CpuOps(num_threads=2, variant=best_variant() if variant == "best" else variant)
    # Keys are not rotated, so that both back ends store the same ones.
    mine, twin = written(ops, shape, length, True), written(ReferenceOps(), shape, length, True)
    assert mine.layer.labels is not None
    assert mine.layer.label_scales is not None
    assert twin.layer.labels is not None
    assert twin.layer.label_scales is not None
    slots = twin.rows({0: (0, length)}, {}).slots
    pages, offsets = slots // shape.page_size, slots % shape.page_size
    tile = 16 if shape.page_size <= 16 else 32
    num_pages, num_kv, keys, num_bytes_ = mine.layer.labels.shape
    words = mine.layer.labels.view(num_pages, num_kv, keys // tile, num_bytes_ // 4, tile, 4)
    codes = words.transpose(3, 4).reshape(mine.layer.labels.shape)
    num_codes = twin.layer.labels.shape[3]
    assert torch.equal(codes[pages, :, offsets, :num_codes], twin.layer.labels[pages, :, offsets])
    assert torch.equal(mine.layer.label_scales[pages, :, offsets], twin.layer.label_scales[pages, :, offsets])
    assert twin.layer.label_scales[pages, :, offsets].float().std() > 0


@needs_compiler
@pytest.mark.parametrize("variant", ["best", "generic"])
@pytest.mark.parametrize("method", [Method.DOUBLE_SPARSITY, Method.DOUBLE_SPARSITY_PAGES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_ends_choose_the_same_keys_by_codes(
    shape: Shape, dtype: torch.dtype, method: Method, variant: str
) -> None:
    """Whole numbers and scales of few bits: every score is exact. One other key would show in the values."""
    shape, length = replace(shape, dtype=dtype), 400
    wish = {0: Wish(method, least_budget(method, shape.page_size) + 8)}
    compiled = CpuOps(num_threads=2, variant=best_variant() if variant == "best" else variant)
    worlds = [written(ops, shape, length, True) for ops in (ReferenceOps(), compiled)]
    outs = [world.sparse_step({0: (390, length)}, wish).float() for world in worlds]
    bound = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outs[0], outs[1], rtol=bound, atol=bound)
    if method is Method.DOUBLE_SPARSITY:
        plain = SparseWorld(ReferenceOps(), shape, [length], whole=True)
        plain.write(plain.rows({0: (0, length)}, {}), {0: (0, length)})
        others = plain.sparse_step({0: (390, length)}, wish).float()
        assert not torch.allclose(others, outs[0], rtol=bound, atol=bound), "codes choose others"


def test_codes_take_a_quarter_of_the_memory() -> None:
    """16 channels of bfloat16: 8 bytes and 2 of a scale in place of 32."""
    ops: list[Ops] = [ReferenceOps()] if find_compiler() is None else [ReferenceOps(), CpuOps(num_threads=1)]
    for back_end in ops:
        k_pages, _ = back_end.allocate_kv(6, 32, 2, 64, torch.bfloat16, torch.device("cpu"))
        channels = torch.arange(16, dtype=torch.int32).repeat(2, 1)
        assert back_end.allocate_sparse(k_pages, CHOOSES, False, channels).num_bytes == 6 * 2 * 32 * 32
        assert back_end.allocate_sparse(k_pages, CHOOSES, False, channels, True).num_bytes == 6 * 2 * 32 * 10
