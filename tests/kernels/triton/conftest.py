"""One process has either interpreted or compiled Triton kernels, so each collects only its own tests."""

from __future__ import annotations

import importlib.util
import os

HERE = ["test_compiled.py", "test_interpreted.py", "test_plan.py", "test_select.py", "test_sparse_compiled.py"]
collect_ignore = HERE if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
if importlib.util.find_spec("triton") is None:
    collect_ignore = ["interpreted"]
