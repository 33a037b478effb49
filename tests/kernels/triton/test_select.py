"""Which back end a CUDA device gets; needs no device, since nothing is computed."""

from __future__ import annotations

import importlib.util
import logging
import re

import pytest
import torch

from kernels.reference import ReferenceOps
from kernels.select import compilations, select_ops


def test_cuda_gets_the_triton_kernels() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("pip install triton: shows that a CUDA device gets TritonOps")
    assert select_ops("cuda", torch.bfloat16).name == "triton"
    assert select_ops("cuda", torch.float16, "int8").name == "triton-int8"


@pytest.mark.parametrize(
    ("device", "dtype", "has_triton", "reason"),
    [
        ("cuda", torch.bfloat16, False, "triton is not installed"),
        ("cuda", torch.float64, True, r"no torch\.float64"),
        ("xpu", torch.bfloat16, True, "no kernels for xpu devices"),
    ],
)
def test_other_devices_get_plain_torch_and_one_line_that_says_why(
    device: str,
    dtype: torch.dtype,
    has_triton: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_triton else None)
    with caplog.at_level(logging.WARNING, "braid.kernels"):
        ops = select_ops(device, dtype, "int4")
    assert isinstance(ops, ReferenceOps)
    assert ops.name == "reference-int4"
    assert len(caplog.records) == 1
    assert re.search(reason, caplog.text)


def test_compilations_are_counted_through_the_hook_that_triton_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device nothing compiles by itself: the hook is called as `JITFunction` calls it after compiling."""
    triton = pytest.importorskip("triton", reason="pip install triton: shows that compilations are counted")
    others: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **details: others.append(details["repr"]))
    first = compilations()
    second = compilations()
    for expected in (1, 2):
        hook = triton.knobs.runtime.jit_post_compile_hook
        hook(key="k", repr="silu[num_warps=4]", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
        assert (first(), second()) == (expected, expected)
    assert len(others) == 2


def test_where_no_triton_is_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compilations()() == 0


def test_the_deterministic_flag_reaches_attention_and_plain_torch_says_what_it_cannot_promise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "braid.kernels"):
        select_ops("xpu", torch.bfloat16, deterministic=True)
    assert "torch's products may depend on the rows beside a row" in caplog.text
    if importlib.util.find_spec("triton") is None:
        pytest.skip("pip install triton: shows that a CUDA device gets fixed cuts")
    from kernels.triton.ops import TritonOps

    for deterministic in (False, True):
        ops = select_ops("cuda", torch.bfloat16, deterministic=deterministic)
        assert isinstance(ops, TritonOps)
        assert ops.deterministic == deterministic
