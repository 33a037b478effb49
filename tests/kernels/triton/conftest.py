"""One process has either interpreted or compiled Triton kernels, so each collects only its own tests.

The interpreter's process takes minutes of one core, so it runs beside the tests that need no second one: it starts with
this folder's first test, and the test that waits for it comes before the first of `tests/server`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HERE = [
    *("test_compiled.py", "test_interpreted.py", "test_mistakes.py", "test_plan.py", "test_select.py"),
    *("test_sparse_compiled.py", "test_tile_table.py"),
]
collect_ignore = HERE if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
if importlib.util.find_spec("triton") is None:
    collect_ignore = ["interpreted"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    waiting = [item for item in items if isinstance(item, pytest.Function) and "interpreter" in item.fixturenames]
    if not waiting or importlib.util.find_spec("triton") is None:
        return
    first = next(item for item in items if Path(__file__).parent in item.path.parents)
    if isinstance(first, pytest.Function) and first not in waiting:
        first.fixturenames.append("interpreter")
    others = [item for item in items if item not in waiting]
    place = next((i for i, item in enumerate(others) if ROOT / "tests" / "server" in item.path.parents), len(others))
    items[:] = [*others[:place], *waiting, *others[place:]]


@pytest.fixture(scope="session")
def interpreter(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process that runs `interpreted/`, and the file that it writes to."""
    log = tmp_path_factory.mktemp("interpreter") / "log"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/kernels/triton/interpreted", "-x", "--tb=short"]
    if marks := request.config.getoption("markexpr"):
        command += ["-m", marks]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()
