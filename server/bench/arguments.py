"""The command line of the benchmarks: their flags, with defaults and bounds. What they do is elsewhere."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from server.bench import stall
from server.bench.speculation_work import WORKLOADS

BENCHMARKS = ("serve", "stall", "steps", "speculation", "diffusion", "parallel", "sparse")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(BENCHMARKS))
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
    denoise = commands.add_parser(
        "diffusion", help="is denoising faster, and do other streams suffer", formatter_class=_Defaults
    )
    _add_diffusion(denoise)
    parallel = commands.add_parser(
        "parallel", help="what several tokens a step cost in quality (in-process)", formatter_class=_Defaults
    )
    _add_parallel(parallel)
    sparse = commands.add_parser(
        "sparse", help="what sparse attention still finds, and its speed (in-process)", formatter_class=_Defaults
    )
    _add_sparse(sparse)
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
    parser.add_argument("--min-requests", type=_positive, default=32, help="in each round, however few streams")
    parser.add_argument("--max-tokens", type=_positive, help="of an answer, on average (otherwise by the kind)")
    parser.add_argument("--prediction", action="store_true", help="send what is expected along, as `prediction`")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of full length (random weights)")
    parser.add_argument("--min-ratio", type=_positive_float, help="exit 1 if auto is below this share of off anywhere")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--timeout-s", type=_positive_float, default=600.0, help="per request")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_diffusion(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="a server of ours")
    where.add_argument("--spawn", metavar="FLAGS", help="start one with these flags for the run")
    parser.add_argument("--model", help="name without -diffusion (otherwise the first that has both)")
    parser.add_argument("--rounds", type=_positive, default=5, help="times that both sides are measured")
    parser.add_argument("--requests", type=_positive, default=48, help="tasks of a round, each under both names")
    parser.add_argument("--streams", type=_even, default=16, help="in the crowd; half of them denoised when mixed")
    parser.add_argument("--seconds", type=_positive_float, default=4.0, help="of a crowd, in each round")
    parser.add_argument("--min-speed", type=_positive_float, help="exit 1 if the speed ratio is below this")
    parser.add_argument("--max-p99-ratio", type=_positive_float, help="exit 1 if the p99 ratio is above this")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--timeout-s", type=_positive_float, default=600.0, help="per request")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="braid-tiny-diffusion", help="an embedded model or its folder")
    parser.add_argument("--cases", type=_positive, default=200, help="of each task")
    parser.add_argument(
        "--policies", nargs="+", default=[], help="names, or name:value,value of what it is swept over (otherwise all)"
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="names, deterministic or random (otherwise all)")
    parser.add_argument("--max-seqs", type=_positive, default=64, help="sequences in a step")
    parser.add_argument("--check", action="store_true", help="exit 1 if one of the statements is not shown")
    parser.add_argument("--seed", type=int, default=0, help="of cases and noise")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_sparse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="braid-tiny-retrieval", help="the embedded model or its folder")
    parser.add_argument("--lengths", type=_positive, nargs="+", default=[2048, 4096, 8192], help="keys of a context")
    parser.add_argument("--questions", type=_positive, default=200, help="at each length, ten a context")
    parser.add_argument("--methods", nargs="+", default=[], help="of attention.method (otherwise all)")
    parser.add_argument("--share", type=_positive, default=16, help="a row reads a 1/SHARE of the keys")
    parser.add_argument(
        "--calibration", type=Path, nargs="+", default=[], help="files (otherwise the embedded model's own)"
    )
    parser.add_argument("--channels", type=_positive, help="of a label (otherwise a quarter of the head size)")
    parser.add_argument("--label-dtype", choices=("model", "int4"), default="model", help="of a label")
    parser.add_argument("--rounds", type=int, default=5, help="times that speeds are compared; 0 = not at all")
    parser.add_argument("--streams", type=_positive, default=4, help="that decode together then")
    parser.add_argument("--speed-tokens", type=_positive, default=48, help="steps of a stream then")
    parser.add_argument("--min-accuracy", type=_share, help="exit 1 if any method finds less than this share")
    parser.add_argument("--seed", type=int, default=0, help="of the contexts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _even(text: str) -> int:
    value = int(text)
    if value < 2 or value % 2:
        raise argparse.ArgumentTypeError(f"is {text}, must be an even number from 2")
    return value


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
