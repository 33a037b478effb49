"""Tier 1: the kernels in Triton's interpreter, in a process of their own, since one process interprets or compiles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="pip install triton: shows that the Triton kernels equal their twins on CPU tensors",
)
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_their_definitions(marked: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/kernels/triton/interpreted", "-x", "--tb=short", "-m", marked]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    # 5, "no tests ran", is a failure too.
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
