"""Tier 1: the kernels in Triton's interpreter, in a process of their own, since one process interprets or compiles."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="pip install triton: shows that the Triton kernels equal their twins on CPU tensors",
)
def test_interpreted_kernels_equal_their_definitions(interpreter: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, log = interpreter
    code = process.wait(timeout=900)
    # 5, "no tests ran", is a failure too.
    assert code == 0, log.read_text(errors="replace")[-8000:]
