"""`python -m server bench serve | stall | steps | speculation | diffusion | parallel | sparse`: one run, one report."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.bench import diffusion, load, plot, report, speculation, stall, workload
from server.bench.arguments import make_parser
from server.bench.client import BenchError, Sample, Target
from server.bench.spawn import spawned_server


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; 0 = measured, 1 = measured but some requests failed, 2 = not measured (stderr says why)."""
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.benchmark == "steps":
            from server.bench import steps  # imports torch: only this benchmark pays for it

            return steps.run(arguments)
        if arguments.benchmark == "parallel":
            from server.bench.parallel.run import run as run_parallel  # imports torch, as above

            return run_parallel(arguments)
        if arguments.benchmark == "sparse":
            from server.bench.sparse.run import run as run_sparse  # imports torch, as above

            return run_sparse(arguments)
        if arguments.benchmark == "diffusion":
            return diffusion.run(arguments)
        if arguments.benchmark == "speculation":
            return speculation.run(arguments)
        with ExitStack() as stack:
            if arguments.spawn is not None:
                arguments.url = stack.enter_context(spawned_server(arguments.spawn))
            return asyncio.run(_serve(arguments) if arguments.benchmark == "serve" else _stall(arguments))
    except BenchError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 2


async def _prepare(arguments: argparse.Namespace, **lengths: Any) -> tuple[Target, workload.Workload, workload.Server]:
    target = Target.parse(arguments.url, arguments.api_key)
    work = workload.Workload(
        ignore_eos=arguments.ignore_eos,
        temperature=arguments.temperature,
        is_chat=arguments.chat,
        seed=arguments.seed,
        extra=tuple(arguments.extra_body.items()),
        **lengths,
    )
    return target, work, await workload.probe(target, work, arguments.model)


async def _serve(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None:
        plot.require_matplotlib()
    lengths = {name: getattr(arguments, name) for name in ("input_len", "output_len", "prefix_share")}
    target, work, server = await _prepare(arguments, **lengths)
    needed = arguments.input_len + arguments.output_len
    if server.max_model_len is not None and needed > server.max_model_len:
        raise BenchError(
            f"--input-len + --output-len is {needed}, but the server's context is {server.max_model_len} tokens"
        )
    prompts = workload.make_prompts(work, server, arguments.warmup + arguments.num_requests)
    loop = f"{arguments.rate:g} requests/s" if arguments.rate else f"{arguments.concurrency} in flight"
    title = f"{server.model}: {arguments.num_requests} x {arguments.input_len} in, {arguments.output_len} out, {loop}"
    print(title)
    if prompts[: arguments.warmup]:
        await load.closed_loop(target, work, server, prompts[: arguments.warmup], 1, arguments.timeout_s)
    measured = prompts[arguments.warmup :]
    with tqdm(total=len(measured), unit="req", disable=arguments.no_progress or None) as bar:
        if arguments.rate:
            samples = await load.open_loop(target, work, server, measured, arguments.rate, arguments.timeout_s, bar)
        else:
            samples = await load.closed_loop(
                target, work, server, measured, arguments.concurrency, arguments.timeout_s, bar
            )
    return _show(arguments, samples, title)


def _show(arguments: argparse.Namespace, samples: list[Sample], title: str) -> int:
    if not samples:
        raise BenchError("interrupted before any request finished")
    result = report.summarise(samples, report.Slo(arguments.slo_ttft_ms, arguments.slo_tbt_ms))
    print(report.as_table(result))
    for message in report.first_errors(samples):
        print(f"  error: {message}")
    if arguments.json is not None:
        report.write_json(arguments.json, result, _settings(arguments))
    if arguments.plot is not None and result.completed:
        plot.draw(arguments.plot, samples, title)
        print(f"plot: {arguments.plot}")
    return 0 if result.completed == result.requests else 1


async def _stall(arguments: argparse.Namespace) -> int:
    target, work, server = await _prepare(arguments)
    settings = stall.StallSettings(
        streams=arguments.streams,
        prompt_len=arguments.prompt_len,
        num_prompts=arguments.num_prompts,
        seconds=arguments.seconds,
        timeout_s=arguments.timeout_s,
    )
    result = await stall.measure(target, work, server, settings, shows_progress=not arguments.no_progress)
    print(stall.as_table(result))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"settings": _settings(arguments), "report": asdict(result)}, indent=2) + "\n"
        )
    is_stalled = arguments.max_stall is not None and result.stall_ratio > arguments.max_stall
    is_slow = arguments.min_prompt_speed is not None and result.prompt_speed < arguments.min_prompt_speed
    return 1 if is_stalled or is_slow else 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The run's arguments for the JSON file; never the key."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name != "api_key"
    }
