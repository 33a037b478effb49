"""One picture of a run: how the times are distributed, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.bench.client import BenchError, Sample


def require_matplotlib() -> None:
    """Called before the run, so that nobody waits for a measurement that cannot be drawn. Raises BenchError."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise BenchError(
            "--plot needs matplotlib: run `make bench` once, or pip install matplotlib; or leave --plot out"
        )


def draw(path: Path, samples: Sequence[Sample], title: str) -> None:
    """Write a PNG: cumulative TTFT and TBT, tokens per second over time, TTFT of each request when it was sent."""
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    done = [sample for sample in samples if sample.is_complete]
    if not done:
        raise BenchError("no request completed, so there is nothing to plot")
    start = min(sample.sent for sample in samples)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    _cumulative(axes[0][0], [1e3 * sample.ttft for sample in done], "time to first token, ms")
    _cumulative(axes[0][1], [1e3 * gap for sample in done for gap in sample.gaps], "time between tokens, ms")
    events = sorted(time - start for sample in done for time in sample.event_times)
    num_bins = max(1, min(60, int(events[-1] / 0.25)))
    width = max(events[-1], 1e-9) / num_bins
    counts = [0] * num_bins
    for event in events:
        counts[min(int(event / width), num_bins - 1)] += 1
    axes[1][0].step([i * width for i in range(num_bins)], [count / width for count in counts], where="post")
    axes[1][0].set(xlabel="seconds", ylabel="events with tokens per second", ylim=(0, None))
    axes[1][1].plot([s.sent - start for s in done], [1e3 * s.ttft for s in done], ".", label="answered")
    failed = [sample.sent - start for sample in samples if not sample.is_complete]
    axes[1][1].plot(failed, [0.0] * len(failed), "rx", label=f"failed ({len(failed)})")
    axes[1][1].set(xlabel="sent at, seconds", ylabel="time to first token, ms", ylim=(0, None))
    axes[1][1].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cumulative(axis: Any, values: Sequence[float], label: str) -> None:
    ordered = sorted(values)
    axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))])
    axis.set(xlabel=label, ylabel="share of all", ylim=(0, 1.01))
    if ordered and ordered[0] > 0:
        axis.set_xscale("log")
