"""Compiles variants of the attention kernel for a GPU that need not be here, and says what each takes.

    python -m kernels.gpu_report.compile_only < variants.json

In: a JSON list of {"arch", "head_dim", "page", "group", "tile_rows", "tile_keys", "num_warps", "num_stages"}. Out: a
JSON line for each, in order: its registers, spills and shared bytes, or the error. A process of its own, so that
several compile at once, and none is interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kernels.gpu_report.timing import reason
from kernels.triton import attention
from kernels.triton.compiled import Usage, compile_kernel
from kernels.triton.tiles import padded_dim

Variant = Mapping[str, int]


def compile_variant(variant: Variant) -> Usage:
    """bfloat16, causal, no window and no tree: the plain specialisation that is timed, every feature off."""
    arguments: dict[str, Any] = dict.fromkeys(attention.attend.arg_names, "*i32")
    arguments |= {parameter.name: 0 for parameter in attention.attend.params if parameter.is_constexpr}
    arguments |= dict.fromkeys(("q", "k_pages", "v_pages", "out"), "*bf16")
    arguments |= {"partial_out": "*fp32", "partial_lse": "*fp32", "scale": "fp32", "table_stride": "i32"}
    head_dim = variant["head_dim"]
    arguments |= {"K": 8, "G": variant["group"], "D": head_dim, "DP": padded_dim(head_dim), "PAGE": variant["page"]}
    arguments |= {"BM": variant["tile_rows"], "BN": variant["tile_keys"], "STAGES": variant["num_stages"]}
    return compile_kernel(attention.attend, variant["arch"], arguments, variant["num_warps"], variant["num_stages"])


def usages(variants: Sequence[Variant], num_processes: int, limit_s: float) -> list[dict[str, Any]]:
    """What each variant takes, or {"error": why}; several processes, each with every n-th variant."""
    shares = [variants[first::num_processes] for first in range(min(num_processes, len(variants)))]
    command = [sys.executable, "-m", "kernels.gpu_report.compile_only"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in shares
    ]
    ends_at = time.monotonic() + limit_s
    for process, share in zip(processes, shares, strict=True):
        assert process.stdin is not None
        process.stdin.write(json.dumps(list(share)))
        process.stdin.close()
        process.stdin = None
    found: list[dict[str, Any]] = [{"error": "not compiled in time"} for _ in variants]
    for first, process in enumerate(processes):
        try:
            text = process.communicate(timeout=max(0.1, ends_at - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0]
        for number, line in enumerate(text.splitlines()):
            found[first + number * len(shares)] = json.loads(line)
    return found


def main() -> int:
    for variant in json.load(sys.stdin):
        try:
            usage = compile_variant(variant)
            line: dict[str, int | str] = {"registers": usage.registers, "spills": usage.spills, "shared": usage.shared}
        except Exception as error:
            line = {"error": reason(error)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
