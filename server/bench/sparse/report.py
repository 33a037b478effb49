"""The figures as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.bench.sparse.measure import Accuracy, Speed


def as_table(accuracies: Sequence[Accuracy], speeds: Sequence[Speed]) -> str:
    """One line a length and method. `1st` ... are tokens of the value; the first is dense with every method."""
    fast = {(speed.length, speed.method): speed for speed in speeds}
    lines = ["  keys | method                | budget | right         |    1st    2nd    3rd | ms/step | dense / this"]
    for one in accuracies:
        tokens = " ".join(f"{right / one.count:6.1%}" for right in one.by_token)
        speed = fast.get((one.length, one.method))
        timed = "      - |            -" if speed is None else f"{speed.ms:7.2f} | {speed.ratio:12.2f}"
        right = f"{one.share:6.1%} of {one.count}"
        lines.append(f"{one.length:6} | {one.method:21} | {one.budget:6} | {right:13} | {tokens} | {timed}")
    return "\n".join(lines)


def write_json(path: Path, accuracies: Sequence[Accuracy], speeds: Sequence[Speed], settings: dict[str, Any]) -> None:
    told = {
        "settings": settings,
        "accuracy": [asdict(one) | {"share": one.share} for one in accuracies],
        "speed": [asdict(one) for one in speeds],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
