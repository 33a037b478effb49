"""`python -m server bench serve | stall | steps | speculation`: arguments, one run, one report."""

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

from server.bench import load, plot, report, speculation, stall, workload
from server.bench.client import BenchError, Sample, Target
from server.bench.spawn import spawned_server
from server.bench.speculation_work import WORKLOADS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; 0 = measured, 1 = measured but some requests failed, 2 = not measured (stderr says why)."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.benchmark == "steps":
            from server.bench import steps  # imports torch: only this benchmark pays for it

            return steps.run(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="serve|stall|steps|speculation")
    serve = commands.add_parser(
        "serve", help="load a running server and report latency and throughput", formatter_class=_Defaults
    )
    _add_target(serve)
    serve.add_argument("--input-len", type=_positive, default=256, help="prompt tokens per request")
    serve.add_argument("--output-len", type=_positive, default=64, help="output tokens per request")
    serve.add_argument("--num-requests", type=_positive, default=64, help="requests to send")
    loop = serve.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=_positive, default=8, help="closed loop: requests in flight")
    loop.add_argument("--rate", type=_positive_float, help="open loop instead: Poisson requests per second")
    serve.add_argument("--prefix-share", type=_share, default=0.0, help="part of each prompt that all share, 0 to 1")
    serve.add_argument("--warmup", type=int, default=2, help="requests sent before, not measured")
    serve.add_argument("--slo-ttft-ms", type=_positive_float, help="for goodput: first token within")
    serve.add_argument("--slo-tbt-ms", type=_positive_float, help="for goodput: p99 of a request's gaps within")
    serve.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    stalls = commands.add_parser(
        "stall", help="do long prompts stall running streams, and at what price", formatter_class=_Defaults
    )
    _add_target(stalls)
    defaults = stall.StallSettings()
    stalls.add_argument("--streams", type=_positive, default=defaults.streams, help="streams that decode throughout")
    stalls.add_argument("--prompt-len", type=_positive, default=defaults.prompt_len, help="tokens of each long prompt")
    stalls.add_argument("--num-prompts", type=_positive, default=defaults.num_prompts, help="long prompts per phase")
    stalls.add_argument("--seconds", type=_positive_float, default=defaults.seconds, help="undisturbed phase")
    stalls.add_argument("--max-stall", type=_positive_float, help="exit 1 if the ratio is above this")
    stalls.add_argument("--min-prompt-speed", type=_share, help="exit 1 if prompts are slower than this share of alone")
    steps = commands.add_parser(
        "steps", help="step times against the machine's own limits (in-process)", formatter_class=_Defaults
    )
    _add_steps(steps)
    drafts = commands.add_parser(
        "speculation", help="what speculation is worth, by load, text and policy", formatter_class=_Defaults
    )
    _add_speculation(drafts)
    return parser


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but no `(default: None)`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _add_target(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="any OpenAI-compatible server")
    where.add_argument("--spawn", metavar="FLAGS", help="start our own server with these flags for the run")
    parser.add_argument("--model", help="model name (otherwise the first that /v1/models lists)")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    parser.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="all outputs reach their full length"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrival times")
    parser.add_argument("--extra-body", type=_json_object, default={}, help="JSON object merged into each request")
    parser.add_argument("--timeout-s", type=_positive_float, default=600.0, help="per request")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_steps(parser: argparse.ArgumentParser) -> None:
    shape = "hidden=768,layers=12,heads=12,kv_heads=4,mlp=3072,vocab=8192"
    parser.add_argument("--random-weights", default=shape, metavar="SHAPE", help="model shape, as `serve` takes it")
    parser.add_argument("--model", help="a checkpoint instead of random weights")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="weight-only, lossy")
    parser.add_argument("--streams", type=_positive, nargs="+", default=[1, 8, 32], help="decode batch sizes")
    parser.add_argument("--input-len", type=_positive, default=256, help="prompt tokens per stream")
    parser.add_argument("--output-len", type=_positive, default=64, help="output tokens per stream")
    parser.add_argument("--prompt-len", type=_positive, default=1500, help="tokens of the prompt that is timed")
    parser.add_argument("--num-threads", type=_positive, help="engine threads (otherwise the engine's own choice)")
    parser.add_argument("--json", type=Path, help="write the report here")


def _add_speculation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spawn", metavar="FLAGS", default="", help="flags that all servers get")
    parser.add_argument("--streams", type=_positive, nargs="+", default=[1, 2, 4, 8, 16, 32], help="loads")
    parser.add_argument(
        "--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS), help="kinds of text"
    )
    policies = ["off", "auto", "fixed:2", "fixed:4", "fixed:8", "uniform"]
    parser.add_argument(
        "--policies", nargs="+", default=policies, help="also on, table:1:8,4:4; each has its own server"
    )
    parser.add_argument(
        "--drafters", nargs="+", default=[], help="sets such as prediction,suffix (otherwise the default)"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="sampling temperatures")
    parser.add_argument("--rounds", type=_positive, default=5, help="times that all policies are measured at a point")
    parser.add_argument("--requests-per-stream", type=_positive, default=4, help="in each round")
    parser.add_argument("--max-tokens", type=_positive, help="of an answer (otherwise as the kind of text needs)")
    parser.add_argument("--prediction", action="store_true", help="send what is expected along, as `prediction`")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of full length (random weights)")
    parser.add_argument("--min-ratio", type=_positive_float, help="exit 1 if auto is below this share of off anywhere")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--timeout-s", type=_positive_float, default=600.0, help="per request")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text}, must be at least 1")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}, must be above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"is {text}, must be between 0 and 1")
    return value


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
