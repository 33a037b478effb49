"""Picks the back end of a device: the one place that knows them all."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch

from kernels.cpu.build import BuildError, best_variant
from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.reference import ReferenceOps


def select_ops(
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str | None = None,
    num_threads: int | None = None,
    deterministic: bool = False,
) -> Ops:
    """The fastest `Ops` for this device and dtype that can run here.

    On a CUDA device that is our Triton kernels, where triton is installed.
    On a CPU that is the compiled kernels (bfloat16, float32) if the CPU has AVX2 or better and a library is cached or a
    compiler is installed; otherwise plain torch, with one log line that says why.
    quantization  None, "int8" or "int4" weight-only; num_threads  of the compiled kernels, default: all cores.
    deterministic  a row's result must not depend on the rows beside it where the back end can choose: Triton attention
        with fixed cuts, no oneDNN products on CPUs with AMX. The compiled kernels keep it anyway otherwise; torch's own
        products, on a GPU and in plain torch, do not promise it.
    """
    if torch.device(device).type != "cpu":
        return _select_on_device(torch.device(device), dtype, quantization, deterministic)
    if dtype not in (torch.bfloat16, torch.float32):
        reason = f"the compiled CPU kernels have no {dtype}"
    elif best_variant() == "generic":
        reason = "this CPU has no AVX2, without which the compiled kernels are slower than torch"
    else:
        try:
            return CpuOps(quantization, num_threads, onednn_rows=None if deterministic else "auto")
        except BuildError as error:
            reason = str(error)
    return _plain_torch("this CPU", reason, quantization, deterministic)


def _select_on_device(device: torch.device, dtype: torch.dtype, quantization: str | None, deterministic: bool) -> Ops:
    if device.type != "cuda":
        reason = f"there are no kernels for {device.type} devices"
    elif dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reason = f"the Triton kernels have no {dtype}"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (pip install triton)"
    else:
        # Here, because it takes half a second to load and most machines without a GPU do not have it.
        from kernels.triton.ops import TritonOps

        return TritonOps(quantization, deterministic=deterministic)
    return _plain_torch(str(device), reason, quantization, deterministic)


def _plain_torch(where: str, reason: str, quantization: str | None, deterministic: bool) -> Ops:
    logger = logging.getLogger("braid.kernels")
    logger.warning("plain torch serves on %s, which is slower: %s", where, reason)
    if deterministic:
        logger.warning("deterministic is set, but torch's products may depend on the rows beside a row")
    return ReferenceOps(quantization)


def compilations() -> Callable[[], int]:
    """How many kernels this process has compiled since this call; always 0 where no back end compiles while it runs."""
    if importlib.util.find_spec("triton") is None:
        return lambda: 0
    from kernels.triton.compilations import Compilations

    counter = Compilations()
    return lambda: counter.count
