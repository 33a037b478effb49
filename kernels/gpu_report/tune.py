"""`--tune`: finds tile shapes on this GPU and writes their table (`attention.md` 6.4).

A grid of shapes; those that spill registers or need too much shared memory go before any GPU second is spent (compiled
in processes of their own); the rest are timed in the same rounds as what `tiles.py` chooses. First the shapes, then for
the best of them how many programs share a multiprocessor and how small a piece may be. A winner within noise changes
nothing. All times stand in the notes beside the table, losers too.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels.gpu_report.budget import Budget, Clock, Section
from kernels.gpu_report.cases import Case, Heads, Kind, decode
from kernels.gpu_report.compile_only import usages
from kernels.gpu_report.problems import PAGE, make_problem
from kernels.gpu_report.run import last_cache_bytes
from kernels.gpu_report.timing import Call, CudaTimer, HostTimer, Timer, Times, free_memory, reason
from kernels.triton.gpu_checks import Span
from kernels.triton.ops import TritonOps
from kernels.triton.tile_table import TileShape, WorkClass, current_table, read_tables, trying, write_tables

LEAST_GAIN = 0.02
"""A shape must be faster than today's by this share: the spread of one kernel timed twice."""
_SHARED_LIMIT = {8: 163 << 10, 9: 227 << 10, 10: 227 << 10}
"""Bytes of shared memory by the capability's first number."""
_FINALISTS = 3
_COMPILE_SHARE = 0.4
"""Of the time, at most."""


@dataclass(frozen=True)
class Task:
    """One class of work, what it is timed on, and the shapes to try."""

    work: WorkClass
    cases: tuple[Case, ...]
    shapes: tuple[TileShape, ...]


def all_tasks() -> list[Task]:
    """bfloat16 at head sizes 128 and 64: decode, verify, denoise blocks, prefill."""
    found = []
    for head_dim in (128, 64):
        heads = Heads(32, 8, head_dim)
        shapes = ((32, 2048), (64, 8192), (1, 32768), (8, 1024))
        decodes = [Case(f"decode {n} x {keys}", Kind.DECODE, decode(n, keys), heads) for n, keys in shapes]
        found.append(_task(16, head_dim, tuple(decodes)))
        for rows, packed in ((8, 32), (16, 64)):
            spans = ((Span(8192, rows),) * 32, (Span(1024, rows),) * 8)
            found.append(
                _task(packed, head_dim, tuple(Case(f"verify {rows} rows", Kind.VERIFY, s, heads) for s in spans))
            )
        long = ((Span(8192, 8192),), (Span(10240, 2048),), (Span(8192, 32, 32),) * 32)
        found.append(_task(0, head_dim, tuple(Case(f"long {s[0].num_rows}", Kind.PREFILL, s, heads) for s in long)))
    return found


def _task(packed_rows: int, head_dim: int, cases: tuple[Case, ...]) -> Task:
    return Task(WorkClass(packed_rows, head_dim, 2), cases, tuple(_grid(packed_rows)))


def _grid(packed_rows: int) -> Iterator[TileShape]:
    rows = (packed_rows,) if packed_rows else (64, 128)
    resident, warps = (2, (4, 8)) if packed_rows else (1, (4, 8))
    for shape in itertools.product(rows, (32, 64, 128), warps, (2, 3, 4)):
        yield TileShape(*shape, programs_per_sm=resident, min_tiles=2)


def variants_of(task: Task, capability: tuple[int, int]) -> list[dict[str, int]]:
    """The task's shapes as `compile_only` takes them."""
    fixed = {
        "arch": 10 * capability[0] + capability[1],
        "head_dim": task.work.head_dim,
        "page": PAGE,
        "group": task.cases[0].heads.group,
    }
    names = ("tile_rows", "tile_keys", "num_warps", "num_stages")
    return [{**fixed, **{name: getattr(shape, name) for name in names}} for shape in task.shapes]


def prune(
    task: Task, taken: Sequence[Mapping[str, Any]], capability: tuple[int, int]
) -> tuple[list[TileShape], list[dict[str, Any]]]:
    """Shapes worth a GPU's time, with as many programs a multiprocessor as fit into its memory, and notes on all.

    taken  by each shape, as `compile_only` says it
    """
    limit = _SHARED_LIMIT.get(capability[0], 99 << 10)
    kept, notes = [], []
    for shape, usage in zip(task.shapes, taken, strict=True):
        why = usage.get("error")
        if why is None and usage["spills"]:
            why = f"{usage['spills']} spill stores"
        if why is None and usage["shared"] > limit:
            why = f"{usage['shared']} bytes of shared memory, {limit} are there"
        notes.append({"shape": asdict(shape), **usage, **({} if why is None else {"dropped": why})})
        if why is None:
            resident = min(shape.programs_per_sm, limit // max(1, usage["shared"]))
            kept.append(replace(shape, programs_per_sm=resident))
    return kept, notes


class Tuner:
    """Times shapes on the cases of a class. Today's shape stands beside every trial."""

    def __init__(self, make_ops: Callable[[], TritonOps], device: torch.device, timer: Timer) -> None:
        self._make_ops, self._device, self._timer = make_ops, device, timer

    def relative_times(self, work: WorkClass, case: Case, shapes: Sequence[TileShape]) -> dict[TileShape, float | str]:
        """Median over rounds of each shape's time / that of today's, or why it has none."""
        problem = make_problem(self._make_ops(), case, self._device, last_cache_bytes(self._device))
        tables = {"today": current_table(), **{str(n): {work: shape} for n, shape in enumerate(shapes)}}

        def on_all_pools(ops: TritonOps) -> Call:
            def call() -> None:
                for k_pages, v_pages in problem.pools:
                    ops.paged_attention(problem.q_TQD, k_pages, v_pages, problem.rows, problem.scale)

            return call

        calls, failed = dict[str, Call](), dict[str, str]()
        for name, table in tables.items():
            call = on_all_pools(self._make_ops())
            try:
                with trying(table):  # the first call plans, and the plan is kept for these rows
                    call()
                calls[name] = call
            except Exception as error:
                failed[name] = reason(error)
        found = {**self._timer.time(calls), **failed}
        today = found["today"]
        free_memory()
        if not isinstance(today, Times):
            return dict.fromkeys(shapes, today)
        result: dict[TileShape, float | str] = {}
        for n, shape in enumerate(shapes):
            times = found[str(n)]
            result[shape] = times.over(today).median if isinstance(times, Times) else times
        return result

    def best(self, task: Task, shapes: Sequence[TileShape], section: Section) -> tuple[TileShape | None, list[Any]]:
        """The winner, None if today's shape is as good, and notes with the times of all."""
        notes: list[Any] = []
        first = self._scores(task, shapes, section, notes)
        finalists = sorted(first, key=first.__getitem__)[:_FINALISTS]
        rest = [
            replace(shape, programs_per_sm=programs, min_tiles=tiles)
            for shape in finalists
            for programs, tiles in itertools.product((1, 2, 3), (1, 2, 4))
            if (programs, tiles) != (shape.programs_per_sm, shape.min_tiles)
        ]
        scores = first | self._scores(task, rest, section, notes)
        if not scores:
            return None, notes
        winner = min(scores, key=scores.__getitem__)
        return (winner if scores[winner] < 1 - LEAST_GAIN else None), notes

    def _scores(
        self, task: Task, shapes: Sequence[TileShape], section: Section, notes: list[Any]
    ) -> dict[TileShape, float]:  # fmt: skip
        """Geometric means over the cases that fit into the time, of shapes that ran all of them."""
        ratios: dict[TileShape, list[float]] = {shape: [] for shape in shapes}
        num_cases = 0
        if not shapes:
            return {}
        for case in section.each(task.cases, lambda case: f"{task.work}: {case.label}"):
            num_cases += 1
            for shape, ratio in self.relative_times(task.work, case, shapes).items():
                notes.append({"case": case.label, "shape": asdict(shape), "over_today": ratio})
                if isinstance(ratio, float):
                    ratios[shape].append(ratio)
        return {s: math.exp(sum(map(math.log, r)) / len(r)) for s, r in ratios.items() if r and len(r) == num_cases}


def tune(path: Path, seconds: float, clock: Clock, tell: Callable[[str], None], dry_run: bool) -> int:
    """Write the table of this GPU into `path` (other GPUs' stay) and the notes beside it; 0 = done."""
    device = torch.device("cpu" if dry_run else "cuda")
    if dry_run:
        tell("DRY RUN: the grid is only compiled, for sm_90; nothing is timed and nothing written")
    capability = (9, 0) if dry_run else torch.cuda.get_device_capability()
    tasks = all_tasks()
    section = Budget(seconds, clock).section("tuning", 1.0)
    variants = [variant for task in tasks for variant in variants_of(task, capability)]
    share_s = section.remaining * (1.0 if dry_run else _COMPILE_SHARE)
    taken = iter(usages(variants, os.cpu_count() or 1, share_s))
    tuner = Tuner(TritonOps, device, HostTimer(clock) if dry_run else CudaTimer())
    table, notes = dict[WorkClass, TileShape](), list[Any]()
    for task in tasks:
        kept, compiled = prune(task, list(itertools.islice(taken, len(task.shapes))), capability)
        dropped = collections.Counter(note["dropped"] for note in compiled if "dropped" in note).most_common(3)
        tell(f"{task.work}: {len(kept)} of {len(task.shapes)} shapes fit; dropped most: {dropped}")
        winner, timed = (None, []) if dry_run else tuner.best(task, kept, section)
        notes.append({"class": asdict(task.work), "compiled": compiled, "timed": timed})
        if winner is not None:
            table[task.work] = winner
        if not dry_run:
            tell(f"{task.work}: {winner or 'what is there stays'}")
    for item in section.left_out:
        tell(f"left out: {item}")
    if not dry_run:
        tables, name = read_tables(path), f"{capability[0]}.{capability[1]}"
        write_tables(path, {**tables, name: {**tables.get(name, {}), **table}})
        path.with_suffix(".notes.json").write_text(json.dumps(notes, indent=1) + "\n")
        tell(f"wrote {path}; it counts once it is kernels/triton/measured_tiles.json")
    return 0
