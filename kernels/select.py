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
) -> Ops:
    """The fastest `Ops` for this device and dtype that can run here.

    On a CUDA device that is our Triton kernels, where triton is installed.
    On a CPU that is the compiled kernels (bfloat16, float32) if the CPU has AVX2 or better and a library is cached or a
    compiler is installed; otherwise plain torch, with one log line that says why.
    quantization  None, "int8" or "int4" weight-only; num_threads  of the compiled kernels, default: all cores.
    """
    if torch.device(device).type != "cpu":
        return _select_on_device(torch.device(device), dtype, quantization)
    if dtype not in (torch.bfloat16, torch.float32):
        reason = f"the compiled CPU kernels have no {dtype}"
    elif best_variant() == "generic":
        reason = "this CPU has no AVX2, without which the compiled kernels are slower than torch"
    else:
        try:
            return CpuOps(quantization, num_threads)
        except BuildError as error:
            reason = str(error)
    logging.getLogger("braid.kernels").warning("plain torch serves on this CPU, which is slower: %s", reason)
    return ReferenceOps(quantization)


def _select_on_device(device: torch.device, dtype: torch.dtype, quantization: str | None) -> Ops:
    if device.type != "cuda":
        reason = f"there are no kernels for {device.type} devices"
    elif dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reason = f"the Triton kernels have no {dtype}"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (pip install triton)"
    else:
        # Here, because it takes half a second to load and most machines without a GPU do not have it.
        from kernels.triton.ops import TritonOps

        return TritonOps(quantization)
    logging.getLogger("braid.kernels").warning("plain torch serves on %s, which is slower: %s", device, reason)
    return ReferenceOps(quantization)


def compilations() -> Callable[[], int]:
    """How many kernels this process has compiled since this call; always 0 where no back end compiles while it runs."""
    if importlib.util.find_spec("triton") is None:
        return lambda: 0
    from kernels.triton.compilations import Compilations

    counter = Compilations()
    return lambda: counter.count
