"""Times of calls, interleaved: every round times each call once, so that what disturbs one disturbs its neighbours.

Calls are captured as CUDA graphs where they can be; a call that cannot is run as it is and marked. A call that fails
gets its reason instead of a time and ends nothing. Two timers: a GPU's, and the host's clock, which means nothing (a
dry run) and says so.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
ROUNDS = 20
_WARM_ROUNDS = 2


@dataclass(frozen=True)
class Times:
    """Seconds of one call in each round. is_graph: a CUDA graph was replayed, so no host time is in them."""

    seconds: tuple[float, ...]
    is_graph: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(third - first quartile) / median; 0 for a single round."""
        return quartile_range(self.seconds) / self.median if self.median else 0.0

    def scaled(self, factor: float) -> Times:
        return Times(tuple(value * factor for value in self.seconds), self.is_graph)

    def over(self, other: Times) -> Ratio:
        """Self / other round by round."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True) if b]
        return Ratio(statistics.median(ratios) if ratios else math.nan, quartile_range(ratios))

    def plus(self, other: Times) -> Times:
        """Sums of the same rounds."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return Times(tuple(a + b for a, b in pairs), self.is_graph and other.is_graph)


@dataclass(frozen=True)
class Ratio:
    """Median over rounds, and the range between its quartiles."""

    median: float
    spread: float


def quartile_range(values: tuple[float, ...] | list[float]) -> float:
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]


class Timer(Protocol):
    """is_meaningful: the figures are of a GPU."""

    is_meaningful: bool

    def time(self, calls: Mapping[str, Call], target_s: float = 1e-3) -> dict[str, Times | str]:
        """Times of each call, or why there are none.

        target_s  a call is repeated within a round until it takes about this long: events resolve half a microsecond
        """
        ...


class CudaTimer:
    """CUDA events around graphs."""

    is_meaningful = True

    def time(self, calls: Mapping[str, Call], target_s: float = 1e-3) -> dict[str, Times | str]:
        found: dict[str, Times | str] = {}
        runs: dict[str, tuple[Call, int, bool]] = {}
        for name, call in calls.items():
            try:
                run, is_graph = _captured(call)
                runs[name] = (run, _repeats(target_s, _elapsed(run, 1)), is_graph)
            except Exception as error:
                found[name] = reason(error)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(_WARM_ROUNDS + ROUNDS):
            for name, (run, repeats, _) in runs.items():
                elapsed = _elapsed(run, repeats)
                if turn >= _WARM_ROUNDS:
                    seconds[name].append(elapsed)
        found |= {name: Times(tuple(seconds[name]), is_graph) for name, (_, _, is_graph) in runs.items()}
        return found


def _captured(call: Call) -> tuple[Call, bool]:
    """The call as a graph's replay, after a run that compiles and plans; as it is if it cannot be captured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:
        torch.cuda.synchronize()
        call()
        return call, False
    return graph.replay, True


def _repeats(target_s: float, one_s: float) -> int:
    return max(1, min(50, math.ceil(target_s / max(one_s, 1e-6))))


def _elapsed(run: Call, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


class HostTimer:
    """One run of each call by a clock of the host. For dry runs: nothing is fast or slow by it."""

    is_meaningful = False

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def time(self, calls: Mapping[str, Call], target_s: float = 1e-3) -> dict[str, Times | str]:
        found: dict[str, Times | str] = {}
        for name, call in calls.items():
            try:
                start = self._clock()
                call()
                found[name] = Times((self._clock() - start,), is_graph=False)
            except Exception as error:
                found[name] = reason(error)
        return found


def reason(error: BaseException) -> str:
    """One line for a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


def free_memory() -> None:
    """Give back what the last case held, so that the next one's size is judged by the device and not by leftovers."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Rates:
    """What this machine does in this run: bytes read and written per second by a large copy, FLOP/s of a product."""

    copy_bytes_per_s: float
    matrix_flop_per_s: float


def measure_rates(timer: Timer, device: torch.device, num_bytes: int = 1 << 30, size: int = 8192) -> Rates:
    """A copy of `num_bytes` and a bfloat16 size^3 product of normal values: zeros run an eighth faster."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = timer.time({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b)}, 4e-3)
    times = {name: value for name, value in found.items() if isinstance(value, Times)}
    if len(times) < 2:
        raise RuntimeError(f"the machine's rates cannot be measured: {found}")
    copy, product = times["copy"].median, times["product"].median
    return Rates(2 * source.nbytes / copy, 2.0 * size**3 / product)


def device_seconds(call: Call) -> dict[str, float]:
    """Seconds on the device by kernel name of one run of the call; empty where there is no device to ask."""
    if not torch.cuda.is_available():
        return {}
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e6 for event in profile.key_averages()}
