"""The scheduler without a machine: fake worker, virtual clock, and a step time made of a curve and noise.

`python -m scheduler.simulator` prints time to first token and time between tokens for Poisson arrivals, `--stall` for
the worst case of mixed steps (prompts arriving one after another while streams decode), `--trace FILE` for recorded
arrivals (JSON lines: time_s, prompt_tokens, max_tokens), `--bench-schedule` the real cost of `schedule` and `update`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from scheduler.fake_worker import FakeWorker, features_of
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from scheduler.types import Limits, Request, Sampling, StepFeatures, StepResult, StepSample


@dataclass(frozen=True, slots=True)
class Machine:
    """Step time of an imagined machine.

    curve            (rows, seconds), linear in between: weights and arithmetic
    key_s            seconds per key read by a decode; prefill_key_s per (prompt row, key)
    noise            sigma of the log of the time; outlier_rate of the steps take outlier_factor times as long
    The default resembles 160 M bf16 parameters on 2 cores.
    """

    curve: tuple[tuple[int, float], ...] = ((1, 0.0100), (8, 0.0108), (32, 0.0140), (128, 0.0250), (512, 0.0660))
    key_s: float = 5e-7
    prefill_key_s: float = 2e-8
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
    """Times in seconds. tbt: gaps between successive tokens of one request; step_error: predictions, as a fraction."""

    ttft_s: list[float] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    num_steps: int = 0
    num_preempted: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
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
        yield f"step-time prediction: mean absolute error {100 * self.step_error:.1f} %"


def percentile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))]


def simulate(
    limits: Limits, arrivals: Sequence[Arrival], machine: Machine, seed: int = 0, until_s: float = math.inf
) -> Report:
    """Run arrivals (sorted by time) to their end, or to `until_s`, in virtual time."""
    rng = random.Random(seed)
    scheduler = Scheduler(limits, StepCost(machine.profile(rng)))
    worker = FakeWorker(limits.num_pages, limits.page_size)
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
        elapsed = machine.seconds(features_of(plan), rng)
        now += elapsed
        deltas, stats = scheduler.update(plan, StepResult(plan.step, worker.run(plan), elapsed), now)
        for delta in deltas:
            if delta.tokens:
                before = last_token.get(delta.request_id)
                if before is None:
                    report.ttft_s.append(now - arrived[delta.request_id])
                else:
                    report.tbt_s.append(now - before)
                last_token[delta.request_id] = now
        report.num_steps += 1
        report.num_preempted += stats.num_preempted
        report.prefill_tokens += stats.prefill_tokens
        report.output_tokens += stats.generated_tokens
    report.elapsed_s = now
    report.step_error = scheduler.cost.mean_error
    return report


def poisson(num_requests: int, rate: float, prompt: int, output: int, seed: int) -> list[Arrival]:
    """Poisson arrivals at `rate` per second, with lengths spread around `prompt` and `output` tokens."""
    rng = random.Random(seed)
    now, arrivals = 0.0, []
    for number in range(num_requests):
        now += rng.expovariate(rate)
        size = max(1, round(rng.lognormvariate(math.log(prompt), 0.5)))
        most = max(1, round(rng.lognormvariate(math.log(output), 0.5)))
        arrivals.append(Arrival(now, _request(f"r{number}", size, most, rng)))
    return arrivals


def trace(path: Path, seed: int) -> list[Arrival]:
    """Recorded arrivals: JSON lines with time_s, prompt_tokens and max_tokens."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows.sort(key=lambda row: float(row["time_s"]))
    return [
        Arrival(float(row["time_s"]), _request(f"r{n}", int(row["prompt_tokens"]), int(row["max_tokens"]), rng))
        for n, row in enumerate(rows)
    ]


def _request(request_id: str, prompt: int, max_tokens: int, rng: random.Random) -> Request:
    tokens = tuple(rng.choices(range(4096), k=prompt))
    return Request(request_id, tokens, max_tokens, Sampling(seed=rng.getrandbits(63)))


def stall(limits: Limits, machine: Machine, seed: int = 0) -> tuple[Report, Report]:
    """8 streams decoding: (undisturbed, while 1,500-token prompts arrive one after another)."""
    rng = random.Random(seed)
    streams = [Arrival(0.0, _request(f"s{n}", 64, 900, rng)) for n in range(8)]
    prompts = [Arrival(1.0 + 0.4 * n, _request(f"p{n}", 1500, 1, rng)) for n in range(60)]
    quiet = simulate(limits, streams, machine, seed, until_s=8.0)
    return quiet, simulate(limits, [*streams, *prompts], machine, seed, until_s=20.0)


def bench_schedule(num_seqs: int = 512, num_steps: int = 300) -> tuple[float, float]:
    """Median CPU seconds of `schedule` and of `update` with `num_seqs` decoding sequences."""
    limits = Limits(max(2048, num_seqs), num_seqs, 4096, 64 * num_seqs, 16, max_queued_tokens=1 << 30)
    scheduler = Scheduler(limits)
    rng = random.Random(0)
    for number in range(num_seqs):
        scheduler.add(_request(f"r{number}", 24 + rng.randrange(16), 4 + 2 * num_steps, rng), 0.0)
    worker = FakeWorker(limits.num_pages, limits.page_size)
    plan_s: list[float] = []
    update_s: list[float] = []
    while len(plan_s) < num_steps:
        start = time.process_time()
        plan = scheduler.schedule(0.0)
        planned = time.process_time()
        assert plan is not None
        outcomes = worker.run(plan)
        ran = time.process_time()
        scheduler.update(plan, StepResult(plan.step, outcomes, 0.01), 0.0)
        if len(plan.spans) == plan.num_tokens == num_seqs:
            plan_s.append(planned - start)
            update_s.append(time.process_time() - ran)
    return statistics.median(plan_s), statistics.median(update_s)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scheduler.simulator", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=4.0, help="Poisson arrivals per second")
    parser.add_argument("--prompt", type=int, default=256, help="median prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="median output tokens")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--tbt-slo-ms", type=float)
    parser.add_argument("--noise", type=float, default=Machine().noise)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stall", action="store_true")
    parser.add_argument("--bench-schedule", action="store_true")
    options = parser.parse_args(arguments)
    slo = None if options.tbt_slo_ms is None else options.tbt_slo_ms / 1e3
    limits = Limits(2048, 64, 4096, 4096, 16, tbt_slo_s=slo)
    machine = replace(Machine(), noise=options.noise)
    if options.bench_schedule:
        plan_s, update_s = bench_schedule()
        _say(f"512 decodes: schedule {1e3 * plan_s:.3f} ms, update {1e3 * update_s:.3f} ms (CPU time, medians)")
    elif options.stall:
        quiet, disturbed = stall(limits, machine, options.seed)
        median = percentile(quiet.tbt_s, 50)
        for line in disturbed.lines():
            _say(line)
        ratio = percentile(disturbed.tbt_s, 99) / median
        _say(f"undisturbed median TBT {1e3 * median:.1f} ms; p99 while prompts arrive: {ratio:.2f} times that")
    else:
        arrivals = (
            trace(options.trace, options.seed)
            if options.trace
            else poisson(options.requests, options.rate, options.prompt, options.output, options.seed)
        )
        for line in simulate(limits, arrivals, machine, options.seed).lines():
            _say(line)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
