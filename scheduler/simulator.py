"""The command line of the simulation (simulation.py) and of the scheduler's own benchmarks.

`python -m scheduler.simulator` prints time to first token and time between tokens for Poisson arrivals, `--stall` for
the worst case of mixed steps (prompts arriving one after another while streams decode), `--trace FILE` for recorded
arrivals (JSON lines: time_s, prompt_tokens, max_tokens), `--bench-schedule` the real cost of `schedule` and `update`.
`--speculation` compares draft policies under load, `--streams` with streams that never end, and `--bench-planner` times
the planner (simulated_drafts.py).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scheduler import simulated_drafts
from scheduler.fake_worker import FakeWorker
from scheduler.scheduler import Scheduler
from scheduler.simulation import Machine, percentile, poisson, request_of, simulate, stall, trace
from scheduler.types import Limits, StepResult


def bench_schedule(num_seqs: int = 512, num_steps: int = 300) -> tuple[float, float]:
    """Median CPU seconds of `schedule` and of `update` with `num_seqs` decoding sequences."""
    limits = Limits(max(2048, num_seqs), num_seqs, 4096, 64 * num_seqs, 16, max_queued_tokens=1 << 30)
    scheduler = Scheduler(limits)
    rng = random.Random(0)
    for number in range(num_seqs):
        scheduler.add(request_of(f"r{number}", 24 + rng.randrange(16), 4 + 2 * num_steps, rng), 0.0)
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
    parser.add_argument("--bench-planner", action="store_true")
    parser.add_argument("--speculation", action="store_true")
    parser.add_argument("--streams", action="store_true")
    parser.add_argument("--rates", type=float, nargs="+", default=[12.0, 20.0, 24.0], help="of --speculation")
    options = parser.parse_args(arguments)
    slo = None if options.tbt_slo_ms is None else options.tbt_slo_ms / 1e3
    limits = Limits(2048, 64, 4096, 4096, 16, tbt_slo_s=slo)
    machine = replace(Machine(), noise=options.noise)
    if options.speculation:
        for line in simulated_drafts.compare(options.rates, options.requests, options.seed):
            _say(line)
    elif options.streams:
        for line in simulated_drafts.compare_streams():
            _say(line)
    elif options.bench_planner:
        for name, seconds in simulated_drafts.bench_planner().items():
            _say(f"256 requests x 8 drafts, {name}: {1e3 * seconds:.3f} ms (CPU time, least)")
    elif options.bench_schedule:
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
