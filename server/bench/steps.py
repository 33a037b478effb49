"""Step times against the machine's own limits, in one process and one run, so that the ratios mean something.

floor         bytes of the weights a step reads / measured read bandwidth: no step can be faster. An embedding table
              that is not also the head is left out: a step reads a few of its rows
decode        mean step with 1, 8, 32 streams decoding, scheduling and sampling included, as a multiple of the floor
prompt        arithmetic rate of a long prompt as a share of the machine's rate on one large matrix product

The engine's own scheduler and worker are measured, without processes and sockets. The figures of the machine are taken
before and after, and the better one counts: a busy neighbour must not make us look good.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from scheduler.types import Request, Sampling, StepSample
from server.bench.client import BenchError
from server.bench.report import percentile
from server.engine.config import EngineConfig, SpeculationConfig, make_limits
from server.engine.loop import worker_config
from server.models.registry import Model
from server.worker.build import build_worker
from server.worker.machine import usable_cores
from server.worker.worker import Worker

MIB = 1 << 20
RELAXED_S = 1000.0
"""A time-between-tokens target that never cuts a step: the budget alone does."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes per second of a sequential read, floating-point operations per second of a large matrix product."""

    read_bytes_per_s: float
    matmul_flops_per_s: float

    def better(self, other: Machine) -> Machine:
        return Machine(
            max(self.read_bytes_per_s, other.read_bytes_per_s), max(self.matmul_flops_per_s, other.matmul_flops_per_s)
        )


@dataclass(frozen=True, slots=True)
class DecodeFigures:
    """One batch size. Milliseconds of a step in which only decodes ran; `ratio` is the mean over the floor."""

    streams: int
    steps: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    ratio: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class StepsReport:
    """`prompt_matmul_share` counts the products of the layers with their weights (2 x parameters x tokens) and neither
    attention nor the head, so it is a lower bound."""

    ops: str
    dtype: str
    threads: int
    read_mib: float
    read_gb_per_s: float
    matmul_gflops: float
    floor_ms: float
    decode: list[DecodeFigures]
    prompt_tokens_per_s: float
    prompt_matmul_share: float


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0 = done. Raises BenchError for a shape or checkpoint that cannot be built."""
    longest = arguments.input_len + arguments.output_len
    config = EngineConfig(
        model=arguments.model or "braid-tiny",
        random_weights=None if arguments.model else arguments.random_weights,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        max_batched_tokens=2048,
        max_seqs=max(*arguments.streams, 1),
        num_threads=arguments.num_threads,
        max_model_len=max(longest, arguments.prompt_len + 1),
        speculation=SpeculationConfig(mode="off"),
    )
    try:
        worker = build_worker(worker_config(config), progress=False)
    except (ValueError, OSError) as problem:
        raise BenchError(str(problem)) from problem
    scheduler = make_scheduler(worker, config, worker.profile())
    dtype = getattr(torch, worker.info.dtype.removeprefix("torch."))
    machine = measure_machine(dtype)
    tasks = tqdm([*arguments.streams, None], desc="steps", disable=None)
    times: dict[int, list[float]] = {}
    prompt_rate = 0.0
    for streams in tasks:
        if streams is None:
            prompt_rate = prompt_tokens_per_s(scheduler, worker, arguments.prompt_len)
        else:
            times[streams] = decode_seconds(scheduler, worker, streams, arguments.input_len, arguments.output_len)
    machine = machine.better(measure_machine(dtype))
    report = summarise(worker, machine, times, prompt_rate, arguments.num_threads or usable_cores())
    print(as_table(report))
    if arguments.json is not None:
        write_json(arguments.json, report)
    return 0


def measure_machine(dtype: torch.dtype) -> Machine:
    """Best of several: reading 512 MiB with torch's own threads, and a 2048-cube product in `dtype`."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    memory = torch.ones(512 * MIB // 8, dtype=torch.int64)
    read_s = _best_seconds(lambda: memory.max(), 5)
    size = 2048
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    matmul_s = _best_seconds(lambda: torch.nn.functional.linear(left, right), 5)
    torch.set_num_threads(before)
    return Machine(memory.nbytes / read_s, 2.0 * size**3 / matmul_s)


def decode_seconds(scheduler: Scheduler, worker: Worker, streams: int, input_len: int, output_len: int) -> list[float]:
    """Wall seconds of each step, from schedule to update, in which exactly `streams` decodes and nothing else ran."""
    for stream in range(streams):
        add(scheduler, worker, f"decode-{streams}-{stream}", input_len, output_len)
    seconds = []
    while scheduler.has_work:
        num_tokens, num_spans, elapsed = step(scheduler, worker)
        if num_tokens == num_spans == streams:
            seconds.append(elapsed)
    # The first decode steps after a prompt run on cold caches of the machine, not of the algorithm.
    return seconds[2:] if len(seconds) > 8 else seconds


def prompt_tokens_per_s(scheduler: Scheduler, worker: Worker, prompt_len: int) -> float:
    """Best of three prompts, each alone and in steps as large as the cap of the budget allows."""
    best = 0.0
    for attempt in range(3):
        add(scheduler, worker, f"prompt-{attempt}", prompt_len, 1)
        total = 0.0
        while scheduler.has_work:
            total += step(scheduler, worker)[2]
        best = max(best, prompt_len / total)
    return best


def make_scheduler(worker: Worker, config: EngineConfig, samples: list[StepSample]) -> Scheduler:
    """Without prefix cache, so that no measurement helps the next, and without a time target. One worker has one
    scheduler for life: sequence ids are never used twice."""
    limits = make_limits(
        replace(config, tbt_slo_s=RELAXED_S, enable_prefix_caching=False),
        worker.info.model_len,
        worker.info.num_pages,
        worker.info.page_size,
    )
    return Scheduler(limits, StepCost(samples))


def add(scheduler: Scheduler, worker: Worker, request_id: str, input_len: int, output_len: int) -> None:
    rng = random.Random(request_id)
    prompt = tuple(rng.randrange(worker.info.vocab_size) for _ in range(input_len))
    request = Request(request_id, prompt, output_len, Sampling(temperature=0.0))
    fault = scheduler.add(request, time.monotonic())
    if fault is not None:
        raise BenchError(fault.message)


def step(scheduler: Scheduler, worker: Worker) -> tuple[int, int, float]:
    """One step: (query tokens, spans, seconds). Raises BenchError if a sequence failed."""
    start = time.perf_counter()
    plan = scheduler.schedule(time.monotonic())
    if plan is None:
        raise BenchError("the scheduler has work but plans no step: the KV pool is too small for this many streams")
    result = worker.run(plan)
    scheduler.update(plan, result, time.monotonic())
    elapsed = time.perf_counter() - start
    errors = [outcome.error for outcome in result.outcomes if outcome.error]
    if errors:
        raise BenchError(f"a sequence failed: {errors[0]}")
    return plan.num_tokens, len(plan.spans), elapsed


def summarise(
    worker: Worker, machine: Machine, times: dict[int, list[float]], prompt_rate: float, threads: int
) -> StepsReport:
    info, config = worker.info, cast(Model, worker._model).config
    table = config.vocab_size * config.hidden_size
    num_tables = 1 if config.tie_word_embeddings else 2
    bytes_per_parameter = getattr(torch, info.dtype).itemsize
    read_bytes = info.weight_bytes - (num_tables - 1) * table * bytes_per_parameter
    layer_parameters = info.num_parameters - num_tables * table
    floor_s = read_bytes / machine.read_bytes_per_s
    decode = []
    for streams, seconds in times.items():
        if not seconds:
            raise BenchError(f"no step ran all {streams} streams at once; pass a larger --output-len")
        ordered = sorted(seconds)
        mean = math.fsum(ordered) / len(ordered)
        p50, p99 = (1e3 * percentile(ordered, percent) for percent in (50, 99))
        decode.append(DecodeFigures(streams, len(ordered), 1e3 * mean, p50, p99, mean / floor_s, streams / mean))
    return StepsReport(
        ops=info.ops,
        dtype=info.dtype,
        threads=threads,
        read_mib=read_bytes / MIB,
        read_gb_per_s=machine.read_bytes_per_s / 1e9,
        matmul_gflops=machine.matmul_flops_per_s / 1e9,
        floor_ms=1e3 * floor_s,
        decode=decode,
        prompt_tokens_per_s=prompt_rate,
        prompt_matmul_share=2.0 * layer_parameters * prompt_rate / machine.matmul_flops_per_s,
    )


def as_table(report: StepsReport) -> str:
    lines = [
        f"{report.ops}, {report.dtype}, {report.threads} threads; the machine reads {report.read_gb_per_s:.1f} GB/s, "
        f"multiplies large matrices at {report.matmul_gflops:.0f} GFLOP/s",
        f"floor: {report.floor_ms:.2f} ms ({report.read_mib:.1f} MiB of weights a step / read bandwidth)",
        f"{'decoding streams':<18}{'steps':>7}{'mean ms':>9}{'p50':>8}{'p99':>8}{'x floor':>9}{'tokens/s':>10}",
    ]
    lines += [
        f"{d.streams:<18}{d.steps:>7}{d.mean_ms:>9.2f}{d.p50_ms:>8.2f}{d.p99_ms:>8.2f}{d.ratio:>9.2f}{d.tokens_per_s:>10.0f}"
        for d in report.decode
    ]
    lines.append(
        f"prompt: {report.prompt_tokens_per_s:.0f} tokens/s, {report.prompt_matmul_share:.0%} of the machine's "
        "matrix-product rate (products with weights only)"
    )
    return "\n".join(lines)


def write_json(path: Path, report: StepsReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"report": asdict(report)}, indent=2) + "\n")


def _best_seconds(function: Callable[[], object], repeats: int) -> float:
    best = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
