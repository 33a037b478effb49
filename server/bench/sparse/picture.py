"""The figures as a picture: what is found, and how much faster a step is, against the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.bench.plot import require_matplotlib as require_matplotlib
from server.bench.sparse.measure import DENSE, Accuracy, Speed


def draw(path: Path, accuracies: Sequence[Accuracy], speeds: Sequence[Speed], title: str) -> None:
    """Write a PNG. Raises BenchError without matplotlib."""
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    for number, method in enumerate(dict.fromkeys(one.method for one in accuracies)):
        style = {"color": f"C{number}", "marker": "osv^D"[number % 5], "label": method}
        found = [one for one in accuracies if one.method == method]
        left.plot([one.length for one in found], [one.share for one in found], **style)
        timed = [one for one in speeds if one.method == method and method != DENSE]
        if timed:
            right.plot([one.length for one in timed], [one.ratio for one in timed], **style)
    right.axhline(1.0, color="grey", linewidth=0.8)
    left.set(xlabel="keys", ylabel="values found whole", ylim=(-0.03, 1.03))
    right.set(xlabel="keys", ylabel="decode step, dense / sparse")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
