"""The plain kernels that the report measures against compile for GPUs that are not here, as they will run."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("pip install triton: shows that the stand-ins compile", allow_module_level=True)

from kernels.triton import fixed_split
from kernels.triton.compiled import Usage, compile_kernel
from kernels.triton.fixed_split import FIXED_SPLIT, VLLM_LIKE, Settings


def compile_segment(settings: Settings, rows: int, segments: int, arch: int) -> Usage:
    arguments: dict[str, Any] = dict.fromkeys(fixed_split.attend_segment.arg_names, "*i32")
    arguments |= dict.fromkeys(("q", "k_pages", "v_pages", "out"), "*bf16")
    arguments |= {"partial": "*fp32", "partial_lse": "*fp32", "scale": "fp32", "table_stride": "i32", "num_rows": "i32"}
    arguments |= {"K": 8, "G": 4, "D": 128, "DP": 128, "PAGE": 64, "BM": rows, "BN": settings.tile_keys}
    arguments |= {"SEGMENTS": segments, "UPCAST": False}
    warps = 8 if rows >= 64 else settings.num_warps
    return compile_kernel(fixed_split.attend_segment, arch, arguments, warps, settings.num_stages)


@pytest.mark.parametrize(
    ("settings", "rows", "segments"), [(VLLM_LIKE, 16, 16), (FIXED_SPLIT, 128, 1)], ids=["vllm-like", "prefill"]
)
def test_they_compile_without_spilling(settings: Settings, rows: int, segments: int) -> None:
    """A crippled rival would prove nothing."""
    usage = compile_segment(settings, rows, segments, 90)
    assert usage.spills == 0
    assert usage.shared <= 227 << 10
    assert usage.wide_copies > 0, "K and V come in 16-byte asynchronous copies"


def test_the_merge_compiles() -> None:
    arguments = {"partial": "*fp32", "partial_lse": "*fp32", "out": "*bf16", "num_pairs": "i32"}
    sizes = {"D": 128, "DP": 128, "SEGMENTS": 16, "SEGMENTS_P": 16}
    assert compile_kernel(fixed_split.merge_segments, 90, {**arguments, **sizes}, 1, 3).spills == 0
