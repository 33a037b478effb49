"""The scheduler without a machine: fake worker, virtual clock, and a step time made of a curve and noise."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from scheduler.fake_worker import FakeDrafter, FakeWorker, features_of
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from scheduler.types import (
    Limits,
    Request,
    Sampling,
    SpeculationSettings,
    StepFeatures,
    StepPlan,
    StepResult,
    StepSample,
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Step time of an imagined machine.

    curve            (rows, seconds), linear in between: weights and arithmetic
    key_s            seconds per key read by a decode; prefill_key_s per (prompt row, key)
    draft_s          seconds per sequence that is asked for drafts
    noise            sigma of the log of the time; outlier_rate of the steps take outlier_factor times as long
    The default resembles 160 M bf16 parameters on 2 cores.
    """

    curve: tuple[tuple[float, float], ...] = ((1, 0.0100), (8, 0.0108), (32, 0.0140), (128, 0.0250), (512, 0.0660))
    key_s: float = 5e-7
    prefill_key_s: float = 2e-8
    draft_s: float = 0.0
    noise: float = 0.05
    outlier_rate: float = 0.002
    outlier_factor: float = 10.0

    def seconds(self, features: StepFeatures, rng: random.Random | None) -> float:
        """The time of a step; without `rng` there is no noise."""
        exact = self._rows(features.tokens)
        exact += self.key_s * features.context_tokens + self.prefill_key_s * features.prefill_context
        if rng is None:
            return exact
        factor = self.outlier_factor if rng.random() < self.outlier_rate else 1.0
        return exact * factor * math.exp(rng.gauss(0.0, self.noise))

    def draft_seconds(self, plan: StepPlan) -> float:
        return self.draft_s * sum(span.num_drafts > 0 for span in plan.spans)

    def _rows(self, rows: int) -> float:
        points = self.curve
        for (x0, y0), (x1, y1) in pairwise(points):
            if rows <= x1 or (x1, y1) == points[-1]:
                return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
        return points[0][1]

    def profile(self, rng: random.Random) -> list[StepSample]:
        """What a worker measures at start."""
        sizes = (StepFeatures(1, 0, 1, 64), StepFeatures(8, 0, 8, 8 * 64), StepFeatures(32, 0, 32, 32 * 64))
        chunks = tuple(StepFeatures(n, n, 0, 0, n * (n + 1) // 2) for n in (32, 128, 512))
        return [StepSample(features, self.seconds(features, rng)) for features in (*sizes, *chunks)]


@dataclass(frozen=True, slots=True)
class Arrival:
    time_s: float
    request: Request


@dataclass(slots=True)
class Report:
    """Times in seconds. tbt: gaps between successive deltas of one request; step_error: predictions, as a fraction."""

    ttft_s: list[float] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    num_steps: int = 0
    num_preempted: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    elapsed_s: float = 0.0
    step_error: float = 0.0

    def lines(self) -> Iterable[str]:
        rate = self.output_tokens / self.elapsed_s if self.elapsed_s else 0.0
        yield f"{self.num_steps} steps in {self.elapsed_s:.2f} s, {self.num_preempted} preemptions"
        yield f"{rate:.0f} output tok/s, {self.prefill_tokens / max(self.elapsed_s, 1e-9):.0f} prompt tok/s"
        for name, values in (("TTFT", self.ttft_s), ("TBT", self.tbt_s)):
            if values:
                p50, p90, p99 = (1e3 * percentile(values, q) for q in (50, 90, 99))
                yield f"{name} ms: p50 {p50:.1f}  p90 {p90:.1f}  p99 {p99:.1f}  max {1e3 * max(values):.1f}"
        if self.draft_tokens:
            share = self.accepted_tokens / self.draft_tokens
            yield f"{self.draft_tokens} drafts verified, {100 * share:.0f} % accepted"
        yield f"step-time prediction: mean absolute error {100 * self.step_error:.1f} %"


def percentile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))]


def simulate(
    limits: Limits,
    arrivals: Sequence[Arrival],
    machine: Machine,
    seed: int = 0,
    until_s: float = math.inf,
    speculation: SpeculationSettings | None = None,
    drafter: FakeDrafter | None = None,
) -> Report:
    """Run arrivals (sorted by time) to their end, or to `until_s`, in virtual time."""
    rng = random.Random(seed)
    scheduler = Scheduler(limits, StepCost(machine.profile(rng)), speculation=speculation)
    worker = FakeWorker(limits.num_pages, limits.page_size, drafter=drafter)
    report = Report()
    pending = list(reversed(arrivals))
    arrived: dict[str, float] = {}
    last_token: dict[str, float] = {}
    now = 0.0
    while (pending or scheduler.has_work) and now < until_s:
        while pending and pending[-1].time_s <= now:
            arrival = pending.pop()
            if scheduler.add(arrival.request, now) is None:
                arrived[arrival.request.id] = arrival.time_s
        plan = scheduler.schedule(now)
        if plan is None:
            now = pending[-1].time_s if pending else until_s
            continue
        draft_s = machine.draft_seconds(plan)
        elapsed = machine.seconds(features_of(plan), rng) + draft_s
        now += elapsed
        deltas, stats = scheduler.update(plan, StepResult(plan.step, worker.run(plan), elapsed, draft_s), now)
        for delta in deltas:
            if delta.tokens:
                before = last_token.get(delta.request_id)
                if before is None:
                    report.ttft_s.append(now - arrived[delta.request_id])
                else:
                    report.tbt_s.append(now - before)
                last_token[delta.request_id] = now
            if delta.finish_reason is not None:
                report.latency_s.append(now - arrived[delta.request_id])
        report.num_steps += 1
        report.num_preempted += stats.num_preempted
        report.prefill_tokens += stats.prefill_tokens
        report.output_tokens += stats.generated_tokens
        report.draft_tokens += stats.draft_tokens
        report.accepted_tokens += stats.accepted_tokens
    report.elapsed_s = now
    report.step_error = scheduler.policy.cost.mean_error
    return report


def poisson(num_requests: int, rate: float, prompt: int, output: int, seed: int) -> list[Arrival]:
    """Poisson arrivals at `rate` per second, with lengths spread around `prompt` and `output` tokens."""
    rng = random.Random(seed)
    now, arrivals = 0.0, []
    for number in range(num_requests):
        now += rng.expovariate(rate)
        size = max(1, round(rng.lognormvariate(math.log(prompt), 0.5)))
        most = max(1, round(rng.lognormvariate(math.log(output), 0.5)))
        arrivals.append(Arrival(now, request_of(f"r{number}", size, most, rng)))
    return arrivals


def trace(path: Path, seed: int) -> list[Arrival]:
    """Recorded arrivals: JSON lines with time_s, prompt_tokens and max_tokens."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows.sort(key=lambda row: float(row["time_s"]))
    return [
        Arrival(float(row["time_s"]), request_of(f"r{n}", int(row["prompt_tokens"]), int(row["max_tokens"]), rng))
        for n, row in enumerate(rows)
    ]


def request_of(request_id: str, prompt: int, max_tokens: int, rng: random.Random) -> Request:
    """A request with a random prompt of this length and a random seed."""
    tokens = tuple(rng.choices(range(4096), k=prompt))
    return Request(request_id, tokens, max_tokens, Sampling(seed=rng.getrandbits(63)))


def stall(limits: Limits, machine: Machine, seed: int = 0) -> tuple[Report, Report]:
    """8 streams decoding: (undisturbed, while 1,500-token prompts arrive one after another)."""
    rng = random.Random(seed)
    streams = [Arrival(0.0, request_of(f"s{n}", 64, 900, rng)) for n in range(8)]
    prompts = [Arrival(1.0 + 0.8 * n, request_of(f"p{n}", 1500, 1, rng)) for n in range(30)]
    quiet = simulate(limits, streams, machine, seed, until_s=8.0)
    return quiet, simulate(limits, [*streams, *prompts], machine, seed, until_s=20.0)
