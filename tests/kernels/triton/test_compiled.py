"""Tier 2: every kernel compiles for GPUs that are not here, and takes no more registers and memory than they have.

The bounds of registers are what the compiler gave (Triton 3.7.1) and eight more. The launches' own geometry functions
choose the shapes, so what is compiled here is what runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("pip install triton: shows that the kernels compile for sm_80, sm_90, sm_100", allow_module_level=True)

from kernels.triton import attention, edits, merge, moe, move, norm, rope, sample, silu, statistics, truncate
from kernels.triton.compiled import Usage, compile_kernel
from kernels.triton.tiles import Geometry, large_geometry, padded_dim, small_geometry

ARCHS = [80, 90, 100]
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def attend(
    geometry: Geometry, arch: int, *, kind: str = "bf16", stored: str | None = None, head_dim: int = 128,
    page: int = 64, tree: bool = False, window: bool = False, sinks: int = 0, softcap: bool = False,
    sink_logits: bool = False, listed: bool = False, head_scale: bool = False,
) -> Usage:  # fmt: skip
    stored = stored or kind
    arguments: dict[str, Any] = dict.fromkeys(attention.attend.arg_names, "*i32")
    arguments |= dict.fromkeys(("q", "out"), f"*{kind}") | dict.fromkeys(("k_pages", "v_pages"), f"*{stored}")
    arguments |= dict.fromkeys(("k_scale", "v_scale", "sink_logits", "partial_out", "partial_lse"), "*fp32")
    arguments |= {"scale": "fp32", "softcap": "fp32", "table_stride": "i32"}
    arguments |= {"K": 8, "G": 4, "D": head_dim, "DP": padded_dim(head_dim), "PAGE": page}
    arguments |= {"BM": geometry.tile_rows, "BN": geometry.tile_keys, "STAGES": geometry.num_stages}
    arguments |= {"WINDOW": window, "TREE": tree, "UPCAST": False, "LISTED": listed, "SINKS": sinks}
    arguments |= {"PAD": 4 if stored == "i8" else 0, "TOKEN_SCALE": stored == "i8", "HEAD_SCALE": head_scale}
    arguments |= {"SOFTCAP": softcap, "SINK_LOGITS": sink_logits}
    return compile_kernel(attention.attend, arch, arguments, geometry.num_warps, geometry.num_stages)


def small(packed: int, head_dim: int = 128, itemsize: int = 2) -> Geometry:
    return small_geometry(packed, 4, head_dim, itemsize, 132)


def large(head_dim: int = 128, itemsize: int = 2) -> Geometry:
    return large_geometry(4, head_dim, itemsize, 132)


@pytest.mark.parametrize(
    ("packed", "arch", "tree", "registers", "spills"),
    [
        (4, 80, False, 168, 0),
        (4, 90, False, 164, 0),
        (4, 100, False, 140, 0),
        (32, 90, True, 255, 0),
        (64, 80, True, 255, 2),
        (64, 90, True, 220, 0),
        (64, 100, True, 159, 0),
    ],
)
def test_short_spans(packed: int, arch: int, tree: bool, registers: int, spills: int) -> None:
    usage = attend(small(packed), arch, tree=tree)
    assert usage.spills <= spills
    assert usage.registers <= registers + 8
    # Half of it and more: two programs share a multiprocessor in decode.
    assert usage.shared * (2 if packed <= 32 else 1) <= SHARED_LIMIT[arch]
    assert usage.wide_copies > 0, "K and V come in 16-byte asynchronous copies"
    assert usage.buffers >= 2, "mistake 6: a page look-up in the same iteration leaves one tile in flight"


@pytest.mark.parametrize(
    ("stored", "arch", "packed", "registers"),
    [("i8", 80, 4, 226), ("i8", 90, 4, 231), ("fp8e4nv", 90, 4, 236), ("fp8e4nv", 100, 4, 216)],
)
def test_stored_codes(stored: str, arch: int, packed: int, registers: int) -> None:
    usage = attend(small(packed), arch, stored=stored, head_scale=stored != "i8")
    assert usage.spills == 0
    assert usage.registers <= registers + 8
    assert usage.wide_copies > 0
    assert usage.buffers >= 2
    if stored != "i8":
        assert usage.fp8_mma == 0 < usage.mma, "mistake 14: codes are widened before both products"


@pytest.mark.parametrize(("arch", "packed"), [(90, 4), (90, 256)])
def test_mistake_14_fp8_codes_are_multiplied_as_bfloat16_and_summed_in_float32(arch: int, packed: int) -> None:
    """fp8 matrix units keep few bits of a sum: over 128k keys needle accuracy fell from 91 % to 13 %."""
    usage = attend(small(packed) if packed <= 64 else large(), arch, stored="fp8e4nv", head_scale=True)
    assert usage.fp8_mma == 0
    assert usage.mma + usage.wgmma > 0


@pytest.mark.parametrize(
    ("arch", "window", "page"), [(80, False, 64), (90, False, 64), (90, True, 16), (100, False, 64)]
)
def test_prefill(arch: int, window: bool, page: int) -> None:
    usage = attend(large(), arch, window=window, page=page)
    assert usage.spills == 0
    assert usage.shared <= SHARED_LIMIT[arch]
    assert usage.wide_copies > 0
    assert usage.buffers >= (2 if arch == 80 else 3)
    assert usage.wgmma > 0 if arch == 90 else usage.mma > 0


@pytest.mark.parametrize(("stored", "arch"), [("i8", 90), ("fp8e4nv", 90), ("fp8e4nv", 100)])
def test_prefill_over_stored_codes(stored: str, arch: int) -> None:
    usage = attend(large(), arch, stored=stored, head_scale=stored != "i8")
    assert usage.spills == 0
    assert usage.shared <= SHARED_LIMIT[arch]
    assert usage.buffers >= 2


@pytest.mark.parametrize("arch", ARCHS)
def test_the_long_spans_of_a_captured_step(arch: int) -> None:
    """They read tree masks whether there are any or not."""
    usage = attend(large(), arch, tree=True)
    assert usage.spills == 0
    assert usage.shared <= SHARED_LIMIT[arch]
    assert usage.buffers >= (2 if arch == 80 else 3)


@pytest.mark.parametrize(
    ("kind", "head_dim", "page", "is_large"),
    [("fp16", 64, 16, False), ("bf16", 80, 32, False), ("bf16", 96, 64, True), ("fp32", 64, 16, True),
     ("bf16", 256, 64, False)],
)  # fmt: skip
def test_other_heads_types_and_pages_compile_without_spilling_much(
    kind: str, head_dim: int, page: int, is_large: bool
) -> None:
    itemsize = 4 if kind == "fp32" else 2
    usage = attend(large(head_dim, itemsize) if is_large else small(4, head_dim, itemsize), 90, kind=kind,
                   head_dim=head_dim, page=page)  # fmt: skip
    assert usage.shared <= SHARED_LIMIT[90]
    assert usage.stack <= 64, usage


@pytest.mark.parametrize(
    ("average", "arch", "is_gated", "registers"),
    [
        (1, 80, True, 72), (1, 90, True, 72), (1, 90, False, 64), (100, 80, False, 164), (100, 90, True, 114),
        (1000, 80, True, 147), (1000, 90, True, 114), (1000, 90, False, 100), (1000, 100, True, 80),
    ],
)  # fmt: skip
def test_products_of_experts(average: int, arch: int, is_gated: bool, registers: int) -> None:
    """average: rows of an expert, of 128 of 2048 x 768. Gated: gate and up together, else down."""
    tiles = moe.expert_tiles(average * 128, 128, is_gated, 2)
    usage = grouped_product(tiles, arch, is_gated)
    assert usage.spills == 0
    assert usage.registers <= registers + 8
    # Where weights' bytes bound the time, two or three programs of a multiprocessor keep them coming.
    assert usage.shared * ((2 if arch == 80 else 3) if average == 1 else 1) <= SHARED_LIMIT[arch]
    assert usage.wide_copies > 0
    assert usage.buffers >= tiles.num_stages - 1
    assert usage.wgmma > 0 if arch == 90 and tiles.rows >= 64 else usage.mma > 0


@pytest.mark.parametrize(("kind", "itemsize", "width"), [("fp32", 4, 768), ("fp16", 2, 1000)])
def test_products_of_experts_of_other_types_and_sizes_stay_in_registers(kind: str, itemsize: int, width: int) -> None:
    usage = grouped_product(moe.expert_tiles(128_000, 128, False, itemsize), 90, False, kind, width)
    assert usage.spills == 0
    assert usage.shared <= SHARED_LIMIT[90]


def grouped_product(tiles: moe.ExpertTiles, arch: int, is_gated: bool, kind: str = "bf16", width: int = 768) -> Usage:
    values = f"*{kind}"
    arguments: dict[str, Any] = {"x": values, "weights": values, "out": values, "order": "*i32", "tile_expert": "*i32"}
    arguments |= {"num_pairs": "i32", "num_tiles": "i32", "SHARE": 8 if is_gated else 1, "GATED": is_gated}
    arguments |= dict(zip("NK", (width, 2048) if is_gated else (2048, width), strict=True))
    arguments |= {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "GROUP": moe._GROUP, "UPCAST": False}
    arguments |= {"STAGES": tiles.num_stages}
    return compile_kernel(moe.grouped_product, arch, arguments, tiles.num_warps, tiles.num_stages)


def filters(**sizes: int) -> dict[str, Any]:
    return {
        "logits": "*fp32", "log_min_p": "*fp32", "top_k": "*i64", "top_p": "*fp64", "peaks": "*fp32", "counts": "*i32",
        "masses": "*i64", "found": "*fp32", "edges": "*i32", "last_ids": "*i32", "V": 151936, "PIVOTS": 16, **sizes,
    }  # fmt: skip


@pytest.mark.parametrize(("arch", "weigh", "find"), [(80, 98, 102), (90, 98, 104), (100, 96, 119)])
def test_filters_keep_their_sums_in_registers(arch: int, weigh: int, find: int) -> None:
    """256 threads of 128 registers: two programs share a multiprocessor."""
    for kernel, registers, splits in ((truncate._weigh, weigh, 16), (truncate._find_edges, find, 1)):
        arguments = filters(BLOCK=truncate._PIVOT_BLOCK, SPLITS=splits)
        usage = compile_kernel(kernel, arch, arguments, num_warps=8, num_stages=3)
        assert usage.spills == 0
        assert usage.registers <= min(128, registers + 8)


def around() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every other kernel with the types of a bfloat16 model."""
    b, f, i, long = "*bf16", "*fp32", "*i32", "*i64"
    parts = {"partial": f, "partial_id": long, "SPLITS": 16}
    merged = {"out": b, "partial_out": f, "partial_lse": f, "sink_logits": f, "SINK_LOGITS": True, "PIECES": 16}
    merged |= {"K": 8, "G": 4, "D": 128, "DP": 128}
    yield "combine", merge.combine, {
        "row_list": i, "header": i, "units": i, "cum": i, "BM": 128, "LISTED": True, **merged
    }  # fmt: skip
    yield "merge_parts", merge.merge_parts, {"rows": i, "starts": i, "parts": i, **merged}
    yield "add_rms_norm", norm._rms_norm, {
        "x": b, "residual": b, "weight": b, "out": b, "total": b, "eps": "fp32", "H": 4096, "HP": 4096,
        "RESIDUAL": True,
    }  # fmt: skip
    for name, stored in (("", b), (" int8", "*i8"), (" fp8", "*u8")):
        scales = {"k_scale": f, "v_scale": f, "PAD": 4 if stored == "*i8" else 0, "TOKEN_SCALE": stored == "*i8"}
        pages = {"k_pages": stored, "v_pages": stored, "K": 8, "PAGE": 64, "D": 128, **scales}
        yield f"qkv_rope{name}", rope.qkv_rope, {
            "qkv": b, "cos_sin": f, "q_norm": b, "k_norm": b, "positions": i, "slots": long, "q_out": b, "eps": "fp32",
            "Q": 32, "HALF": 64, "HALF_P": 64, "REST_P": 0, "Q_NORM": True, "K_NORM": True, "HEADS": 8,
            "FP8": stored == "*u8", "HEAD_SCALE": stored == "*u8", **pages,
        }  # fmt: skip
        yield f"move{name}", move._move, {"sources": long, "targets": long, "num_moves": "i32", "DP": 128, **pages}
    yield "silu_mul", silu._silu_mul, {"gate_up": b, "out": b, "I": 14336, "BLOCK": 1024}
    yield "sort of experts", moe.sort_pairs, {
        "experts": long, "order": i, "tile_expert": i, "num_pairs": "i32", "num_tiles": "i32", "E": 128, "EP": 128,
        "BM": 64, "BLOCK": moe._SORT_BLOCK,
    }  # fmt: skip
    yield "sum of experts", moe.weighted_sum, {
        "y": b, "weights": f, "out": b, "TOP_K": 8, "H": 2048, "BLOCK": moe._SUM_BLOCK,
    }  # fmt: skip
    yield "edits of cells", edits._edit_cells, {
        "logits": f, "starts": i, "ids": i, "values": f, "rules": f, "num_rows": "i32", "V": 151936,
        "BLOCK": edits._CELLS,
    }  # fmt: skip
    yield "masks and temperature", edits._mask_and_divide, {
        "logits": f, "masks": i, "bits": i, "temperatures": f, "V": 151936, "BLOCK": edits._BLOCK, "SPLITS": 16,
    }  # fmt: skip
    for kernel in (truncate._peaks, truncate._collect, truncate._cut):
        yield f"filters{kernel.__name__}", kernel, filters(BLOCK=truncate._BLOCK, SPLITS=16)
    yield "statistics", statistics._partial, {"logits": f, "V": 151936, "BLOCK": 1024, **parts}
    yield "statistics end", statistics._finish, {
        "logits": f, "ids": long, "best_id": long, "values": f, "num_rows": "i32", "V": 151936, **parts
    }  # fmt: skip
    yield "sample", sample._partial, {
        "logits": f, "seeds": long, "sample_indices": long, "positions": long, "greedy": "*i1", "stream": "i64",
        "V": 151936, "QUADS": 256, **parts,
    }  # fmt: skip
    yield "sample end", sample._finish, {"chosen": long, **parts}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kernel", "arguments"), [pytest.param(k, a, id=name) for name, k, a in around()])
def test_kernels_around_attention_compile_and_keep_their_values_in_registers(
    kernel: Any, arguments: dict[str, Any], arch: int
) -> None:
    usage = compile_kernel(kernel, arch, arguments, num_warps=4, num_stages=3)
    assert usage.spills == 0
    assert usage.shared <= 48 << 10


def test_mistake_5_nothing_that_a_step_changes_is_compiled_for() -> None:
    """Integers are compiled for anew where they are 1 or a multiple of 16, unless marked; tuning stops requests."""
    products = {"num_pairs": "i32", "num_tiles": "i32"}
    others = [("attend", attention.attend, {"table_stride": "i32"}), ("experts", moe.grouped_product, products)]
    for _, kernel, arguments in [*others, *around()]:
        changing = [
            parameter.name
            for parameter in kernel.params
            if arguments.get(parameter.name) in ("i32", "i64") and not parameter.do_not_specialize
        ]
        assert not changing, f"{kernel.__name__} is compiled anew for {changing}"
    for path in (Path(attention.__file__).parent).glob("*.py"):
        assert "autotune" not in path.read_text()


def test_mistake_6_the_gates_would_see_a_lost_pipeline() -> None:
    """The same kernel with one stage has one buffer or none: the count of buffers is not vacuous."""
    assert attend(dataclasses.replace(small(4), num_stages=1), 90).buffers < 2
