"""Filler text: the sources and docstrings of the Python standard library on this machine, and what the tokenizer sees.

The text of the training run is that of the Python it runs on; the model card names the version. Tests and the editor
(`test`, `idlelib`) are left out, as are files that are not UTF-8.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from server.embedded import functions, tasks

SKIPPED = ("test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "turtledemo", "pydoc_data", "encodings",
           "__pycache__", "ensurepip")  # fmt: skip
MAX_FILE_BYTES = 120_000


def stdlib_texts(limit: int | None = None) -> list[str]:
    """The texts of the standard library's modules, sorted by path, at most `limit` files.

    Raises FileNotFoundError if the interpreter has no sources (a frozen or zipped installation).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in SKIPPED for part in parts) or parts[0].removesuffix(".py") not in sys.stdlib_module_names:
            continue
        if 400 <= path.stat().st_size <= MAX_FILE_BYTES:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
        if limit is not None and len(texts) >= limit:
            break
    if not texts:
        raise FileNotFoundError(f"no Python sources under {root}: the training text needs the standard library's files")
    return texts


def tokenizer_texts(seed: int, num_examples: int = 60_000) -> Iterator[str]:
    """The mix the tokenizer is trained on: standard library, functions and tasks in about the training proportions."""
    rng = random.Random(f"tokenizer:{seed}")
    yield from stdlib_texts()
    texts = list(functions.parse_functions().values())
    for index in range(num_examples):
        draw = functions.draw_function(texts, rng) if index % 4 == 0 else tasks.draw_example(rng)
        yield draw.prompt + draw.answer
