"""Starts what needs the server's parts as processes of their own: the worker's checks, and serving end to end.

The kernels know nothing of the server: its modules are found by name if the tree has them. Serving writes its file
after every measurement, so that what it has is kept if its time ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kernels.gpu_report.results import Check

SERVING = "server.bench.gpu_serving"
WORKER_CHECKS = "server.worker.gpu_checks"
"""Exit code 0: right, 1: wrong."""
_ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 10.0
"""To end by itself in: it is told so much less than it has."""


def serving_command(dry_run: bool) -> list[str] | None:
    """What to start, without the file and the time; None where the tree has no server."""
    return [*_module(SERVING), *(["--dry-run"] if dry_run else [])] if _has(SERVING) else None


def worker_checks_command() -> list[str] | None:
    """None where the tree has no such checks."""
    return _module(WORKER_CHECKS) if _has(WORKER_CHECKS) else None


def _has(module: str) -> bool:
    return _ROOT.joinpath(*module.split(".")).with_suffix(".py").exists()


def _module(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def run_worker_checks(command: Sequence[str], limit_s: float) -> Check | None:
    """Whether they passed, with the last line they said; None if their time was over before they had ended."""
    try:
        ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        return None
    said = (ended.stdout + ended.stderr).strip().splitlines() or ["it said nothing"]
    return Check(WORKER_CHECKS, ended.returncode == 0, float(ended.returncode), said[-1][:160])


def run_serving(command: Sequence[str], limit_s: float) -> dict[str, object]:
    """The part's JSON, with a note if it did not end well. Takes at most about `limit_s` seconds."""
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serving.json"
        own_limit_s = max(1.0, limit_s - _GRACE_S)
        full = [*command, "--json", str(path), "--seconds", f"{own_limit_s:.0f}"]
        try:
            ended = subprocess.run(full, cwd=_ROOT, capture_output=True, text=True, timeout=limit_s)
            if ended.returncode != 0:
                last = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
                notes.append(f"the end-to-end part ended with code {ended.returncode}: {last[0]}")
        except subprocess.TimeoutExpired:
            notes.append(f"the end-to-end part was ended after {limit_s:.0f} s; what it had measured stands here")
        found: dict[str, object] = {}
        if path.exists():
            found = json.loads(path.read_text())
    already = found.get("notes")
    found["notes"] = [*(already if isinstance(already, list) else []), *notes]
    return found
