"""Tier 2 of sparse attention: its kernels compile for GPUs that are not here, keep their values in registers and more
than one tile in flight. Bounds of registers are what the compiler gave (Triton 3.7.1) and eight more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("pip install triton: shows that the kernels compile for sm_80, sm_90, sm_100", allow_module_level=True)

from kernels.sparse_keep import MASS_ONE
from kernels.triton import attention
from kernels.triton.compiled import Usage, compile_kernel
from kernels.triton.sparse import fetch, label_codes, metadata, permute, scores, tile_mass, top_k
from kernels.triton.tiles import small_geometry

BF16, F32, F16, INT, LONG, BYTE = "*bf16", "*fp32", "*fp16", "*i32", "*i64", "*u8"
SIZES = {"K": 8, "G": 4, "D": 128, "DP": 128, "PAGE": 64, "UPCAST": False, "scale": "fp32", "STAGES": 3}
ROWS = {
    "q": BF16, "page_table": INT, "row_seq": INT, "row_visible": INT, "budgets": INT, "scores": F16,
    "table_stride": "i32", "width": "i32",
}  # fmt: skip
CHUNK = {
    "q": BF16, "k_pages": BF16, "v_pages": BF16, "table": INT, "first": "i32", "width": "i32", "num_rows": "i32",
    "num_keys": "i32", "BM": 64, "BN": 64,
}  # fmt: skip


class Case(NamedTuple):
    """A kernel, its arguments, most registers on sm_90, fewest tiles in flight in its main loop."""

    kernel: Any
    arguments: dict[str, Any]
    registers: int
    buffers: int


def cases() -> Iterator[tuple[str, Case]]:
    keys = {**ROWS, **SIZES, "keys": BF16, "channels": INT, "GP": 16}
    labels = {**keys, "C": 16, "CP": 16, "BN": 128, "CHANNELS": True, "DOT": False}
    yield "labels of 16 channels", Case(scores.key_scores, labels, 56, 2)
    yield "labels of 32 channels", Case(scores.key_scores, {**labels, "C": 32, "CP": 32, "BN": 64, "DOT": True}, 40, 3)
    probe = {**keys, "C": 128, "CP": 128, "BN": 64, "CHANNELS": False, "DOT": True}
    yield "probe", Case(scores.key_scores, probe, 44, 3)
    yield (
        "pages",
        Case(scores.page_scores, {**ROWS, **SIZES, "bounds": BF16, "LAST": 64, "BN": 4, "N": 8, "NP": 8}, 117, 2),
    )
    maxima = {**SIZES, "key_scores": F16, "row_visible": INT, "budgets": INT, "scores": F16, "key_width": "i32"}
    maxima |= {"width": "i32", "PAGE_P": 64, "LAST": 64, "BN": 16}
    yield "pages by their keys", Case(scores.page_maxima, maxima, 32, 0)
    written = {"k_pages": BF16, "slots": LONG, "bounds": BF16, "labels": BF16, "channels": INT, "SUB": 8, "SUB_P": 8}
    written |= {"C": 16, "CP": 16, "BOUNDS": True, "LABELS": True, "label_scales": BF16, "CODES": False}
    yield "metadata", Case(metadata.metadata, {**SIZES, **written}, 42, 0)
    coded = {**written, "labels": BYTE, "CODES": True}
    yield "metadata, 4 bits", Case(metadata.metadata, {**SIZES, **coded}, 48, 0)
    codes = {**ROWS, **SIZES, "codes": BYTE, "label_scales": BF16, "channels": INT, "BN": 128}
    yield "labels of 16 channels, 4 bits", Case(label_codes.code_scores, {**codes, "C": 16, "CP": 8}, 32, 2)
    yield "labels of 32 channels, 4 bits", Case(label_codes.code_scores, {**codes, "C": 32, "CP": 16}, 72, 2)
    yield "labels of 64 channels, 4 bits", Case(label_codes.code_scores, {**codes, "C": 64, "CP": 32, "BN": 64}, 128, 2)
    copied = {**SIZES, **dict.fromkeys(("k_from", "v_from", "k_to", "v_to"), BF16), "num_places": "i32", "BN": 16}
    yield "keys from the host", Case(fetch.copy_places, {**copied, "places": INT}, 32, 0)
    chosen = {**ROWS, **SIZES, "histograms": INT, "ids": INT, "indices": INT, "list_stride": "i32"}
    chosen |= {"index_stride": "i32", "UNIT": 64, "PAGE": 0, "FIRST": 4, "LAST": 64, "INDICES": True, "BLOCK": 1024}
    for number in range(4):
        arguments = {**chosen, "SPLITS": 1 if number == 3 else 16, "PASS": number}
        yield f"top-k, pass {number}", Case(top_k.select, arguments, (63, 61, 109, 105)[number], 0)
    tiles = {**CHUNK, **SIZES, "limits": INT, "counts": INT, "mass": INT, "first_tile": "i32", "ONE": MASS_ONE}
    stride_16 = {**tiles, "STRIDE": 16, "GT": 8, "RM": 32}
    yield "mass, stride 16", Case(tile_mass.mass_of_tiles, stride_16, 128, 2)
    yield "mass, stride 8", Case(tile_mass.mass_of_tiles, {**tiles, "STRIDE": 8, "GT": 16, "RM": 64}, 180, 3)
    yield "mass, pooled", Case(tile_mass.mass_of_tiles, {**tiles, "STRIDE": 1, "GT": 1, "RM": 16}, 80, 1)
    kept = {"mass": INT, "counts": INT, "forced": INT, "tiles": INT, "lengths": INT, "width": "i32", "target": "i32"}
    yield "keep", Case(tile_mass.keep, {**kept, "BLOCK": 1024}, 55, 0)
    probed = {**CHUNK, **SIZES, "lse": F32, "importance": F32, "SPLITS": 8}
    yield "probe lse", Case(permute.probe_lse, probed, 64, 3)
    yield "probe mass", Case(permute.probe_mass, probed, 96, 3)
    yield "rank", Case(permute.rank_keys, {"importance": F32, "order": INT, "num_keys": "i32", "SEGMENT": 256,
                                           "BLOCK": 64}, 158, 0)  # fmt: skip
    gathered = {**CHUNK, **SIZES, "order": INT, "k_out": BF16, "v_out": BF16, "stride": "i32", "ORDER": True}
    yield "gather", Case(permute.gather_keys, gathered, 92, 0)


def compiled(case: Case, arch: int) -> Usage:
    arguments = {name: case.arguments[name] for name in case.kernel.arg_names}
    return compile_kernel(case.kernel, arch, arguments, num_warps=4, num_stages=3)


QUICK = {"labels of 16 channels", "pages", "pages by their keys", "top-k, pass 3", "mass, stride 16"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, case in cases()],
)
def test_selection_compiles_and_keeps_its_values_in_registers(case: Case) -> None:
    usage = compiled(case, 90)
    assert usage.spills == 0
    assert usage.registers <= case.registers + 8
    assert usage.shared <= 113 << 10, "two programs share a multiprocessor"
    assert usage.buffers >= case.buffers


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases()])
def test_selection_compiles_for_older_and_newer_gpus(case: Case, arch: int) -> None:
    usage = compiled(case, arch)
    assert usage.spills == 0
    assert usage.shared <= 113 << 10
    assert usage.buffers >= min(case.buffers, 2)


@pytest.mark.parametrize(
    ("page", "arch"), [(1, 90), *(pytest.param(page, 80, marks=pytest.mark.slow) for page in (1, 64))]
)
def test_attention_to_lists_keeps_tiles_in_flight(page: int, arch: int) -> None:
    """Lists of single keys look up an address for each: without the look-up one tile ahead one tile would be in flight
    (mistake 6)."""
    geometry = small_geometry(4, 4, 128, 2, 132)
    arguments: dict[str, Any] = dict.fromkeys(attention.attend.arg_names, INT)
    arguments |= dict.fromkeys(("q", "k_pages", "v_pages", "out"), BF16)
    arguments |= dict.fromkeys(("k_scale", "v_scale", "sink_logits", "partial_out", "partial_lse"), F32)
    arguments |= {"scale": "fp32", "softcap": "fp32", "table_stride": "i32"}
    arguments |= {"K": 1, "G": 4, "D": 128, "DP": 128, "PAGE": page, "BM": geometry.tile_rows, "BN": geometry.tile_keys}
    arguments |= {"STAGES": geometry.num_stages, "WINDOW": False, "TREE": False, "UPCAST": False}
    arguments |= {"LISTED": False, "SINKS": 0, "PAD": 0, "TOKEN_SCALE": False, "HEAD_SCALE": False}
    arguments |= {"SOFTCAP": False, "SINK_LOGITS": False}
    usage = compile_kernel(attention.attend, arch, arguments, geometry.num_warps, geometry.num_stages)
    assert usage.spills == 0
    assert usage.wide_copies > 0, "a row of K or V comes in 16-byte copies, from wherever it is"
    assert usage.buffers >= 2
    assert usage.registers <= 255


def test_mistake_5_nothing_that_a_step_changes_is_compiled_for() -> None:
    for name, case in cases():
        changing = [
            parameter.name
            for parameter in case.kernel.params
            if case.arguments.get(parameter.name) in ("i32", "i64") and not parameter.do_not_specialize
        ]
        assert not changing, f"{name} is compiled anew for {changing}"
    for path in Path(top_k.__file__).parent.glob("*.py"):
        assert "autotune" not in path.read_text()
