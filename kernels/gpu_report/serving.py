"""Starts the end-to-end part, which needs the server's engine, as a process of its own and takes over its JSON.

The kernels know nothing of the server: the module is found by name if the tree has it. It writes its file after every
measurement, so that what it has is kept if its time ends.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MODULE = "server.bench.gpu_serving"
_ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 10.0
"""To end by itself in: it is told so much less than it has."""


def serving_command(dry_run: bool) -> list[str] | None:
    """What to start, without the file and the time; None where the tree has no server."""
    parts = MODULE.split(".")
    if not _ROOT.joinpath(*parts).with_suffix(".py").exists() or importlib.util.find_spec(parts[0]) is None:
        return None
    return [sys.executable, "-m", MODULE, *(["--dry-run"] if dry_run else [])]


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
