"""The speculation benchmark's figures: a row per point and policy, what they come to, JSON and a plot."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.bench.client import Sample
from server.bench.plot import require_matplotlib as require_matplotlib
from server.bench.report import percentile


@dataclass(slots=True)
class Round:
    """One policy's share of one round: what came in the `seconds` in which every stream had a request."""

    samples: list[Sample]
    tokens: int
    seconds: float
    num_different: int = 0

    @classmethod
    def of(cls, samples: list[Sample], streams: int) -> Round:
        """samples: of `streams` closed loops that share their requests. The first of them that finds none left ends
        the measurement: from there on the load is another one, and how long that lasts depends on the policy."""
        ended = sorted(sample.finished for sample in samples)[max(0, len(samples) - streams)]
        done = [sample for sample in samples if sample.is_complete]
        seconds = ended - min(sample.sent for sample in samples)
        return cls(samples, sum(sample.tokens_by(ended) for sample in done), max(seconds, 1e-9))

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Point:
    """One policy at one point of the sweep. Milliseconds; None where no request had two arrivals.

    tokens_per_s    output tokens per second while every stream had a request
    ratio           these over those of `off` in the same round: median over the rounds, and the least and greatest
    arrival_ms      median time between two arrivals of a stream, however many tokens came with them
    token_ms        median over requests of the time per output token after the first
    ttft_ms         median time to the first token
    tokens_a_step   tokens of a step that verified drafts, its own one included (AL); None without any
    drafted, accepted   drafts per output token, and the share of these that became output
    num_different   texts that are not those of `off`
    """

    workload: str
    temperature: float
    streams: int
    policy: str
    requests: int
    failed: int
    num_different: int
    tokens_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ttft_ms: float
    arrival_ms: float | None
    token_ms: float | None
    tokens_a_step: float | None
    drafted: float
    accepted: float

    @classmethod
    def of(
        cls, workload: str, temperature: float, streams: int, policy: str, rounds: list[Round], off: list[Round]
    ) -> Point:
        samples = [sample for one in rounds for sample in one.samples]
        done = [sample for sample in samples if sample.is_complete]
        ratios = [one.speed / max(other.speed, 1e-9) for one, other in zip(rounds, off, strict=True)]
        drafted, accepted = sum(sample.drafted for sample in done), sum(sample.accepted for sample in done)
        steps = sum(sample.draft_steps for sample in done)
        tokens = sum(sample.output_tokens for sample in done)
        return cls(
            workload=workload,
            temperature=temperature,
            streams=streams,
            policy=policy,
            requests=len(samples),
            failed=len(samples) - len(done),
            num_different=sum(one.num_different for one in rounds),
            tokens_per_s=sum(one.tokens for one in rounds) / sum(one.seconds for one in rounds),
            ratio=statistics.median(ratios),
            ratio_low=min(ratios),
            ratio_high=max(ratios),
            ttft_ms=_median_ms([sample.ttft for sample in done]) or 0.0,
            arrival_ms=_median_ms([gap for sample in done for gap in sample.gaps]),
            token_ms=_median_ms([sample.tpot for sample in done if sample.tpot is not None]),
            tokens_a_step=1 + accepted / steps if steps else None,
            drafted=drafted / max(tokens, 1),
            accepted=accepted / max(drafted, 1),
        )


def _median_ms(seconds: Sequence[float]) -> float | None:
    return 1e3 * percentile(sorted(seconds), 50) if seconds else None


COLUMNS = (
    f"{'streams':>7} {'policy':<24}{'tok/s':>8}{'x off':>7}  {'(rounds)':<13}{'TTFT':>8}{'arrival':>9}{'ms/token':>9}"
    f"{'AL':>6}{'drafted':>9}{'accepted':>9}"
)


def as_table(points: Sequence[Point]) -> str:
    """A block per workload and temperature, a line per load and policy."""
    lines: list[str] = []
    heading = None
    for point in points:
        if (point.workload, point.temperature) != heading:
            heading = (point.workload, point.temperature)
            lines += ["", f"{point.workload}, temperature {point.temperature:g}", COLUMNS]
        lines.append(_line(point))
    return "\n".join(lines)


def _line(point: Point) -> str:
    spread = f"({point.ratio_low:.2f}-{point.ratio_high:.2f})"
    line = f"{point.streams:>7} {point.policy:<24}{point.tokens_per_s:>8.0f}{point.ratio:>7.2f}  {spread:<13}"
    line += f"{point.ttft_ms:>8.1f}{_or_dash(point.arrival_ms):>9}{_or_dash(point.token_ms):>9}"
    line += f"{_or_dash(point.tokens_a_step):>6}{point.drafted:>9.2f}{point.accepted:>9.0%}"
    if point.failed:
        line += f"  {point.failed} of {point.requests} FAILED"
    if point.num_different:
        line += f"  {point.num_different} of {point.requests} TEXTS DIFFER"
    return line


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def verdict(points: Sequence[Point]) -> str:
    """The two promises in figures: how `auto` does against off, and against the best fixed policy of each place."""
    lines = [""]
    autos = [point for point in points if point.policy.startswith("auto")]
    if autos:
        worst, best = min(autos, key=lambda point: point.ratio), max(autos, key=lambda point: point.ratio)
        lines.append(f"auto against off: worst {worst.ratio:.2f} ({_where(worst)})")
        lines.append(f"                  best  {best.ratio:.2f} ({_where(best)})")
    behind = []
    for auto in autos:
        fixed = [p for p in points if p.policy.startswith("fixed") and _where(p) == _where(auto)]
        if fixed:
            behind.append((auto.ratio / max(1.0, *(p.ratio for p in fixed)), auto))
    if behind:
        share, point = min(behind, key=lambda pair: pair[0])
        lines.append(f"auto against the best of off and every fixed: worst {share:.2f} ({_where(point)})")
    different = sum(point.num_different for point in points)
    lines.append(f"texts that differ from those of off: {different} of {sum(point.requests for point in points)}")
    return "\n".join(lines)


def _where(point: Point) -> str:
    return f"{point.workload}, T={point.temperature:g}, {point.streams} streams"


def write_json(path: Path, points: Sequence[Point], flags: dict[str, str], arguments: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
    }
    content = {"settings": settings, "flags": flags, "points": [asdict(point) for point in points]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def draw(path: Path, points: Sequence[Point]) -> None:
    """A column per workload and temperature: throughput above, time per token below, against load; a line a policy."""
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((point.workload, point.temperature) for point in points))
    policies = list(dict.fromkeys(point.policy for point in points))
    figure, axes = plt.subplots(2, len(kinds), figsize=(4.5 * len(kinds) + 1, 7), layout="constrained", squeeze=False)
    for column, (workload, temperature) in enumerate(kinds):
        above, below = axes[0][column], axes[1][column]
        for policy in policies:
            line = [p for p in points if (p.workload, p.temperature, p.policy) == (workload, temperature, policy)]
            style = {"linewidth": 2.2} if policy.startswith(("auto", "off")) else {"linewidth": 1.0, "linestyle": "--"}
            loads = [p.streams for p in line]
            above.plot(loads, [p.tokens_per_s for p in line], marker="o", markersize=3, label=policy, **style)
            below.plot(loads, [p.token_ms or 0.0 for p in line], marker="o", markersize=3, label=policy, **style)
        above.set(title=f"{workload}, T={temperature:g}", ylabel="output tokens per second", xscale="log")
        below.set(xlabel="streams", ylabel="ms per output token (median)", xscale="log", ylim=(0, None))
        for axis in (above, below):
            axis.set_xticks(sorted({p.streams for p in points}), [str(s) for s in sorted({p.streams for p in points})])
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
