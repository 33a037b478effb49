"""The sections in their order, within the time: checks, the machine's rates, attention, sparse, serving, verdicts.

A section's share of the time ends where `_UNTIL` says; one that ends early leaves the rest to those behind it. The JSON
file is written after every section, and by the watchdog when the time is over whatever hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from kernels.gpu_report import checks, tables
from kernels.gpu_report.attention_times import Bench, time_case
from kernels.gpu_report.budget import Budget, Clock, Section
from kernels.gpu_report.cases import Case, all_cases, tiny_cases
from kernels.gpu_report.problems import Baseline
from kernels.gpu_report.results import Report
from kernels.gpu_report.serving import run_serving, run_worker_checks, serving_command, worker_checks_command
from kernels.gpu_report.sparse_cases import SparseCase, all_sparse_cases, tiny_sparse_cases, warm_cases
from kernels.gpu_report.sparse_times import run_once, time_sparse
from kernels.gpu_report.timing import Rates, Timer, free_memory, measure_rates, reason
from kernels.gpu_report.verdicts import all_verdicts
from kernels.triton.ops import TritonOps

SECTIONS = ("checks", "attention", "sparse", "serving")
_UNTIL = {"checks": 0.25, "attention": 0.54, "sparse": 0.66, "serving": 0.98}


@dataclass(frozen=True)
class Setup:
    """What a run is made of; a dry run differs in nothing else.

    cases    of attention, most wanted first
    sparse   of sparse attention, likewise; sparse_warm  steps that compile their kernels beforehand
    serving  command of the end-to-end part, None where there is none; worker_checks  of the worker's, likewise
    """

    ops: TritonOps
    device: torch.device
    timer: Timer
    effort: checks.Effort
    cases: Sequence[Case]
    baselines: Mapping[str, Baseline]
    serving: Sequence[str] | None
    worker_checks: Sequence[str] | None = None
    sparse: Sequence[SparseCase] = ()
    sparse_warm: Sequence[SparseCase] = ()
    rates_size: tuple[int, int] = (1 << 30, 8192)


def gpu_setup(ops: TritonOps, timer: Timer, baselines: Mapping[str, Baseline]) -> Setup:
    cases = all_cases(declared_kv_dtypes(ops))
    command = serving_command(dry_run=False)
    return Setup(
        ops, torch.device("cuda"), timer, checks.FULL, cases, baselines, command, worker_checks_command(),
        all_sparse_cases(), warm_cases(),
    )  # fmt: skip


def dry_setup(ops: TritonOps, timer: Timer, baselines: Mapping[str, Baseline]) -> Setup:
    command = serving_command(dry_run=True)
    return Setup(
        ops, torch.device("cpu"), timer, checks.DRY, tiny_cases(), baselines, command, sparse=tiny_sparse_cases(),
        rates_size=(1 << 12, 32),
    )  # fmt: skip


def declared_kv_dtypes(ops: TritonOps) -> tuple[torch.dtype, ...]:
    """Types that the back end says pages of a bfloat16 model can have besides bfloat16; none if it says nothing."""
    declare = getattr(ops, "kv_dtypes", None)
    return () if declare is None else tuple(dtype for dtype in declare(torch.bfloat16) if dtype != torch.bfloat16)


class Run:
    """One report. tell: a line for the reader."""

    def __init__(
        self, setup: Setup, seconds: float, clock: Clock, tell: Callable[[str], None], json_path: Path | None
    ) -> None:
        self._setup, self._tell, self._json_path = setup, tell, json_path
        self._budget = Budget(seconds, clock)
        self._rates: Rates | None = None
        self.report = Report(dry_run=not setup.timer.is_meaningful, machine=machine(setup.device))

    def all(self, sections: Sequence[str] = SECTIONS) -> int:
        """The chosen sections; the exit code."""
        self._tell(", ".join(f"{name} {value}" for name, value in self.report.machine.items()))
        if self.report.dry_run:
            self._tell("DRY RUN: kernels are interpreted; that the parts work is shown, and no figure is one")
        parts = (self._check, self._attention, self._sparse, self._serve)
        for name, section in zip(SECTIONS, parts, strict=True):
            if name in sections:
                section()
                self.write()
        self._judge()
        return self.finish()

    def finish(self) -> int:
        """Say what was left out, write, and give the exit code: 0 unless a check failed or none ran."""
        for line in tables.left_out_lines(self.report):
            self._tell(line)
        self.write()
        return 0 if self.report.is_right or not (self.report.checks or self.report.left_out.get("checks")) else 1

    def write(self) -> None:
        if self._json_path is not None:
            self.report.write(self._json_path)

    def watch(self, end: Callable[[int], object] = os._exit) -> threading.Timer:
        """End the process when the time is over, with what there is: whatever hangs then cannot be waited for."""

        def stop() -> None:
            self._tell(f"the time of {self._budget.seconds:.0f} s is over: what follows was not reached")
            code = self.finish()
            sys.stdout.flush()
            end(code if "attention" in self.report.section_s else 1)

        timer = threading.Timer(self._budget.remaining, stop)
        timer.daemon = True
        timer.start()
        return timer

    def _check(self) -> None:
        section = self._budget.section("checks", _UNTIL["checks"])
        families = checks.families(self._setup.ops, self._setup.device, self._setup.effort)
        for check in checks.run_checks(families, section, self._tell):
            self.report.checks.append(check)
        if self._setup.worker_checks is not None and section.fits("the worker's checks"):
            self._check_worker(section, self._setup.worker_checks)
        self._end(section.name, section.left_out, section.seconds)

    def _check_worker(self, section: Section, command: Sequence[str]) -> None:
        with section.item():
            found = run_worker_checks(command, section.remaining)
        if found is None:
            section.left_out.append("the worker's checks: not ended in time")
            return
        self.report.checks.append(found)
        self._tell(f"{'' if found.is_right else 'WRONG '}{found.name}: {found.detail}")

    def _attention(self) -> None:
        setup = self._setup
        bench = self._bench("attention")
        if bench is None:
            return
        section = self._budget.section("attention", _UNTIL["attention"])
        self._tell(tables.case_header(list(setup.baselines)))
        told: set[tuple[str, str]] = set()
        for case in section.each(setup.cases, lambda case: case.label):
            result = time_case(bench, case)
            self.report.cases.append(result)
            for line in tables.case_lines(result, told):
                self._tell(line)
        self._tell("* = no CUDA graph: the host's launches are in the time")
        self._end(section.name, section.left_out, section.seconds)

    def _sparse(self) -> None:
        """Compilation is not an item: the first one would seem to say that none like it fits any more."""
        bench = self._bench("sparse")
        if bench is None:
            return
        section = self._budget.section("sparse", _UNTIL["sparse"])
        for warm in self._setup.sparse_warm:
            if section.remaining > 0:
                self._warm(bench, warm)
        self._tell(tables.sparse_header())
        for case in section.each(self._setup.sparse, lambda case: case.label):
            for result in time_sparse(bench, case):
                self.report.sparse.append(result)
                self._tell(tables.sparse_line(result))
        self._end(section.name, section.left_out, section.seconds)

    def _warm(self, bench: Bench, case: SparseCase) -> None:
        try:
            run_once(bench, case)
        except Exception as error:
            self._tell(f"{case.label}, untimed: {reason(error)}")

    def _bench(self, section: str) -> Bench | None:
        """With the machine's rates, measured once a run; None if they cannot be, and `section` is then left out."""
        setup = self._setup
        if self._rates is None:
            try:
                self._rates = measure_rates(setup.timer, setup.device, *setup.rates_size)
            except Exception as error:
                self._end(section, [f"all cases: {reason(error)}"], 0.0)
                return None
            self._tell_rates(self._rates)
            free_memory()
        return Bench(
            setup.ops, setup.device, setup.timer, self._rates, last_cache_bytes(setup.device), setup.baselines
        )  # fmt: skip

    def _tell_rates(self, rates: Rates) -> None:
        if self.report.dry_run:
            return
        copy, matrix = rates.copy_bytes_per_s / 1e9, rates.matrix_flop_per_s / 1e12
        self.report.copy_gb_s, self.report.matrix_tflop_s = copy, matrix
        # Idle clocks say little: these are of a device that has just multiplied.
        clock = self.report.machine["sm_clock_at_work"] = _ask_driver("clocks.sm")
        self._tell(f"copy {copy:.0f} GB/s (read + write), bf16 matrix {matrix:.0f} TFLOP/s, SM clock at work {clock}")

    def _serve(self) -> None:
        section = self._budget.section("serving", _UNTIL["serving"])
        if self._setup.serving is None:
            section.left_out.append("everything: this tree has no server")
        elif section.fits("everything"):
            with section.item():
                self.report.serving = run_serving(self._setup.serving, section.remaining)
            for line in tables.serving_lines(self.report.serving):
                self._tell(line)
        self._end(section.name, section.left_out, section.seconds)

    def _judge(self) -> None:
        if self.report.dry_run:
            return
        self.report.verdicts = all_verdicts(self.report)
        for verdict in self.report.verdicts:
            self._tell(tables.verdict_line(verdict))

    def _end(self, name: str, left_out: list[str], seconds: float) -> None:
        self.report.left_out[name] = left_out
        self.report.section_s[name] = seconds


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on."""
    found: dict[str, str | int] = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type != "cuda":
        return {"device": "cpu", **found}
    gpu = torch.cuda.get_device_properties(device)
    found |= {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "cuda": str(torch.version.cuda),
    }
    for name, query in (("driver", "driver_version"), ("sm_clock", "clocks.sm"), ("memory_clock", "clocks.mem")):
        found[name] = _ask_driver(query)
    return found


def _ask_driver(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return ended.stdout.strip().splitlines()[0] if ended.returncode == 0 and ended.stdout.strip() else "unknown"


def last_cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
