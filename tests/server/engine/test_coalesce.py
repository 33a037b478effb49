"""Which deltas wait for company, and that joining them loses nothing."""

from __future__ import annotations

from scheduler.types import DecodingUsage, Delta, FinishReason, Snapshot, SpeculationUsage, StepStats
from server.engine.coalesce import Outgoing, merge


def test_merging_keeps_every_token_in_order_and_the_end() -> None:
    parts = [Delta("r", (1,), cached_tokens=4), Delta("r", (2, 3)), Delta("r", (5,), finish_reason=FinishReason.STOP)]
    assert merge(parts) == Delta("r", (1, 2, 3, 5), cached_tokens=4, finish_reason=FinishReason.STOP)


def test_merging_adds_up_what_drafts_came_to() -> None:
    parts = [
        Delta("r", (1, 2), speculation=SpeculationUsage(3, 1, 1, 2, 1)),
        Delta("r", (3,)),
        Delta("r", (4, 5, 6), speculation=SpeculationUsage(2, 2, 1)),
    ]
    assert merge(parts).speculation == SpeculationUsage(5, 3, 2, 2, 1)
    assert merge(parts[1:2] * 2).speculation is None


def test_merging_adds_up_what_denoising_took_and_keeps_the_newest_block() -> None:
    blocks = [Snapshot(8, (1, 9), 1), Snapshot(8, (1, 2), 2)]
    parts = [
        Delta("r", decoding=DecodingUsage(1, 0, 8), snapshot=blocks[0]),
        Delta("r", (1, 2), decoding=DecodingUsage(2, 1, 24), snapshot=blocks[1]),
        Delta("r", (3,)),
    ]
    whole = merge(parts)
    assert (whole.decoding, whole.snapshot) == (DecodingUsage(3, 1, 32), blocks[1])
    assert merge(parts[2:] * 2).decoding is None


def test_tokens_of_fast_steps_wait_for_each_other() -> None:
    out = Outgoing(0.010)
    out.take(100.0)
    out.add([Delta("r", (1,))], StepStats(1))
    assert not out.is_due(100.002, 0.002)
    out.add([Delta("r", (2,))], StepStats(2))
    assert out.is_due(100.009, 0.002)
    update = out.take(100.009)
    assert [delta.tokens for delta in update.deltas] == [(1, 2)]
    assert [stats.step for stats in update.steps] == [1, 2]


def test_a_first_token_a_snapshot_and_an_end_never_wait() -> None:
    for delta in (
        Delta("r", (1,), cached_tokens=0),
        Delta("r", (1,), finish_reason=FinishReason.LENGTH),
        Delta("r", snapshot=Snapshot(0, (1,), 1)),
    ):
        out = Outgoing(0.010)
        out.take(100.0)
        out.add([delta], None)
        assert out.is_due(100.0, 0.0)


def test_tokens_do_not_wait_through_a_long_step() -> None:
    out = Outgoing(0.010)
    out.take(100.0)
    out.add([Delta("r", (1,))], None)
    assert out.is_due(100.001, 0.050)
    assert out.is_due(100.001, float("inf"))


def test_an_aborted_request_says_no_more() -> None:
    out = Outgoing(0.0)
    out.add([Delta("r", (1,)), Delta("s", (2,))], None)
    out.drop("r")
    assert [delta.request_id for delta in out.take(0.0).deltas] == ["s"]
