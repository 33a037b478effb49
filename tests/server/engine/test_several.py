"""SeveralCores over fake workers, real schedulers and a clock that only steps move: whose turn it is, how long."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from scheduler.scheduler import Scheduler
from scheduler.types import Delta, FinishReason, Limits, Request, StepPlan, StepResult, StepStats
from server.engine.core import EngineCore
from server.engine.several import SeveralCores
from tests.server.engine.fakes import LIMITS, POISON, FakeWorker, expected, request

NAMES = ("", "b")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedWorker(FakeWorker):
    """A step takes `base_s` and 0.1 ms for each of its rows, by the test's clock, give or take `jitter` of it."""

    def __init__(self, model: str, clock: Clock, base_s: float, jitter: float) -> None:
        super().__init__(model=model)
        self._clock, self._base_s, self._jitter = clock, base_s, jitter
        self._rng = random.Random(model)

    def run(self, plan: StepPlan) -> StepResult:
        result = super().run(plan)
        elapsed_s = self._base_s + 1e-4 * plan.num_tokens
        elapsed_s *= 1 + self._jitter * self._rng.uniform(-1, 1)
        self._clock.now += elapsed_s
        return replace(result, elapsed_s=elapsed_s)


class Pair:
    """Two models, "" and "b", and what they gave: tokens with the time they came at, and each step's (model, stats)."""

    def __init__(
        self, base_s: tuple[float, float] = (0.01, 0.01), limits: Limits = LIMITS, jitter: float = 0.0
    ) -> None:
        self.clock = Clock()
        self.workers = [TimedWorker(name, self.clock, base, jitter) for name, base in zip(NAMES, base_s, strict=True)]
        made = {worker.model: EngineCore(worker, Scheduler(limits), self.clock) for worker in self.workers}
        self.cores = SeveralCores(made, self.clock)
        self.steps: list[StepStats] = []
        self.deltas: dict[str, list[Delta]] = {}
        self.arrivals: dict[str, list[float]] = {}

    def add(self, name: str, model: str = "", prompt: Iterable[int] = (1, 2), max_tokens: int = 8) -> None:
        self.cores.add(self.made(name, model, prompt, max_tokens))

    @staticmethod
    def made(name: str, model: str = "", prompt: Iterable[int] = (1, 2), max_tokens: int = 8) -> Request:
        return replace(request(name, prompt, max_tokens), model=model)

    def step(self) -> bool:
        plan = self.cores.plan()
        found = self.cores.take_outbox()
        if plan is not None:
            more, stats = self.cores.execute(plan)
            found += more
            self.steps.append(stats)
        for delta in found:
            self.deltas.setdefault(delta.request_id, []).append(delta)
            if delta.tokens:
                self.arrivals.setdefault(delta.request_id, []).append(self.clock.now)
        return plan is not None

    def run(self) -> None:
        while self.cores.has_work:
            self.step()

    def tokens(self, name: str) -> list[int]:
        return [token for delta in self.deltas.get(name, ()) for token in delta.tokens]

    def gaps(self, name: str) -> list[float]:
        times = self.arrivals[name]
        return [after - before for before, after in itertools.pairwise(times)]

    def used_s(self, model: str, steps: Iterable[StepStats]) -> float:
        return sum(stats.elapsed_s for stats in steps if stats.model == model)


def test_each_request_gets_the_text_of_its_own_model() -> None:
    pair = Pair()
    for i in range(8):
        pair.add(f"r{i}", "b" if i % 2 else "", (i, 7), 5 + i)
    pair.run()
    for i in range(8):
        assert pair.tokens(f"r{i}") == expected((i, 7), 5 + i, "b" if i % 2 else "")
    assert {stats.model for stats in pair.steps} == {"", "b"}


def test_a_model_that_is_not_here_is_a_404_of_that_request_alone() -> None:
    pair = Pair()
    pair.add("lost", "c")
    pair.add("good", "b")
    pair.run()
    (delta,) = pair.deltas["lost"]
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.fault is not None
    assert (delta.fault.status, delta.fault.param) == (404, "model")
    assert pair.tokens("good") == expected((1, 2), 8, "b")


@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_equal_models_alternate_step_by_step(jitter: float) -> None:
    pair = Pair(jitter=jitter)
    pair.add("a", "", max_tokens=40)
    pair.add("b", "b", max_tokens=40)
    pair.run()
    both = [stats.model for stats in pair.steps[:78]]
    assert all(before != after for before, after in itertools.pairwise(both))


@pytest.mark.parametrize("base_s", [(0.01, 0.01), (0.01, 0.1), (0.1, 0.003)])
def test_unequal_models_get_equal_time(base_s: tuple[float, float]) -> None:
    pair = Pair(base_s)
    pair.add("a", "", max_tokens=400)
    pair.add("b", "b", max_tokens=400)
    while len(pair.tokens("a")) < 400 and len(pair.tokens("b")) < 400:
        pair.step()
        if len(pair.steps) > 10:
            assert abs(pair.used_s("", pair.steps) - pair.used_s("b", pair.steps)) <= max(base_s) + 0.01


def test_time_that_a_model_left_to_the_other_is_not_owed_to_it() -> None:
    pair = Pair()
    for name in ("", "b"):
        pair.add(f"first{name}", name, max_tokens=5)
    pair.add("long", "", max_tokens=300)
    for _ in range(200):
        pair.step()
    before = len(pair.steps)
    pair.add("late", "b", max_tokens=40)
    for _ in range(60):
        pair.step()
    recent = [stats.model for stats in pair.steps[before : before + 60]]
    assert recent.count("b") == pytest.approx(30, abs=1)
    # Nor by one that was away while nobody had anything to do.
    pair.run()
    pair.add("again", "", max_tokens=200)
    for _ in range(100):
        pair.step()
    pair.run()
    before = len(pair.steps)
    for name in ("", "b"):
        pair.add(f"last{name}", name, max_tokens=50)
    pair.run()
    last = [stats.model for stats in pair.steps[before : before + 40]]
    assert last.count("b") == pytest.approx(20, abs=1)


def test_a_model_without_work_costs_the_other_nothing() -> None:
    pair, alone = Pair(), Pair()
    pair.add("warm", "b", max_tokens=3)
    pair.run()
    began = len(pair.steps)
    for made in (pair, alone):
        for i in range(6):
            made.add(f"r{i}", "", [i] * 200, 30)
        made.run()
    shape = [(stats.budget, stats.prefill_tokens, stats.decode_tokens) for stats in pair.steps[began:]]
    assert shape == [(stats.budget, stats.prefill_tokens, stats.decode_tokens) for stats in alone.steps]


def prompts_beside_a_stream(limits: Limits, stream: str, prompts: str) -> Pair:
    """A stream of one model beside prompts of the other. Both cost models have learnt; `steps` are the stream's."""
    pair = Pair(limits=limits)
    for name in (stream, prompts):
        for i in range(6):
            pair.add(f"warm{name}{i}", name, [i] * (30 * i + 1), 12)
    pair.run()
    pair.steps.clear()
    pair.add("stream", stream, max_tokens=150)
    for _ in range(10):
        pair.step()
    for i in range(6):
        pair.add(f"prompt{i}", prompts, range(i, i + 400), 1)
    while len(pair.tokens("stream")) < 150:
        pair.step()
    steps = list(pair.steps)
    pair.run()
    pair.steps = steps
    assert pair.tokens("stream") == expected((1, 2), 150, stream)
    assert all(pair.tokens(f"prompt{i}") == expected(range(i, i + 400), 1, prompts) for i in range(6))
    return pair


def test_the_prompts_of_one_model_leave_the_streams_of_the_other_their_target() -> None:
    target_s = 0.05
    pair = prompts_beside_a_stream(replace(LIMITS, tbt_slo_s=target_s), "", "b")
    # A step of 256 rows alone would take 36 ms, two thirds of the target; next to ours it may have half of it.
    assert max(pair.gaps("stream")[15:]) <= target_s
    prefills = [stats for stats in pair.steps if stats.model == "b" and stats.prefill_tokens > 16]
    assert max(stats.elapsed_s for stats in prefills) <= target_s / 2
    assert max(stats.prefill_tokens for stats in prefills) > 40


def test_without_a_target_the_prompts_of_one_model_stretch_the_streams_of_the_other_by_the_usual_factor() -> None:
    pair = prompts_beside_a_stream(LIMITS, "b", "")
    undisturbed_s = 0.0101
    assert max(pair.gaps("stream")[15:]) <= 2 * LIMITS.tbt_auto_factor * undisturbed_s


def test_prompts_beside_prompts_take_whole_steps() -> None:
    pair = Pair(limits=replace(LIMITS, tbt_slo_s=0.001))
    for name in ("", "b"):
        for i in range(4):
            pair.add(f"{name}{i}", name, [i] * 30, 3)
    pair.run()
    for name in ("", "b"):
        pair.add(f"{name}long", name, range(490), 1)
    pair.step()
    pair.step()
    assert [stats.prefill_tokens for stats in pair.steps[-2:]] == [256, 256]


def test_a_decode_is_in_every_step_of_its_model_however_little_time_there_is() -> None:
    pair = prompts_beside_a_stream(replace(LIMITS, tbt_slo_s=1e-6), "", "b")
    mine = [stats for stats in pair.steps if stats.model == ""]
    assert sum(stats.decode_tokens for stats in mine) >= 149
    # The prompts come through, in the least chunks that there are.
    assert {stats.prefill_tokens for stats in pair.steps[12:] if stats.model == "b"} == {16}


def test_a_poisoned_request_of_one_model_fails_alone() -> None:
    pair = Pair()
    pair.add("bad", "b", (POISON,))
    pair.add("good", "b", (5,))
    pair.add("other", "", (6,))
    pair.run()
    assert [delta.finish_reason for delta in pair.deltas["bad"]] == [FinishReason.ERROR]
    assert pair.tokens("good") == expected((5,), 8, "b")
    assert pair.tokens("other") == expected((6,), 8)


@pytest.mark.parametrize("seed", range(20))
def test_random_worlds_of_two_models_are_exact_and_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    limits = replace(LIMITS, num_pages=60, tbt_slo_s=rng.choice([None, 0.02, 0.1]))
    pair = Pair((rng.uniform(0.001, 0.05), rng.uniform(0.001, 0.05)), limits=limits)
    asked: dict[str, Request] = {}
    aborted: set[str] = set()
    while len(asked) < 60 or pair.cores.has_work:
        if len(asked) < 60 and rng.random() < 0.4:
            name = f"r{len(asked)}"
            prompt = [rng.randrange(400) for _ in range(rng.randint(1, 120))]
            asked[name] = pair.made(name, rng.choice(["", "b"]), prompt, rng.randint(1, 40))
            pair.cores.add(asked[name])
        if asked and rng.random() < 0.05:
            aborted.add(victim := rng.choice(sorted(asked)))
            pair.cores.abort(victim)
        pair.step()
    for name, made in asked.items():
        whole = expected(made.prompt, made.max_tokens, made.model)
        found = pair.tokens(name)
        assert found == whole[: len(found)]
        assert name in aborted or found == whole
    assert not any(turn.core.stats().pages_used for turn in pair.cores._turns)


def test_closing_lets_both_workers_keep_what_they_learnt() -> None:
    pair = Pair()
    pair.cores.close()
    assert [worker.is_closed for worker in pair.workers] == [True, True]
