"""The figures of a run as tables, JSON, and the three statements that the run is for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.bench.parallel.cases import DETERMINISTIC, RANDOM
from server.bench.parallel.measure import Figures, Theory
from server.bench.parallel.sweep import AUTOREGRESSIVE, ONE_BY_ONE, SEQUENTIAL

MIN_SEQUENTIAL = 0.97
MIN_TOKENS_PER_FORWARD = 3.5
MAX_LOSS = 0.01
SIGMAS = 3.0
MIN_OWN = 0.6
"""A model that is right less often with one token a step has not learnt the task's distribution: what it does with
several says nothing about the sampler, and being within a band around next to nothing is no achievement."""


@dataclass(frozen=True, slots=True)
class Total:
    """Several tasks of one setting together: accuracy is the mean over tasks, tokens and forwards are summed."""

    policy: str
    setting: str
    accuracy: float
    tokens_per_forward: float
    tokens_per_pass: float

    @classmethod
    def of(cls, figures: Sequence[Figures]) -> Total:
        tokens, forwards = sum(f.tokens for f in figures), sum(f.forwards for f in figures)
        passes = forwards + sum(f.commit_passes for f in figures)
        accuracy = math.fsum(f.accuracy for f in figures) / len(figures)
        return cls(figures[0].policy, figures[0].setting, accuracy, tokens / max(forwards, 1), tokens / max(passes, 1))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A setting of a random task against theory. `own` is the model's accuracy with one token a step in the same order,
    where a perfect one would always be right: its own errors are not the sampler's, so theory is scaled by it."""

    figures: Figures
    own: float
    predicted: float
    sigma: float

    @property
    def z(self) -> float:
        return (self.figures.accuracy - self.predicted) / self.sigma

    @property
    def is_within(self) -> bool:
        return abs(self.z) <= SIGMAS

    @property
    def is_telling(self) -> bool:
        return self.own >= MIN_OWN


def totals(figures: Sequence[Figures], tasks: Sequence[str]) -> list[Total]:
    """One per setting that was measured on any of `tasks`, in order."""
    groups: dict[str, list[Figures]] = {}
    for one in figures:
        if one.task in tasks:
            groups.setdefault(one.setting, []).append(one)
    return [Total.of(group) for group in groups.values()]


def compare(one: Figures, single: Figures) -> Comparison:
    """single: the same task with one token a step. Both counts have their own noise."""
    assert one.expected is not None, "theory says nothing of this setting"
    assert one.variance is not None, "theory says nothing of this setting"
    own = single.accuracy
    # Never quite 0 or 1: a model that made no error in so many cases may still make one in the next.
    smooth = (single.right + 1) / (single.cases + 2)
    errors = smooth * (1 - smooth) * one.expected**2
    variance = smooth * smooth * one.variance / one.cases**2 + errors / one.cases + errors / single.cases
    return Comparison(one, own, own * one.expected, math.sqrt(variance))


def comparisons(figures: Sequence[Figures]) -> list[Comparison]:
    """Every random task of every setting that theory predicts, but those that the others are scaled by."""
    found = []
    for one in figures:
        if one.expected is None or one.theory is Theory.BLIND:
            continue
        single = _one_by_one(one, figures)
        if single is not one:
            found.append(compare(one, single))
    return found


def _one_by_one(one: Figures, figures: Sequence[Figures]) -> Figures:
    """The same task with one token a step in the same order; left to right where that was not measured."""
    policy = ONE_BY_ONE.get(one.policy)
    # A perfect model that never fixes two items at once is always right.
    single = [f for f in figures if (f.policy, f.task) == (policy, one.task) and (f.expected or 0.0) > 1 - 1e-9]
    return single[0] if single else next(f for f in figures if (f.setting, f.task) == (SEQUENTIAL, one.task))


def as_table(figures: Sequence[Figures]) -> str:
    """Deterministic and random tasks, a line per setting each; then the random tasks against theory."""
    parts = [
        _block("deterministic tasks, temperature 0", figures, DETERMINISTIC),
        _block("random tasks, temperature 1 (in brackets: a perfect model with the same steps)", figures, RANDOM),
        _theory_block(comparisons(figures)),
    ]
    return "\n\n".join(part for part in parts if part)


def _block(title: str, figures: Sequence[Figures], tasks: Sequence[str]) -> str:
    shown = [task for task in tasks if any(one.task == task for one in figures)]
    if not shown:
        return ""
    by_key = {(one.setting, one.task): one for one in figures}
    width = max(14, *(len(task) + 2 for task in shown))
    head = f"{'setting':<24}{'accuracy':>9}{'tok/fwd':>9}{'tok/pass':>9}" + "".join(f"{t:>{width}}" for t in shown)
    lines = [title, head]
    for total in totals(figures, shown):
        cells = (_cell(by_key.get((total.setting, task))) for task in shown)
        lines.append(
            f"{total.setting:<24}{total.accuracy:>9.1%}{total.tokens_per_forward:>9.2f}{total.tokens_per_pass:>9.2f}"
            + "".join(f"{cell:>{width}}" for cell in cells)
        )
    return "\n".join(lines)


def _cell(one: Figures | None) -> str:
    if one is None:
        return "-"
    return f"{one.accuracy:.1%}" + ("" if one.expected is None else f" ({one.expected:.1%})")


def _theory_block(found: Sequence[Comparison]) -> str:
    if not found:
        return ""
    head = f"{'setting':<24}{'task':<16}{'measured':>9}{'perfect':>9}{'x own':>9}{'3 sigma':>9}{'z':>7}  theory"
    lines = ["random tasks against theory (own: this model's accuracy with one token a step in the same order)", head]
    for c in found:
        one = c.figures
        mark = ("" if c.is_within else "  OUTSIDE") + ("" if c.is_telling else "  (tells nothing: own is low)")
        lines.append(
            f"{one.setting:<24}{one.task:<16}{one.accuracy:>9.1%}{one.expected:>9.1%}{c.predicted:>9.1%}"
            f"{SIGMAS * c.sigma:>9.1%}{c.z:>7.1f}  {one.theory}{mark}"
        )
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A statement about the run, and whether the run shows it."""

    holds: bool
    text: str

    def __str__(self) -> str:
        return f"{'shown' if self.holds else 'NOT SHOWN'}: {self.text}"


def verdicts(figures: Sequence[Figures]) -> list[Verdict]:
    """The three statements, as far as tasks were measured that they speak of."""
    found = []
    sequential = [one for one in figures if one.setting == SEQUENTIAL and one.task in DETERMINISTIC]
    if sequential:
        found += [_sequential_verdict(figures, sequential), _speed_verdict(figures)]
    if checked := comparisons(figures):
        found.append(_theory_verdict(checked))
    return found


def _theory_verdict(checked: Sequence[Comparison]) -> Verdict:
    telling = [c for c in checked if c.is_telling]
    outside = [c for c in telling if not c.is_within]
    weak = {c.figures.task: c.own for c in checked if not c.is_telling}
    text = f"random tasks within {SIGMAS:g} sigma of theory: {len(telling) - len(outside)} of {len(telling)}"
    text += "".join(f"; {c.figures.setting} {c.figures.task} z={c.z:.1f}" for c in outside)
    if weak:
        names = ", ".join(f"{task} {own:.0%}" for task, own in weak.items())
        text += f"; untested, right too seldom with one token a step: {names}"
    return Verdict(bool(telling) and not outside and not weak, text)


def _sequential_verdict(figures: Sequence[Figures], sequential: Sequence[Figures]) -> Verdict:
    alone = {one.task: one for one in figures if one.setting == AUTOREGRESSIVE.label}
    cells = [
        f"{one.task} {one.accuracy:.1%}" + (f" ({alone[one.task].accuracy:.1%})" if one.task in alone else "")
        for one in sequential
    ]
    text = f"deterministic tasks at least {MIN_SEQUENTIAL:.0%} one token a step (token by token): {', '.join(cells)}"
    return Verdict(all(one.accuracy >= MIN_SEQUENTIAL for one in sequential), text)


def _speed_verdict(figures: Sequence[Figures]) -> Verdict:
    """The fastest setting of each policy that loses at most `MAX_LOSS` on the deterministic tasks."""
    all_totals = totals(figures, DETERMINISTIC)
    least = next(t.accuracy for t in all_totals if t.setting == SEQUENTIAL) - MAX_LOSS
    best: dict[str, Total] = {}
    for total in all_totals:
        known = best.get(total.policy)
        is_good = total.accuracy >= least and total.setting != AUTOREGRESSIVE.label
        if is_good and (known is None or total.tokens_per_forward > known.tokens_per_forward):
            best[total.policy] = total
    ranked = sorted(best.values(), key=lambda total: -total.tokens_per_forward)
    fast = [total for total in ranked if total.tokens_per_forward >= MIN_TOKENS_PER_FORWARD]
    names = ", ".join(f"{t.setting} {t.tokens_per_forward:.2f}" for t in (fast or ranked[:3]))
    if not fast:
        names = f"none; the fastest are {names}"
    target = f"{MIN_TOKENS_PER_FORWARD:g} tokens a forward within {100 * MAX_LOSS:g} point of sequential"
    return Verdict(bool(fast), f"{target}: {names}")


def write_json(path: Path, figures: Sequence[Figures], settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": settings,
        "figures": [asdict(one) for one in figures],
        "comparisons": [
            {"setting": c.figures.setting, "task": c.figures.task, "predicted": c.predicted, "sigma": c.sigma, "z": c.z}
            for c in comparisons(figures)
        ],
        "verdicts": [asdict(verdict) for verdict in verdicts(figures)],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
