"""`python -m server.bench.sparse.tidal MODEL --output FILE`: the layers at which TidalDecode selects its keys.

A list made at layer i is good for layer j if it holds what layer j attends to. That is measured for every pair of
layers: `mass`, the attention of layer j that falls on the list of layer i, as a share of what falls on its own; and
`overlap`, the share of layer j's own list that is on layer i's.

The selection layer is given (the first that may be sparse); the re-selection layer is the one with the highest mean
mass over the layers behind the selection layer, each by the list it would use, the re-selection layer counting as 1.
Source: Yang et al., "TidalDecode" (2024). Departures: mass in place of the number of common tokens decides; lists are
per kv head.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.sparse import DENSE_LAYERS
from server.bench.client import BenchError
from server.bench.sparse.attended import Row
from server.bench.sparse.commands import add_rows, asking_rows, make_parser, run
from server.bench.sparse.passes import Reader
from server.bench.sparse.selection import exact_scores, keep, mass, probabilities
from server.models.checkpoint import checkpoint_hash
from server.models.locate import resolve_model

TITLE = "Find the layers at which TidalDecode selects its keys."


@dataclass(frozen=True, slots=True)
class Choice:
    """`reselection_layer` is None if no layer is behind the selection layer. `mean_mass` by candidate."""

    selection_layer: int
    reselection_layer: int | None
    mean_mass: dict[int, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. 0 = written, 2 = not (stderr says why)."""
    parser = make_parser("tidal", TITLE)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    add_rows(parser)
    parser.add_argument("--share", type=int, default=16, help="a list has a 1/SHARE of the keys")
    parser.add_argument("--selection-layer", type=int, default=DENSE_LAYERS)
    return run("tidal", _calibrate, parser, argv)


def _calibrate(args: argparse.Namespace) -> None:
    folder = resolve_model(args.model)
    reader = Reader.open(folder, args.context)
    if not DENSE_LAYERS <= args.selection_layer < reader.config.num_layers:
        raise BenchError(
            f"--selection-layer is {args.selection_layer}, must be between {DENSE_LAYERS} and the last layer, "
            f"{reader.config.num_layers - 1}"
        )
    bar = asking_rows(args, reader, folder)
    masses, overlaps = agreement(
        bar, reader.config.num_layers, args.context // args.share, reader.config.head_dim**-0.5
    )
    choice = choose(masses, args.selection_layer)
    told = asdict(choice) | {
        "model_hash": checkpoint_hash(folder),
        "context": args.context,
        "budget": args.context // args.share,
        "mass": masses.tolist(),
        "overlap": overlaps.tolist(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(as_table("mass", masses))
    print(as_table("overlap", overlaps))
    print(f"selection layer {choice.selection_layer}, re-selection layer {choice.reselection_layer}: {args.output}")


def agreement(rows: Iterable[Row], num_layers: int, budget: int, scale: float) -> tuple[Tensor, Tensor]:
    """Means over rows and kv heads, float64 [list of layer, layer that uses it]: mass as a share of the own list's, and
    overlap. Raises ValueError if there are no rows."""
    masses = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    overlaps, count = torch.zeros_like(masses), 0
    for row in rows:
        lists = [keep(exact_scores(q, k), budget) for q, k in zip(row.queries, row.keys, strict=True)]
        for j, (q_KGD, k_LKD) in enumerate(zip(row.queries, row.keys, strict=True)):
            p_KGL = probabilities(q_KGD, k_LKD, scale)
            own_K = mass(p_KGL, lists[j])
            for i, kept_KL in enumerate(lists):
                masses[i, j] += (mass(p_KGL, kept_KL) / own_K).double().mean()
                overlaps[i, j] += ((kept_KL & lists[j]).sum(1) / lists[j].sum(1)).double().mean()
        count += 1
    if count == 0:
        raise ValueError("the corpus is shorter than one context, so there is nothing to measure")
    return masses / count, overlaps / count


def choose(masses: Tensor, selection_layer: int) -> Choice:
    """The re-selection layer of the highest mean mass; of equals the first."""
    num_layers = len(masses)
    behind = range(selection_layer + 1, num_layers)
    mean_mass = {}
    for candidate in behind:
        used = [
            masses[selection_layer if j < candidate else candidate, j].item() if j != candidate else 1.0 for j in behind
        ]
        mean_mass[candidate] = sum(used) / len(used)
    best = max(mean_mass, key=lambda layer: mean_mass[layer], default=None)
    return Choice(selection_layer, best, mean_mass)


def as_table(name: str, values: Tensor) -> str:
    """Rows are lists, columns the layers that use them."""
    head = f"{name:>8} |" + "".join(f" layer {j:<2}" for j in range(len(values)))
    lines = [f" list {i:>2} |" + "".join(f" {value:8.1%}" for value in line) for i, line in enumerate(values.tolist())]
    return "\n".join((head, *lines))


if __name__ == "__main__":
    sys.exit(main())
