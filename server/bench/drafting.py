"""`python -m server.bench.drafting`: what speculation is worth in the engine alone, without HTTP and a second process.

The texts and figures of `bench speculation`, on one engine a policy, all in this process. A round takes the engines one
after another for a fraction of a second each, beginning with another one each time, so what disturbs the machine for
longer than that meets all alike; the spread of the rounds' ratios says how much is left.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scheduler.types import Delta, Request, Sampling
from server.bench.client import BenchError, Sample
from server.bench.speculation import OFF, rotated
from server.bench.speculation_report import Point, Round, as_table
from server.bench.speculation_work import WORKLOADS, Ask
from server.engine.config import EngineConfig, SpeculationConfig
from server.engine.loop import build_core
from server.models.locate import resolve_model
from server.text.tokenizer import Tokenizer

POOL_BYTES = 1 << 28
"""KV memory of each engine: otherwise the first would take most of the machine's."""


@dataclass(slots=True)
class Steps:
    """Sums over the steps of a policy's rounds: seconds of the worker without drafting, of drafting, of the rest."""

    num: int = 0
    num_drafting: int = 0
    worker_s: float = 0.0
    drafting_s: float = 0.0
    host_s: float = 0.0

    def __str__(self) -> str:
        shares = (
            f"{name} {1e6 * seconds / max(1, self.num):.0f}"
            for name, seconds in (("worker", self.worker_s), ("drafting", self.drafting_s), ("rest", self.host_s))
        )
        return f"{self.num} steps, {self.num_drafting / max(1, self.num):.0%} drafted; us each: {', '.join(shares)}"


class PolicyEngine:
    """An engine with one policy, run as a server's loop would: closed loops that share their requests."""

    def __init__(self, model: str, speculation: SpeculationConfig, threads: int | None = None) -> None:
        config = EngineConfig(
            model=model,
            speculation=speculation,
            kv_cache_bytes=POOL_BYTES,
            num_threads=threads,
            queue_timeout_s=None,
            progress=False,
        )
        self._core, self._info = build_core(config)
        self._tokenizer = Tokenizer.load(resolve_model(model))
        self._ids = itertools.count()
        self.steps = Steps()

    def close(self) -> None:
        self._core.close()

    def run(self, asks: Sequence[Ask], streams: int, clock: Callable[[], float] = time.perf_counter) -> list[Sample]:
        """All of `asks`, `streams` at a time; samples in the order of `asks`, their texts as token ids.

        Raises BenchError if one fails.
        """
        samples = [Sample(0.0) for _ in asks]
        left, running = iter(list(zip(samples, asks, strict=True))), dict[str, Sample]()
        for sample, ask in itertools.islice(left, streams):
            running[self._add(sample, ask, clock())] = sample
        while running:
            started = clock()
            deltas, stats = self._core.step()
            now = clock()
            if stats is not None:
                self.steps.num += 1
                self.steps.num_drafting += stats.draft_s > 0.0 or stats.draft_tokens > 0
                self.steps.worker_s += stats.elapsed_s - stats.draft_s
                self.steps.drafting_s += stats.draft_s
                self.steps.host_s += now - started - stats.elapsed_s
            for delta in deltas:
                _absorb(running[delta.request_id], delta, now)
                if delta.finish_reason is not None:
                    del running[delta.request_id]
                    for sample, ask in itertools.islice(left, 1):
                        running[self._add(sample, ask, clock())] = sample
        return samples

    def _add(self, sample: Sample, ask: Ask, now: float) -> str:
        sample.sent, sample.is_counted = now, True
        prompt = tuple(self._tokenizer.encode(ask.prompt))
        request = Request(str(next(self._ids)), prompt, ask.max_tokens, Sampling(temperature=0.0), self._info.eos_ids)
        self._core.add(request)
        return request.id


def _absorb(sample: Sample, delta: Delta, now: float) -> None:
    if delta.fault is not None:
        raise BenchError(delta.fault.message)
    if delta.tokens:
        sample.output_tokens += len(delta.tokens)
        sample.texts.append(" ".join(["", *map(str, delta.tokens)]))
        sample.event_times.append(now)
        sample.event_tokens.append(sample.output_tokens)
    if delta.speculation is not None:
        sample.drafted += delta.speculation.drafted
        sample.accepted += delta.speculation.accepted
        sample.draft_steps += delta.speculation.steps
    if delta.finish_reason is not None:
        sample.status, sample.finished = 200, now


def read_config(text: str) -> SpeculationConfig:
    """`off`, `auto`, `uniform` or `fixed:4`. Raises BenchError for anything else."""
    kind, _, value = text.partition(":")
    if text == OFF:
        return SpeculationConfig(mode="off")
    if text in ("auto", "uniform"):
        return SpeculationConfig(policy="marginal" if text == "auto" else text)
    if kind == "fixed" and value.isdecimal() and int(value) > 0:
        return SpeculationConfig(policy="fixed", max_drafts=int(value))
    raise BenchError(f"policy {text!r} is none of off, auto, uniform, fixed:K")


def measure(
    engines: dict[str, PolicyEngine],
    workload: str,
    streams: int,
    arguments: argparse.Namespace,
    clock: Callable[[], float],
) -> dict[str, list[Round]]:
    """All policies under one load, in rounds; the first round is not counted."""
    rounds: dict[str, list[Round]] = {label: [] for label in engines}
    for number in range(-1, arguments.rounds):
        rng = random.Random(f"{arguments.seed} {workload} {streams} {number}")
        asks = [
            WORKLOADS[workload](rng)
            for _ in range(max(streams * arguments.requests_per_stream, arguments.min_requests))
        ]
        found = {}
        for label in rotated(list(engines), number % len(engines)):
            if number == 0:
                engines[label].steps = Steps()
            found[label] = engines[label].run(asks, streams, clock)
        if number < 0:
            continue
        for label, samples in found.items():
            one = Round.of(samples, streams)
            one.num_different = sum(
                "".join(a.texts) != "".join(b.texts) for a, b in zip(samples, found[OFF], strict=True)
            )
            rounds[label].append(one)
    return rounds


def comparisons(rounds: dict[str, list[Round]]) -> Iterator[str]:
    """`auto` over off, and over the best fixed number: median of the rounds' ratios and their quartiles.

    At least two rounds of each.
    """
    speeds = {label: [one.speed for one in found] for label, found in rounds.items()}
    fixed = [label for label in rounds if label.startswith("fixed")]
    best = [max(fixed, key=lambda label: statistics.median(_ratios(speeds[label], speeds[OFF])))] if fixed else []
    for other in [OFF, *best]:
        ratios = _ratios(speeds["auto"], speeds[other])
        low, middle, high = statistics.quantiles(ratios, n=4)
        yield f"auto/{other} {middle:.3f} ({low:.2f}-{high:.2f})"


def _ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, others, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """0 = measured; 1 = a text differs from that of off; 2 = not measured."""
    parser = argparse.ArgumentParser(prog="python -m server.bench.drafting", description=__doc__)
    parser.add_argument("--model", default="braid-tiny", help="embedded model or folder")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="loads")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS), help="texts")
    parser.add_argument(
        "--policies", nargs="+", default=["auto", "fixed:2", "fixed:4"], help="beside off; also uniform"
    )
    parser.add_argument("--rounds", type=int, default=15, help="times that all policies are measured at a point")
    parser.add_argument("--requests-per-stream", type=int, default=4, help="in each round")
    parser.add_argument(
        "--min-requests", type=int, default=32, help="in each round: a load lasts longer than learning it"
    )
    parser.add_argument("--threads", type=int, help="of each engine (otherwise the engine's own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine; with --threads 1")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds is {arguments.rounds}, but it takes two to see a spread")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    try:
        configs = {name: read_config(name) for name in dict.fromkeys([OFF, *arguments.policies])}
    except BenchError as problem:
        print(problem, file=sys.stderr)
        return 2
    engines = {name: PolicyEngine(arguments.model, config, arguments.threads) for name, config in configs.items()}
    gc.collect()
    gc.freeze()
    num_different = 0
    for workload in arguments.workloads:
        for streams in arguments.streams:
            rounds = measure(engines, workload, streams, arguments, clock)
            points = [Point.of(workload, 0.0, streams, name, rounds[name], rounds[OFF]) for name in engines]
            num_different += sum(point.num_different for point in points)
            print(as_table(points))
            if "auto" in engines:
                print(f"{streams:>7} {'; '.join(comparisons(rounds))}")
            for name, engine in engines.items():
                print(f"{streams:>7} {name:<24}{engine.steps}", flush=True)
    for engine in engines.values():
        engine.close()
    print(f"texts that differ from those of off: {num_different}")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
