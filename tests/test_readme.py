"""The commands that the README shows, run as a person would run them.

A fenced block whose info string holds `run` is executed with a server at the address it names:

    ```sh run
    curl -s http://127.0.0.1:8000/v1/models
    ```

Each block is one shell script and must end with status 0. `127.0.0.1:8000` and `localhost:8000` become the test's
server. A fenced block `json answer` or `text answer` right after it shows the answer: keys and texts of JSON must
agree, numbers and generated ids may differ; of other text every line must appear.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.bench.spawn import spawned_server

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no README.md yet")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it starts, its info string's words, its text, and the block that follows it."""

    line: int
    words: tuple[str, ...]
    text: str


def blocks(path: Path) -> list[Block]:
    found: list[Block] = []
    opened: tuple[int, tuple[str, ...]] | None = None
    lines: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, lines = (number, tuple(line[3:].split())), []
        elif opened is not None and line.strip() == "```":
            found.append(Block(opened[0], opened[1], "\n".join(lines)))
            opened = None
        elif opened is not None:
            lines.append(line)
    return found


def runnable() -> list[tuple[Block, Block | None]]:
    if not README.exists():
        return []
    every = blocks(README)
    following = [*every[1:], None]
    return [
        (block, after if after is not None and "answer" in after.words else None)
        for block, after in zip(every, following, strict=True)
        if "run" in block.words
    ]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with spawned_server("") as address:
        yield address


def disagreement(shown: Any, real: Any, where: str = "answer") -> str | None:
    """The first place where the real answer has another shape, or other generated text, than the one shown."""
    if isinstance(shown, dict) and isinstance(real, dict):
        if set(shown) != set(real):
            return f"{where} has keys {sorted(real)}, shown are {sorted(shown)}"
        parts = [disagreement(shown[key], real[key], f"{where}.{key}") for key in shown]
        return next((part for part in parts if part), None)
    if isinstance(shown, list) and isinstance(real, list):
        if len(shown) != len(real):
            return f"{where} has {len(real)} entries, shown are {len(shown)}"
        parts = [disagreement(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(shown, real, strict=True))]
        return next((part for part in parts if part), None)
    if where.endswith((".text", ".content", ".object", ".finish_reason")) and shown != real:
        return f"{where} is {real!r}, shown is {shown!r}"
    return None if type(shown) is type(real) else f"{where} is {real!r}, shown is {shown!r}"


@pytest.mark.parametrize(("block", "answer"), [pytest.param(b, a, id=f"line {b.line}") for b, a in runnable()])
def test_a_command_in_the_readme_works_as_printed(block: Block, answer: Block | None, url: str) -> None:
    script = re.sub(r"http://(127\.0\.0\.1|localhost):8000", url, block.text)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, f"{script}\n{result.stdout}{result.stderr}"
    assert '"error"' not in result.stdout, result.stdout
    if answer is None:
        return
    if "json" in answer.words:
        problem = disagreement(json.loads(answer.text), json.loads(result.stdout))
        assert problem is None, f"{problem}\n{result.stdout}"
    else:
        missing = [line for line in answer.text.splitlines() if line.strip() and line not in result.stdout]
        assert not missing, f"{missing} not in\n{result.stdout}"


def test_the_readme_runs_at_least_one_completion() -> None:
    assert any("/v1/completions" in block.text for block, _ in runnable()), "tag the curl block: ```sh run"


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for readme in [README, *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]:
        if ".venv" in readme.parts:
            continue
        named = {name for line in re.findall(r"`make ([a-z-]+)", readme.read_text()) for name in [line]}
        named |= {m for b in blocks(readme) for m in re.findall(r"^make ([a-z-]+)", b.text, re.M)}
        assert named <= targets, f"{readme.relative_to(ROOT)} names make targets that do not exist: {named - targets}"


def test_paths_that_are_linked_exist() -> None:
    for readme in [README, *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("[a-z]*/*/README.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)\)", readme.read_text()):
            assert (readme.parent / target).exists(), (
                f"{readme.relative_to(ROOT)} links to {target}, which does not exist"
            )


def test_the_comparison_of_answers_sees_a_difference() -> None:
    shown = {"id": "cmpl-1", "created": 1, "choices": [{"text": " 3 7 9", "index": 0}]}
    assert disagreement(shown, {"id": "cmpl-2", "created": 9, "choices": [{"text": " 3 7 9", "index": 0}]}) is None
    assert disagreement(shown, {"id": "cmpl-2", "created": 9, "choices": [{"text": " 3 7 8", "index": 0}]})
    assert disagreement(shown, {"id": "cmpl-2", "created": 9, "choices": []})
    assert disagreement(shown, {"id": "cmpl-2", "created": "now", "choices": shown["choices"]})
    assert disagreement(shown, {"id": "cmpl-2"})


def test_curl_is_there_for_the_commands() -> None:
    if any("curl" in block.text for block, _ in runnable()):
        assert shutil.which("curl"), "the README's commands need curl: apt-get install curl"
