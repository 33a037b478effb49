"""`python -m server.bench.sparse.recall MODEL --channels FILE`: how good labels of r channels are, on real q and k.

A row keeps the keys that its labels score best; the oracle keeps as many by the exact scores. Shown is the attention
that falls on the kept keys as a share of the oracle's, the mean over rows and kv heads: by layer, for each number of
channels and each size of the budget. 100 % with all channels is a matter of definition, not of the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from server.bench.sparse.attended import Row
from server.bench.sparse.commands import add_rows, asking_rows, make_parser, run
from server.bench.sparse.passes import Reader
from server.bench.sparse.selection import exact_scores, keep, label_scores, mass, probabilities
from server.models.checkpoint import checkpoint_hash
from server.models.locate import resolve_model
from server.worker.attention_calibration import Calibration, load_channels

TITLE = "Show how good labels of r channels are, on real q and k."
Point = tuple[int, int]
"""(number of channels, budget in keys)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. 0 = measured, 2 = not (stderr says why)."""
    # Another seed than calibration has.
    parser = make_parser("recall", TITLE, seed=1)
    parser.add_argument("--channels", type=Path, required=True, help="what calibrate wrote")
    add_rows(parser)
    parser.add_argument("--shares", type=int, nargs="+", default=[8, 16], help="budgets: a 1/SHARE of the keys each")
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 4, 8, 16], help="channels: head_dim / LABELS each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return run("recall", _measure, parser, argv)


def _measure(args: argparse.Namespace) -> None:
    folder = resolve_model(args.model)
    reader = Reader.open(folder, args.context)
    head_dim = reader.config.head_dim
    calibration = Calibration((str(args.channels),), checkpoint_hash(folder))
    channels_LKD = load_channels(calibration, reader.config, head_dim).long()
    points = [
        (max(1, head_dim // label), args.context // share) for share in args.shares for label in (1, *args.labels)
    ]
    bar = asking_rows(args, reader, folder)
    found = recall(bar, channels_LKD, points, head_dim**-0.5)
    where = f"{args.texts} x {args.rows} rows at {args.context} keys of {args.corpus}"
    print(f"{args.model}, channels of {args.channels}, {where}")
    print(as_table(found))
    if args.json is not None:
        told = [{"channels": r, "budget": k, "mass_by_layer": share} for (r, k), share in found.items()]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"channels": str(args.channels), "context": args.context, "recall": told}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def recall(
    rows: Iterable[Row], channels_LKD: Tensor, points: Sequence[Point], scale: float
) -> dict[Point, list[float]]:
    """By point and layer. Raises ValueError if there are no rows."""
    shares: dict[Point, list[Tensor]] = defaultdict(list)
    for row in rows:
        by_layer: dict[Point, list[Tensor]] = {point: [] for point in points}
        for layer, (q_KGD, k_LKD) in enumerate(zip(row.queries, row.keys, strict=True)):
            exact_KL, p_KGL = exact_scores(q_KGD, k_LKD), probabilities(q_KGD, k_LKD, scale)
            for count, budget in points:
                label_KL = label_scores(q_KGD, k_LKD, channels_LKD[layer, :, :count])
                best_K = mass(p_KGL, keep(exact_KL, budget))
                by_layer[count, budget].append((mass(p_KGL, keep(label_KL, budget)) / best_K).mean())
        for point, values in by_layer.items():
            shares[point].append(torch.stack(values))
    if not shares:
        raise ValueError("the corpus is shorter than one context, so there is nothing to measure")
    return {point: torch.stack(values).double().mean(0).tolist() for point, values in shares.items()}


def as_table(found: dict[Point, list[float]]) -> str:
    """Rows are points, columns layers."""
    num_layers = len(next(iter(found.values())))
    head = "channels | budget |" + "".join(f" layer {layer:<2}" for layer in range(num_layers))
    lines = [f"{r:8} | {k:6} |" + "".join(f" {share:8.1%}" for share in by_layer) for (r, k), by_layer in found.items()]
    return "\n".join((head, *lines))


if __name__ == "__main__":
    sys.exit(main())
