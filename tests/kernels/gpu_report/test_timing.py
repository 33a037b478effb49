"""Medians, spreads and ratios of rounds, and calls that fail."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels.gpu_report import timing
from kernels.gpu_report.timing import HostTimer, Times, device_seconds, measure_rates, reason


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down by half between rounds changes times, not ratios."""
    ours, theirs = Times((1.0, 2.0, 4.0)), Times((3.0, 6.0, 12.0))
    assert theirs.over(ours).median == 3.0
    assert theirs.over(ours).spread == 0.0
    assert ours.median == 2.0
    assert ours.plus(theirs).seconds == (4.0, 8.0, 16.0)


def test_the_spread_is_the_range_of_the_quartiles_over_the_median() -> None:
    times = Times(tuple(float(value) for value in range(1, 12)))  # quartiles 3, 6, 9
    assert times.spread == 1.0
    assert times.scaled(0.5).spread == 1.0
    assert times.scaled(0.5).median == 3.0


def test_a_call_that_fails_has_a_reason_and_the_others_have_times() -> None:
    ticks = itertools.count()

    def fail() -> None:
        raise ValueError("no such\n  kernel")

    found = HostTimer(lambda: float(next(ticks))).time({"good": lambda: None, "bad": fail, "late": lambda: None})
    assert found["bad"] == "ValueError: no such kernel"
    assert found["good"] == found["late"] == Times((1.0,), is_graph=False)


def test_reasons_are_one_short_line() -> None:
    assert reason(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 20 GiB")) == "out of memory"
    assert len(reason(RuntimeError("x" * 999))) == 160


def test_rates_count_both_directions_of_a_copy() -> None:
    ticks = itertools.count(0, 2)
    rates = measure_rates(HostTimer(lambda: float(next(ticks))), torch.device("cpu"), num_bytes=4096, size=8)
    assert rates.copy_bytes_per_s == 2 * 4096 / 2
    assert rates.matrix_flop_per_s == 2 * 8**3 / 2


def test_a_machine_without_rates_is_an_error() -> None:
    class Broken(HostTimer):
        def time(self, calls: object, target_s: float = 0.0) -> dict[str, Times | str]:
            return {"copy": "out of memory", "product": Times((1.0,))}

    with pytest.raises(RuntimeError, match="rates cannot be measured"):
        measure_rates(Broken(), torch.device("cpu"), 4096, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to ask")
def test_without_a_device_there_are_no_seconds_on_it() -> None:
    assert device_seconds(lambda: None) == {}


def test_rounds_go_through_all_calls_and_the_warm_ones_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's timer with its two calls to CUDA replaced: a replay takes as many seconds as replays came before it."""
    order: list[str] = []

    def captured(call: timing.Call) -> tuple[timing.Call, bool]:
        call()
        return call, False

    def elapsed(run: timing.Call, repeats: int) -> float:
        for _ in range(repeats):
            run()
        return float(len(order))

    monkeypatch.setattr(timing, "_captured", captured)
    monkeypatch.setattr(timing, "_elapsed", elapsed)

    def fail() -> None:
        raise torch.cuda.OutOfMemoryError

    calls = {"a": lambda: order.append("a"), "bad": fail, "b": lambda: order.append("b")}
    found = timing.CudaTimer().time(calls)
    assert found["bad"] == "out of memory"
    a, b = found["a"], found["b"]
    assert isinstance(a, Times)
    assert isinstance(b, Times)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 22], "captured, measured once, then in turns"
    # Two warm rounds lie between the four first runs and the first that counts.
    assert a.seconds == tuple(range(9, 49, 2))
    assert len(b.seconds) == timing.ROUNDS == 20
    assert not a.is_graph


def test_short_calls_are_repeated_within_a_round() -> None:
    assert timing._repeats(1e-3, 1e-4) == 10
    assert timing._repeats(1e-3, 5e-2) == 1
    assert timing._repeats(1e-3, 0.0) == 50
