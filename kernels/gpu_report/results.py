"""What a run found, as data: what is printed and what stands in the JSON file, and nothing else.

A dry run (an interpreted one, on a CPU) has cases and reasons but no figure: those of its clock never enter a result.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

SCHEMA = 1


@dataclass(frozen=True)
class BaselineResult:
    """us: its time on the same values; ratio: its time / ours, median of the rounds, so above 1 ours is faster.

    reason  why there is no time; us and ratio are then None, as in a dry run
    """

    name: str
    us: float | None = None
    ratio: float | None = None
    ratio_spread: float | None = None
    is_graph: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case of attention; a sparse one has our dense kernel as its only baseline. Fractions are of what the same run
    measured.

    keys            of its longest sequence
    spread          (third - first quartile) / median of our time
    noise           our own (dense) kernel timed twice: |ratio - 1| plus the ratio's range. A smaller effect is none
    copy_fraction   bytes/s over the copy rate; floor_fraction  floor / time
    parts_ratio     time / sum of the times of its parts, same rounds
    plan_us         host time of planning the step (once a step, for all layers), copies to and from the device included
    combine_share   of the device time, that of merging cut units
    is_graph        a CUDA graph was replayed
    reason          why there is no figure
    """

    case: str
    kind: str
    group: int
    head_dim: int
    kv_dtype: str
    batch: int
    keys: int
    num_bytes: int
    num_flop: int
    us: float | None = None
    spread: float | None = None
    noise: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    copy_fraction: float | None = None
    floor_fraction: float | None = None
    parts_ratio: float | None = None
    plan_us: float | None = None
    combine_share: float | None = None
    is_graph: bool | None = None
    reason: str | None = None
    baselines: tuple[BaselineResult, ...] = ()

    def ratio_to(self, baseline: str) -> float | None:
        return next((found.ratio for found in self.baselines if found.name == baseline), None)


@dataclass(frozen=True)
class Check:
    """figure: worst error as a share of its bound, or a count that must be 0; None if the check raised."""

    name: str
    is_right: bool
    figure: float | None
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """One goal of `attention.md` 1.3 or of serving. outcome: "goal", "met", "missed" or "not measured"."""

    name: str
    outcome: str
    figure: float | None
    limit: float
    goal: float
    is_at_least: bool
    detail: str = ""


@dataclass
class Report:
    """Grows while the run goes on, so that what was found is kept if the time ends."""

    dry_run: bool
    machine: dict[str, str | int] = field(default_factory=dict)
    copy_gb_s: float | None = None
    matrix_tflop_s: float | None = None
    checks: list[Check] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    sparse: list[CaseResult] = field(default_factory=list)
    serving: dict[str, object] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    section_s: dict[str, float] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Every check that ran passed, and some ran."""
        return bool(self.checks) and all(check.is_right for check in self.checks)

    def write(self, path: Path) -> None:
        """Whole or not at all: a reader never finds half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".new")
        draft.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        draft.replace(path)
