"""Do long prompts stall the streams that are running? And at what price to the prompts?

Three phases against one server: `streams` requests decode undisturbed; they go on while long prompts arrive one after
another; the same number of prompts alone. Shown: p99 time between tokens under load over the undisturbed median, and
how fast the prompts went compared with nobody else there. Every prompt is new, so no prefix cache helps.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from server.bench.client import BenchError, Sample, Target, stream
from server.bench.report import Distribution
from server.bench.workload import Server, Workload, make_prompts, request_body

ROOM_FOR_PROMPT = 16
SETTLE_S = 0.5
"""After the last prompt: time for the gaps that are open then to close."""


@dataclass(frozen=True, slots=True)
class StallSettings:
    """`seconds` is how long the streams run undisturbed; lengths in tokens."""

    streams: int = 8
    stream_input_len: int = 64
    prompt_len: int = 1500
    num_prompts: int = 8
    seconds: float = 5.0
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class StallReport:
    """Times in milliseconds, of all gaps of all streams that ended in the phase or were open at its end.

    stall_ratio   p99 under load / undisturbed median
    prompt_speed  prompt tokens per second under load / alone
    """

    prompt_tokens: int
    undisturbed: Distribution
    under_load: Distribution
    stall_ratio: float
    prompt_tokens_per_s_alone: float
    prompt_tokens_per_s_under_load: float
    prompt_speed: float


class RunningStreams:
    """`count` streams that decode until stopped; one that reaches its end starts again with a new prompt.

    Only gaps inside one request count: the wait before a first token is no time between tokens.
    """

    def __init__(self, target: Target, workload: Workload, server: Server, prompts: Sequence[str | list[int]]) -> None:
        self._target = target
        self._workload = workload
        self._server = server
        self._prompts = iter(prompts)
        self._times: list[list[float]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.failure: str | None = None

    def start(self, count: int) -> None:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(count)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def all_decoding(self, count: int, timeout_s: float) -> None:
        """Return once `count` streams have brought a few tokens each. Raises BenchError if they do not."""
        deadline = time.perf_counter() + timeout_s
        while sum(1 for times in self._times if len(times) >= 4) < count:
            if self.failure or time.perf_counter() > deadline:
                raise BenchError(self.failure or f"{count} streams were not decoding within {timeout_s:g} s")
            await asyncio.sleep(0.02)

    def gaps_between(self, start: float, end: float) -> list[float]:
        found: list[float] = []
        for times in self._times:
            first = max(1, bisect.bisect_left(times, start))
            last = bisect.bisect_right(times, end)
            # The gap that is open when the phase ends belongs to it: its stall may just be under way.
            closed = last + 1 if last < len(times) else last
            found += [times[i] - times[i - 1] for i in range(first, closed)]
        return found

    async def _run(self) -> None:
        for prompt in self._prompts:
            times: list[float] = []
            self._times.append(times)
            body = request_body(self._workload, self._server.model, prompt)
            sample = await stream(self._target, self._workload.path, body, 3600.0, times.append)
            if not sample.is_complete:
                self.failure = f"a stream failed: {sample.status} {sample.error}"
                return


async def measure(
    target: Target, workload: Workload, server: Server, settings: StallSettings, shows_progress: bool = True
) -> StallReport:
    """Run the three phases. Raises BenchError if a request fails or the model's context is too short."""
    prompt_len = settings.prompt_len
    if server.max_model_len is not None and prompt_len + ROOM_FOR_PROMPT > server.max_model_len:
        raise BenchError(
            f"--prompt-len is {prompt_len}, but the server's context is {server.max_model_len} tokens; "
            f"pass --prompt-len {server.max_model_len - ROOM_FOR_PROMPT} or less"
        )
    # Prompts of both phases differ, as do the streams': seeds apart.
    long = replace(workload, input_len=prompt_len, output_len=1)
    loaded, alone = (make_prompts(replace(long, seed=workload.seed + k), server, settings.num_prompts) for k in (1, 2))
    longest = (server.max_model_len or 2048) - settings.stream_input_len - ROOM_FOR_PROMPT
    short = replace(workload, input_len=settings.stream_input_len, output_len=max(32, min(longest, 4096)))
    streams = RunningStreams(target, short, server, make_prompts(short, server, 1000))
    streams.start(settings.streams)
    bar = tqdm(total=2 * settings.num_prompts + 1, desc="stall", unit="part", disable=None if shows_progress else True)
    try:
        await streams.all_decoding(settings.streams, settings.timeout_s)
        quiet_from = time.perf_counter()
        await asyncio.sleep(settings.seconds)
        load_from = time.perf_counter()
        bar.update()
        under_load = await _send_one_by_one(target, long, server, loaded, settings.timeout_s, bar)
        load_to = time.perf_counter()
        await asyncio.sleep(SETTLE_S)
    finally:
        await streams.stop()
    if streams.failure:
        raise BenchError(streams.failure)
    quiet_gaps = streams.gaps_between(quiet_from, load_from)
    load_gaps = streams.gaps_between(load_from, load_to)
    prompts_alone = await _send_one_by_one(target, long, server, alone, settings.timeout_s, bar)
    bar.close()
    return _report(quiet_gaps, load_gaps, prompts_alone, under_load)


async def _send_one_by_one(
    target: Target,
    workload: Workload,
    server: Server,
    prompts: Sequence[str | list[int]],
    timeout_s: float,
    bar: tqdm[Any],
) -> list[Sample]:
    samples = []
    for prompt in prompts:
        sample = await stream(target, workload.path, request_body(workload, server.model, prompt), timeout_s)
        if sample.status != 200 or not sample.is_complete:
            raise BenchError(f"a long prompt failed: {sample.status} {sample.error}")
        samples.append(sample)
        bar.update()
    return samples


def _report(
    quiet_gaps: list[float], load_gaps: list[float], alone: Sequence[Sample], loaded: Sequence[Sample]
) -> StallReport:
    undisturbed, under_load = Distribution.of(quiet_gaps), Distribution.of(load_gaps)
    if undisturbed is None or under_load is None:
        raise BenchError("the streams brought no tokens in a phase; pass a larger --seconds or more --num-prompts")
    speed_alone, speed_loaded = (
        sum(s.prompt_tokens for s in samples) / sum(s.ttft for s in samples) for samples in (alone, loaded)
    )
    if not speed_alone:
        raise BenchError("the server reports no usage.prompt_tokens, so prompt speed is unknown")
    return StallReport(
        prompt_tokens=loaded[0].prompt_tokens,
        undisturbed=undisturbed,
        under_load=under_load,
        stall_ratio=under_load.p99 / undisturbed.p50,
        prompt_tokens_per_s_alone=speed_alone,
        prompt_tokens_per_s_under_load=speed_loaded,
        prompt_speed=speed_loaded / speed_alone,
    )


def as_table(report: StallReport) -> str:
    rows = (("undisturbed", report.undisturbed), ("under long prompts", report.under_load))
    lines = [f"{'time between tokens, ms':<26}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}"]
    lines += [f"{name:<26}{d.p50:>9.1f}{d.p90:>9.1f}{d.p99:>9.1f}{d.max:>9.1f}" for name, d in rows]
    return "\n".join(
        [
            *lines,
            f"p99 under load / undisturbed median: {report.stall_ratio:.2f}",
            f"prompts of {report.prompt_tokens} tokens: {report.prompt_tokens_per_s_under_load:.0f} tokens/s under "
            f"load, {report.prompt_tokens_per_s_alone:.0f} alone: {report.prompt_speed:.0%}",
        ]
    )
