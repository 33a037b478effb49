"""Loads on the engine in this process, step by step: what `gpu_serving.py` measures of ours.

The core is the server's and `offline.Engine`'s own (`build_core`): scheduler, worker, kernels; no HTTP, no second
process. A step is timed from outside, plan to deltas, so the scheduler and the host are in it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.gpu_report.timing import quartile_range
from scheduler.types import Request, Sampling, StepStats
from server.engine.config import EngineConfig, EngineInfo, SpeculationConfig
from server.engine.core import EngineCore
from server.engine.loop import build_core
from server.models.loading import parse_spec

Clock = Callable[[], float]
RELAXED_S = 1000.0
"""A time-between-tokens target that never cuts a step."""
_SETTLE = 3
"""Steps after the last prompt that are not counted."""
_PROFILED = 8


class LoadError(Exception):
    """A load cannot run; the message says why."""


@dataclass(frozen=True)
class Load:
    """(prompt length, output length) of each stream; all arrive at once."""

    streams: tuple[tuple[int, int], ...]

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random ids, the same for every engine."""
        rng = random.Random(repr(self.streams))
        return [[rng.randrange(vocab_size) for _ in range(length)] for length, _ in self.streams]


@dataclass(frozen=True)
class DecodeTimes:
    """Of steps in which every stream decoded one token and nothing else ran.

    step_s     wall seconds of each, plan to deltas; host_s  of these outside the worker (scheduler, bookkeeping)
    device_s   seconds a step that the device computed, from a profile of other steps; None without a device
    """

    step_s: tuple[float, ...]
    host_s: tuple[float, ...]
    device_s: float | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s)

    @property
    def spread(self) -> float:
        return quartile_range(self.step_s) / self.median_s

    @property
    def gap(self) -> float | None:
        """Share of a step in which the device computed nothing: scheduler, host, launches, waiting."""
        return None if self.device_s is None else max(0.0, 1 - self.device_s / self.median_s)


class OurEngine:
    """One model with random weights. clock: seconds."""

    def __init__(
        self, spec: str, dtype: str, device: str, max_seqs: int, max_len: int, kv_tokens: int, clock: Clock
    ) -> None:
        """kv_tokens: keys that the pool holds, and no more: the other engine needs memory too.

        Raises ValueError or OSError for what cannot be built.
        """
        config = EngineConfig(
            random_weights=spec,
            dtype=dtype,
            device=device,
            max_seqs=max_seqs,
            max_model_len=max_len,
            kv_cache_bytes=kv_tokens * bytes_per_token(spec, dtype),
            max_batched_tokens=max(max_seqs, min(8192, max_len)),
            max_queued_tokens=1 << 30,
            tbt_slo_s=RELAXED_S,
            enable_prefix_caching=False,
            queue_timeout_s=None,
            speculation=SpeculationConfig(mode="off"),
            progress=False,
        )
        self._core: EngineCore
        self._core, self.info = build_core(config)
        self._clock, self._num_requests = clock, 0

    info: EngineInfo

    def close(self) -> None:
        self._core.close()
        del self._core

    def decode(self, num_streams: int, prompt_len: int, num_steps: int) -> DecodeTimes:
        """Steps of that many streams behind prompts of that length."""
        num_profiled = _PROFILED if torch.cuda.is_available() else 0
        # The first streams write while the last prompts are read, in steps of half the budget or less.
        while_reading = 4 * -(-num_streams * prompt_len // self.info.max_batched_tokens)
        output_len = num_steps + num_profiled + _SETTLE + 2 + while_reading
        load = Load(((prompt_len, output_len),) * num_streams)
        names = self._add(load)
        step_s: list[float] = []
        host_s: list[float] = []
        settled = 0
        while len(step_s) < num_steps:
            elapsed, stats = self._step(names)
            if stats.decode_tokens == num_streams and stats.prefill_tokens == 0:
                settled += 1
                if settled > _SETTLE:
                    step_s.append(elapsed)
                    host_s.append(max(0.0, elapsed - stats.elapsed_s))
            elif settled:
                raise LoadError(
                    f"all {num_streams} streams decoded in {settled} steps, {num_steps} are wanted: a stream ended, or "
                    "the KV pool is too small and one was preempted"
                )
        device_s = self._profiled(names, num_profiled) if num_profiled else None
        for name in names:
            self._core.abort(name)
        return DecodeTimes(tuple(step_s), tuple(host_s), device_s)

    def run(self, load: Load) -> float:
        """Seconds from the arrival of all streams to the end of the last."""
        names = self._add(load)
        total = 0.0
        while names:
            total += self._step(names)[0]
        return total

    def _add(self, load: Load) -> set[str]:
        names = set()
        prompts = load.prompts(self.info.vocab_size)
        for prompt, (_, output_len) in zip(prompts, load.streams, strict=True):
            name = f"load-{self._num_requests}"
            self._num_requests += 1
            self._core.add(Request(name, tuple(prompt), output_len, Sampling(temperature=0.0)))
            names.add(name)
        return names

    def _step(self, names: set[str]) -> tuple[float, StepStats]:
        """One step; streams that end leave `names`."""
        start = self._clock()
        deltas, stats = self._core.step()
        elapsed = self._clock() - start
        for delta in deltas:
            if delta.fault is not None:
                raise LoadError(delta.fault.message)
            if delta.finish_reason is not None:
                names.discard(delta.request_id)
        if stats is None:
            raise LoadError("the engine has requests and plans no step: the KV pool is too small for this load")
        return elapsed, stats

    def _profiled(self, names: set[str], num_steps: int) -> float:
        """Seconds of device work a step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(num_steps):
                self._step(names)
            torch.cuda.synchronize()
        total_us = sum(float(event.self_device_time_total) for event in profile.key_averages())
        return total_us / 1e6 / num_steps


def bytes_per_token(spec: str, dtype: str) -> int:
    """K and V of one token in all layers."""
    raw = parse_spec(spec)
    heads = int(raw.get("num_key_value_heads", raw["num_attention_heads"]))
    itemsize = int(getattr(torch, dtype).itemsize)
    return 2 * int(raw["num_hidden_layers"]) * heads * int(raw["head_dim"]) * itemsize


def mixed_load(lengths: Sequence[int], num_streams: int) -> Load:
    """Streams of spread lengths, as a server gets them: prompts up to lengths[0], outputs up to lengths[1]."""
    rng = random.Random(num_streams)
    most_prompt, most_output = lengths
    return Load(
        tuple((rng.randint(most_prompt // 8, most_prompt), rng.randint(most_output // 4, most_output))
              for _ in range(num_streams))
    )  # fmt: skip
