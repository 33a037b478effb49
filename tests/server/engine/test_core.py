"""EngineCore over a fake worker and the real scheduler: steps, faults, grammars, aborts."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from scheduler.policies import plain
from scheduler.types import Delta, FinishReason, Grammar, GrammarKind, StepPlan
from server.engine.core import EngineCore
from tests.server.engine.fakes import LIMITS, POISON, FakeWorker, expected, fake_core, request, tokens_of


def run(core: EngineCore, timeout_s: float = 60.0) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    deadline = time.monotonic() + timeout_s
    while core.has_work:
        assert time.monotonic() < deadline
        for delta in core.step()[0]:
            deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


@pytest.mark.parametrize("seed", range(30))
def test_a_poisoned_request_fails_alone_whenever_it_comes(seed: int) -> None:
    rng = random.Random(seed)
    worker = FakeWorker()
    core = fake_core(worker)
    size = rng.randint(2, 16)
    culprit = rng.randrange(size)
    for i in range(size):
        core.add(request(f"r{i}", (i, POISON if i == culprit else 7), 1 + i))
        if rng.random() < 0.4:
            core.step()
    deltas = run(core)
    last = deltas[f"r{culprit}"][-1] if f"r{culprit}" in deltas else None
    for i in range(size):
        if i != culprit and f"r{i}" in deltas:
            assert expected((i, 7), 1 + i)[-len(tokens_of(deltas[f"r{i}"])) :] == tokens_of(deltas[f"r{i}"])
    if last is not None:
        assert last.fault is not None
        assert last.fault.status == 500
    assert core.stats().pages_used == 0


def test_the_error_of_a_failing_step_ends_once() -> None:
    core = fake_core(FakeWorker())
    core.add(request("bad", (POISON,)))
    core.add(request("good", (5,)))
    deltas = run(core)
    assert [delta.finish_reason for delta in deltas["bad"]] == [FinishReason.ERROR]
    assert tokens_of(deltas["good"]) == expected((5,), 8)


def test_a_device_error_leaves_the_core() -> None:
    def dies(plan: StepPlan) -> Exception:
        return RuntimeError("CUDA error: device-side assert triggered")

    core = fake_core(FakeWorker(raises=dies))
    core.add(request("r"))
    with pytest.raises(RuntimeError, match="CUDA"):
        core.step()


@pytest.mark.parametrize("failing_step", range(1, 31))
def test_memory_that_runs_out_once_costs_no_request(failing_step: int) -> None:
    calls = 0

    def raises(plan: StepPlan) -> Exception | None:
        nonlocal calls
        calls += 1
        return MemoryError() if calls == failing_step else None

    core = fake_core(FakeWorker(raises=raises))
    for i in range(6):
        core.add(request(f"r{i}", (i,), 20))
    deltas = run(core)
    assert all(tokens_of(deltas[f"r{i}"]) == expected((i,), 20) for i in range(6))
    assert core.stats().pages_used == 0


@pytest.mark.parametrize(
    ("source", "status"), [("good", None), ("bad", 400), ("slow", 400), ("bug", 500)], ids=lambda value: str(value)
)
def test_grammars_are_compiled_beside_the_loop_and_fail_alone(source: str, status: int | None) -> None:
    worker = FakeWorker()
    core = fake_core(worker, grammar_timeout_s=0.2 if source == "slow" else 60.0)
    core.add(request("g", (1,), grammar=Grammar(GrammarKind.REGEX, source)))
    core.add(request("plain", (2,), 3))
    deltas = run(core)
    assert tokens_of(deltas["plain"]) == expected((2,), 3)
    fault = deltas["g"][-1].fault
    assert (fault.status if fault else None) == status
    assert fault is None or fault.param == "response_format"
    worker.patience.set()
    deadline = time.monotonic() + 60
    while "g" not in worker.forgotten:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_too_many_endless_compilations_are_refused_not_piled_up() -> None:
    worker = FakeWorker()
    core = fake_core(worker, grammar_timeout_s=0.05)
    for i in range(4):
        core.add(request(f"g{i}", (1,), grammar=Grammar(GrammarKind.REGEX, "slow")))
    deltas = run(core)
    assert [deltas[f"g{i}"][-1].fault.status for i in range(4)] == [400] * 4  # type: ignore[union-attr]
    core.add(request("later", (1,), grammar=Grammar(GrammarKind.REGEX, "slow")))
    later = run(core)["later"][-1].fault
    assert later is not None
    assert (later.status, later.code) == (503, "grammar_busy")
    worker.patience.set()


def test_an_abort_at_any_moment_leaves_no_page_and_no_delta() -> None:
    rng = random.Random(3)
    worker = FakeWorker()
    core = fake_core(worker, grammar_timeout_s=0.05)
    alive: set[str] = set()
    for i in range(300):
        grammar = Grammar(GrammarKind.REGEX, rng.choice(["good", "slow"])) if rng.random() < 0.2 else None
        core.add(request(f"r{i}", [i] * rng.randint(1, 60), rng.randint(1, 40), grammar=grammar))
        alive.add(f"r{i}")
        if rng.random() < 0.7:
            victim = rng.choice(sorted(alive))
            core.abort(victim)
            core.abort(victim)
            alive.discard(victim)
        if rng.random() < 0.5:
            for delta in core.step()[0]:
                assert delta.request_id in alive
                if delta.finish_reason is not None:
                    alive.discard(delta.request_id)
    for name in list(alive):
        core.abort(name)
    worker.patience.set()
    assert not core.has_work
    assert core.stats().pages_used == 0


def test_closing_the_core_lets_the_worker_keep_what_it_learnt() -> None:
    worker = FakeWorker()
    fake_core(worker).close()
    assert worker.is_closed


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_request_that_no_step_touches_in_time_fails_and_the_others_do_not_notice() -> None:
    clock = Clock()
    core = fake_core(FakeWorker(), replace(LIMITS, max_seqs=2), clock=clock, queue_timeout_s=30.0)
    deltas: dict[str, list[Delta]] = {}

    def step() -> None:
        for delta in core.step()[0]:
            deltas.setdefault(delta.request_id, []).append(delta)

    for name in ("a", "b", "early", "aborted"):
        core.add(request(name, (ord(name[0]),), 40))
    step()
    clock.now += 20.0
    core.add(request("late", (9,), 5))
    core.abort("aborted")
    clock.now += 10.0
    step()
    assert set(deltas) == {"a", "b"}
    clock.now += 0.1
    step()
    fault = deltas["early"][-1].fault
    assert fault is not None
    assert (fault.status, fault.code) == (503, "timeout")
    assert "30 s" in fault.message
    # What runs may take as long as it likes, and "late" still has ten seconds.
    clock.now += 9.0
    while core.has_work:
        step()
    for name, count in (("a", 40), ("b", 40), ("late", 5)):
        assert tokens_of(deltas[name]) == expected((9,) if name == "late" else (ord(name),), count)
        assert deltas[name][-1].fault is None
    assert "aborted" not in deltas
    assert len(core._patience) == 0
    assert core.stats().pages_used == 0


def test_a_preempted_or_resubmitted_request_with_output_is_never_too_late() -> None:
    clock = Clock()
    limits = replace(LIMITS, max_seqs=4, num_pages=8, max_queued_requests=1)
    core = fake_core(FakeWorker(), limits, clock=clock, queue_timeout_s=1.0)
    for i in range(4):
        core.add(request(f"r{i}", (i,), 60))
    deltas = {f"r{i}": [] for i in range(4)}  # type: dict[str, list[Delta]]
    core.step()
    began = expected((7,), 10)
    core.add(replace(request("again", (7,), 30), output=tuple(began)), is_resubmission=True)
    num_preempted = 0
    while core.has_work:
        clock.now += 5.0
        found, stats = core.step()
        num_preempted += stats.num_preempted if stats is not None else 0
        for delta in found:
            assert delta.fault is None
            deltas.setdefault(delta.request_id, []).append(delta)
    assert num_preempted > 0
    assert tokens_of(deltas["again"]) == expected((7,), 30)[10:]
    assert len(core._patience) == 0


def test_a_grammar_that_waits_for_its_compilation_is_waiting_too() -> None:
    clock = Clock()
    worker = FakeWorker()
    core = fake_core(worker, clock=clock, grammar_timeout_s=600.0, queue_timeout_s=30.0)
    core.add(request("g", (1,), grammar=Grammar(GrammarKind.REGEX, "slow")))
    assert core.step() == ([], None)
    clock.now += 31.0
    core.plan()
    (delta,) = core.take_outbox()
    assert delta.fault is not None
    assert delta.fault.code == "timeout"
    worker.patience.set()
    deadline = time.monotonic() + 60
    while core.has_work or "g" not in worker.forgotten:
        assert time.monotonic() < deadline
        assert core.step() == ([], None)


def test_what_an_engine_had_accepted_is_not_refused_by_the_next_one() -> None:
    limits = replace(LIMITS, max_seqs=2, max_queued_requests=2, max_queued_tokens=20)
    core = fake_core(FakeWorker(), limits)
    for i in range(12):
        core.add(request(f"r{i}", (i,) * 10, 3), is_resubmission=True)
    core.add(request("new", (1,), 3))
    deltas = run(core)
    fault = deltas["new"][-1].fault
    assert fault is not None
    assert fault.status == 429
    for i in range(12):
        assert tokens_of(deltas[f"r{i}"]) == expected((i,) * 10, 3)


def test_what_the_worker_cannot_denoise_is_the_requests_own_fault() -> None:
    core = fake_core(FakeWorker())
    core.add(replace(request("bad", (5,)), decoding=plain("learn2pd")), is_resubmission=True)
    core.add(request("good", (5,)))
    deltas = run(core)
    fault = deltas["bad"][0].fault
    assert fault is not None
    assert (fault.status, fault.param, fault.message) == (400, "decoding", "learn2pd needs a filter")
    assert tokens_of(deltas["good"]) == expected((5,), 8)
