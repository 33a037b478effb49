"""Compile a kernel for a GPU without one, and read what it will use: the second tier of proof (README).

Triton's wheel holds the assembler and the disassembler, so this needs no GPU, driver or CUDA installation. It cannot
run in an interpreted process (TRITON_INTERPRET=1): one process has one kind of kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    registers, stack   per thread; bytes of stack are where spilled registers go
    spills             store instructions to the stack
    shared             bytes of shared memory per program
    wide_copies        16-byte asynchronous copies from global to shared memory
    wgmma              instructions of Hopper's matrix unit; mma those of Ampere's and of Blackwell's; fp8_mma those
                       of any that multiply 8-bit floats
    buffers            tiles of each kind that are in flight in the main loop, least of them; 0 without such a loop
    """

    registers: int
    stack: int
    spills: int
    shared: int
    wide_copies: int
    wgmma: int
    mma: int
    fp8_mma: int
    buffers: int


def compile_kernel(
    kernel: Any, arch: int, arguments: Mapping[str, Any], num_warps: int, num_stages: int, **options: Any
) -> Usage:
    """Compile for compute capability `arch` (80, 90, 100) with aligned pointers.

    arguments  name -> Triton type ("*bf16", "i32", "fp32") of a run-time argument, or the value of a constexpr
    """
    names: list[str] = kernel.arg_names
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else str(arguments[name]) for name in names}
    constexprs = {name: arguments[name] for name in names if name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constexprs, aligned)
    target = GPUTarget("cuda", arch, 32)
    built = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages, **options})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        resources = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    return Usage(
        registers=_number(resources, r"REG:(\d+)"),
        stack=_number(resources, r"STACK:(\d+)"),
        spills=len(re.findall(r"\bSTL\b", sass)),
        shared=built.metadata.shared,
        wide_copies=len(re.findall(r"\bLDGSTS\S*\.128\b", sass)),
        wgmma=len(re.findall(r"\bHGMMA\b", sass)),
        mma=len(re.findall(r"\bHMMA\b|\bUTCHMMA\b", sass)),
        fp8_mma=len(re.findall(r"\bQG?MMA\b|\bUTCQMMA\b", sass)),
        buffers=_buffers(built.asm["ttgir"]),
    )


def _tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([_BIN / name, *arguments], check=True, capture_output=True, text=True, timeout=60).stdout


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of {pattern}: {text[:200]!r}")
    return int(found.group(1))


def _buffers(ttgir: str) -> int:
    """Depth of the least pipelined array: `ttg.local_alloc` without a source is [depth, rows, columns]."""
    depths = re.findall(r"ttg\.local_alloc\s*(?:\{[^}]*\}\s*)?:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)
    return min(map(int, depths), default=0)
