"""What this machine has: its device, how it multiplies, its cores."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags (the last is Arm's) of processors that multiply bfloat16 themselves."""


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it natively, else float32, unless the user says."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or cpu_flags() & _NATIVE_BF16 else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def cpu_flags() -> set[str]:
    """Instruction sets of the first processor; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def usable_cores() -> int:
    """Physical cores this process may use, no more than its control group's CPU quota; at least 1.

    Two threads on one core share its vector units and gain nothing; a thread beyond the quota stalls every barrier.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in cpus}
    return max(1, min(len(cores), _cpu_quota()))


def _core_of(cpu: int) -> tuple[str, str]:
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package = (folder / "physical_package_id").read_text().strip()
        return package, (folder / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _cpu_quota() -> int:
    """CPUs that the control group grants, rounded up; a large number where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return 1 << 16


def device_name(device: str) -> str:
    """The GPU's or the processor's name as the driver or the system has it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
