"""The run as a picture: accuracy against tokens per forward, a line per policy; and measured against predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.bench.parallel.cases import DETERMINISTIC, RANDOM
from server.bench.parallel.measure import Figures
from server.bench.parallel.report import SIGMAS, comparisons, totals
from server.bench.parallel.sweep import AUTOREGRESSIVE, SEQUENTIAL
from server.bench.plot import require_matplotlib as require_matplotlib


def draw(path: Path, figures: Sequence[Figures], title: str) -> None:
    """Write a PNG. Raises BenchError without matplotlib."""
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(17, 6), layout="constrained")
    figure.suptitle(title)
    colours = plt.get_cmap("tab20").colors
    policies = list(dict.fromkeys(one.policy for one in figures))
    styles = {
        policy: {"color": colours[i % 20], "marker": "os^vDP"[i // 20 % 6], "markersize": 4}
        for i, policy in enumerate(policies)
    }
    _lines(axes[0], figures, DETERMINISTIC, "deterministic tasks, temperature 0", styles)
    _lines(axes[1], figures, RANDOM, "random tasks, temperature 1", styles)
    _theory(axes[2], figures, styles)
    handles, labels = axes[0].get_legend_handles_labels()
    if not handles:
        handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(
    axis: Any, figures: Sequence[Figures], tasks: Sequence[str], title: str, styles: dict[str, dict[str, Any]]
) -> None:
    found = totals(figures, tasks)
    for policy in dict.fromkeys(total.policy for total in found):
        line = sorted((t.tokens_per_forward, t.accuracy) for t in found if t.policy == policy)
        style = styles[policy]
        if policy in (AUTOREGRESSIVE.policy, SEQUENTIAL):
            style = {**style, "marker": "*", "markersize": 14, "linestyle": "none"}
        axis.plot([x for x, _ in line], [y for _, y in line], label=policy, linewidth=1.2, **style)
    low = min((total.accuracy for total in found), default=0.0)
    limits = (max(-0.02, low - 0.1), 1.02)
    axis.set(title=title, xlabel="tokens per forward", ylabel="accuracy, mean of the tasks", ylim=limits)
    axis.grid(alpha=0.3)


def _theory(axis: Any, figures: Sequence[Figures], styles: dict[str, dict[str, Any]]) -> None:
    for c in comparisons(figures):
        style = styles[c.figures.policy]
        axis.errorbar(c.predicted, c.figures.accuracy, yerr=SIGMAS * c.sigma, linewidth=0.8, **style)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axis.set_ylim(-0.05, 1.05)
    axis.set(
        title="random tasks against theory, 3 sigma", xlabel="perfect model x own accuracy", ylabel="measured accuracy"
    )
    axis.grid(alpha=0.3)
