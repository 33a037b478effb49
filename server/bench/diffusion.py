"""Does denoising pay, and do streams that are not denoised suffer? One server that can do both, two ratios.

speed   one stream, the same tasks under both names of the model in turn: output tokens/s of the denoised answers
        (policy `auto`) over those that come token by token without speculation; for all tasks and for each kind
company 16 streams, all token by token or half of them denoised, in turn: p99 time between tokens of those that come
        token by token, mixed over unmixed

In every round the two sides are measured next to each other and the side that begins changes, so that what disturbs the
machine meets both; ratios are per round, their median counts. An event may bring several tokens: times are between
events, token counts are the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.bench import workload
from server.bench.client import BenchError, Sample, Target, get_json, stream
from server.bench.diffusion_work import KINDS, make_asks
from server.bench.report import Distribution
from server.bench.spawn import spawned_server
from server.bench.speculation_report import Round
from server.bench.speculation_work import Ask
from server.bench.stall import RunningStreams

SUFFIX = "-diffusion"
"""What the server's name of a model that it denoises ends in."""
ALL = "all"
NO_DRAFTS = {"speculation": {"mode": "off"}}
STREAM_LEN = 400
SETTLE_S = 0.3
"""At the start of a phase, after all streams have brought tokens: the machine finds its step."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """`ours` over `base`: the median of the rounds' ratios, the least and the greatest of them."""

    median: float
    low: float
    high: float
    ours: float
    base: float

    @classmethod
    def of(cls, ours: Sequence[float], base: Sequence[float]) -> Ratio:
        ratios = [a / max(b, 1e-12) for a, b in zip(ours, base, strict=True)]
        return cls(
            statistics.median(ratios), min(ratios), max(ratios), statistics.median(ours), statistics.median(base)
        )

    def __str__(self) -> str:
        return f"{self.median:.2f} (rounds {self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Report:
    """speed, and speeds by kind of task: output tokens/s; company: p99 in milliseconds. right_*: shares of right
    answers; tokens_per_event: of denoised answers."""

    speed: Ratio
    speeds: dict[str, Ratio]
    company: Ratio
    right_denoised: float
    right_plain: float
    tokens_per_event: float


def run(arguments: argparse.Namespace) -> int:
    """Measure and print both ratios. 0 = measured; 1 = measured, and a limit that was asked for is missed.

    Raises BenchError if a request fails or the server has no model that it denoises under another name.
    """
    with ExitStack() as stack:
        url = arguments.url if arguments.spawn is None else stack.enter_context(spawned_server(arguments.spawn))
        report = asyncio.run(measure(Target.parse(url), arguments))
    print(as_table(report))
    if arguments.json is not None:
        write_json(arguments.json, report, arguments)
    is_slow = arguments.min_speed is not None and report.speed.median < arguments.min_speed
    is_late = arguments.max_p99_ratio is not None and report.company.median > arguments.max_p99_ratio
    return 1 if is_slow or is_late else 0


async def measure(target: Target, arguments: argparse.Namespace) -> Report:
    plain = await find_model(target, arguments.model)
    streams, rounds = arguments.streams, arguments.rounds
    with tqdm(total=2 * rounds, unit="round", disable=arguments.no_progress or None) as bar:
        await _ask_all(target, plain, _asks(arguments, -1), arguments.timeout_s)
        denoised: list[dict[str, Round]] = []
        token_by_token: list[dict[str, Round]] = []
        for number in range(rounds):
            asks = _asks(arguments, number)
            sides = [(plain + SUFFIX, denoised), (plain, token_by_token)]
            for model, found in sides if number % 2 else sides[::-1]:
                found.append(await _ask_all(target, model, asks, arguments.timeout_s))
            bar.update()
        mixed: list[float] = []
        unmixed: list[float] = []
        crowd = await _Crowd.prepare(target, plain, arguments)
        for number in range(rounds):
            halves = [(streams // 2, mixed), (0, unmixed)]
            for num_denoised, figures in halves if number % 2 else halves[::-1]:
                figures.append(await crowd.p99_ms(streams - num_denoised, num_denoised))
            bar.update()
    samples = [sample for one in denoised for sample in one[ALL].samples]
    speeds = {
        kind: Ratio.of([one[kind].speed for one in denoised], [one[kind].speed for one in token_by_token])
        for kind in (ALL, *KINDS)
    }
    return Report(
        speeds.pop(ALL),
        speeds,
        Ratio.of(mixed, unmixed),
        _share_right(arguments, denoised),
        _share_right(arguments, token_by_token),
        sum(s.output_tokens for s in samples) / max(1, sum(len(s.event_times) for s in samples)),
    )


def _share_right(arguments: argparse.Namespace, rounds: Sequence[dict[str, Round]]) -> float:
    right = total = 0
    for number, found in enumerate(rounds):
        asks = [ask for kind in _asks(arguments, number).values() for ask in kind]
        right += num_right(found[ALL].samples, asks)
        total += len(asks)
    return right / total


async def find_model(target: Target, asked: str | None) -> str:
    """The name under which answers come token by token; with the suffix it must be there too. Raises BenchError."""
    _, answer = await get_json(target, "/v1/models")
    names = [str(entry["id"]) for entry in answer.get("data", ())] if isinstance(answer, dict) else []
    plain = asked or next((name for name in names if name + SUFFIX in names), "")
    if not plain or plain + SUFFIX not in names:
        raise BenchError(
            f"{target.url} has {', '.join(names) or 'no model'}; this benchmark needs a model that answers token by "
            f"token under one name and denoises under the same with {SUFFIX}"
        )
    return plain


def _asks(arguments: argparse.Namespace, number: int) -> dict[str, list[Ask]]:
    """New texts in every round, so that no round reads what the one before left in a cache."""
    return make_asks(random.Random(f"{arguments.seed} {number}"), arguments.requests)


async def _ask_all(target: Target, model: str, asks: dict[str, list[Ask]], timeout_s: float) -> dict[str, Round]:
    """One after another, kind by kind; `ALL` is of all of them. Raises BenchError if one fails: a ratio of what is left
    would be of other texts."""
    found: dict[str, Round] = {}
    extra = {} if model.endswith(SUFFIX) else NO_DRAFTS
    for kind, some in asks.items():
        samples = []
        for number, ask in enumerate(some):
            sample = await stream(target, "/v1/completions", ask.body(model, 0.0, number) | extra, timeout_s)
            if not sample.is_complete:
                raise BenchError(f"a request to {model} failed: {sample.status} {sample.error}")
            samples.append(sample)
        found[kind] = Round.of(samples, 1)
    return found | {ALL: Round.of([sample for one in found.values() for sample in one.samples], 1)}


def num_right(samples: Sequence[Sample], asks: Sequence[Ask]) -> int:
    return sum("".join(s.texts).strip() == ask.expected.strip() for s, ask in zip(samples, asks, strict=True))


class _Crowd:
    """Streams of both kinds that run at once."""

    def __init__(
        self, target: Target, plain: workload.Server, work: workload.Workload, arguments: argparse.Namespace
    ) -> None:
        self._target, self._plain, self._work, self._arguments = target, plain, work, arguments
        self._phase = 0

    @classmethod
    async def prepare(cls, target: Target, plain: str, arguments: argparse.Namespace) -> _Crowd:
        work = workload.Workload(input_len=32, output_len=STREAM_LEN, seed=arguments.seed)
        return cls(target, await workload.probe(target, work, plain), work, arguments)

    async def p99_ms(self, num_plain: int, num_denoised: int) -> float:
        """Of the times between tokens of the streams that are not denoised. Raises BenchError if a stream fails."""
        kinds = [
            (num_plain, self._streams(self._plain, tuple(NO_DRAFTS.items()))),
            (num_denoised, self._streams(replace(self._plain, model=self._plain.model + SUFFIX), ())),
        ]
        for count, streams in kinds:
            streams.start(count)
        try:
            for count, streams in kinds:
                await streams.all_decoding(count, self._arguments.timeout_s)
            await asyncio.sleep(SETTLE_S)
            start = time.perf_counter()
            await asyncio.sleep(self._arguments.seconds)
            end = time.perf_counter()
        finally:
            for _, streams in kinds:
                await streams.stop()
        for _, streams in kinds:
            if streams.failure:
                raise BenchError(streams.failure)
        found = Distribution.of(kinds[0][1].gaps_between(start, end))
        if found is None:
            raise BenchError("the streams brought no tokens in a phase; pass a larger --seconds")
        return found.p99

    def _streams(self, server: workload.Server, extra: tuple[tuple[str, Any], ...]) -> RunningStreams:
        self._phase += 1
        work = replace(self._work, seed=self._arguments.seed + self._phase, extra=extra)
        return RunningStreams(self._target, work, server, workload.make_prompts(work, server, 1000))


def as_table(report: Report) -> str:
    speed, company = report.speed, report.company
    kinds = [
        f"  {kind:<10}{one.ours:>6.0f} and {one.base:>5.0f} output tokens/s: {one}"
        for kind, one in report.speeds.items()
    ]
    return "\n".join(
        [
            f"1 stream, tasks with one answer: {speed.ours:.0f} output tokens/s denoised, {speed.base:.0f} token by "
            f"token; right {report.right_denoised:.0%} and {report.right_plain:.0%}; {report.tokens_per_event:.1f} "
            "tokens an event",
            *kinds,
            f"speed: denoised over token by token: {speed}",
            f"p99 between tokens, token by token: {company.ours:.1f} ms among denoised streams, {company.base:.1f} ms "
            "among their own kind",
            f"company: p99 mixed over unmixed: {company}",
        ]
    )


def write_json(path: Path, report: Report, arguments: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name != "api_key"
    }
    path.write_text(json.dumps({"settings": settings, "report": asdict(report)}, indent=2) + "\n")
