"""Steps that are launched before the one before them is over: the device never waits, and no text changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.types import Delta, Limits, Request, StepPlan, StepResult
from server.engine.several import SeveralCores
from tests.server.engine.crowd import Crowd
from tests.server.engine.fakes import LIMITS, FakeWorker, expected, fake_core, request, tokens_of
from tests.server.engine.test_overlap import Device, serve


class Timeline:
    """Seconds that pass by themselves for nobody: the host's work is added, the device's is waited for."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class TimedDevice(FakeWorker):
    """Steps of `step_s` on a device that runs them one by one. gaps: seconds that it stood still before each."""

    def __init__(self, clock: Timeline, step_s: float) -> None:
        super().__init__()
        self.is_asynchronous = True
        self.gaps: list[float] = []
        self._clock, self._seconds, self._free_s = clock, step_s, 0.0

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        result = self.run(plan)
        started_s = max(self._clock.now_s, self._free_s)
        self.gaps.append(started_s - self._free_s)
        over_s = self._free_s = started_s + self._seconds

        def finish() -> StepResult:
            self._clock.now_s = max(self._clock.now_s, over_s)
            return result

        return finish


@pytest.mark.parametrize(("step_s", "host_s", "gap_s"), [(10.0, 3.0, 0.0), (10.0, 9.5, 0.0), (4.0, 9.0, 5.0)])
def test_the_hosts_work_disappears_behind_the_device(step_s: float, host_s: float, gap_s: float) -> None:
    """Without planning ahead the device stands still for all of it; with it only for what is longer than a step."""
    gaps = {}
    for plans_ahead in (False, True):
        clock = Timeline()
        worker = TimedDevice(clock, step_s)
        core = fake_core(worker, clock=clock, plans_ahead=plans_ahead)
        for i in range(4):
            core.add(request(f"r{i}", (i, 3), 40))
        while core.has_work:
            core.step()
            # What is done with a step's tokens before the next one can be planned.
            clock.now_s += host_s
        gaps[plans_ahead] = worker.gaps[2:]
    assert gaps[False] == pytest.approx([host_s] * len(gaps[False]))
    assert gaps[True] == pytest.approx([gap_s] * len(gaps[True]))
    assert len(gaps[True]) == len(gaps[False])


@pytest.mark.parametrize("seed", range(16))
def test_requests_that_come_and_go_between_two_steps_change_no_text(seed: int) -> None:
    """Poisoned ones too, whichever half of the step says so; every page is free in the end, of few or many."""
    rng = random.Random(seed)
    worker = Device(late=bool(seed % 2), most=2)
    limits = Limits(256, 32, 512, 20, 4) if seed % 4 > 1 else LIMITS
    core = fake_core(worker, limits, plans_ahead=True)
    crowd = Crowd(core, rng)
    num_ahead = num_preempted = 0
    while crowd.has_work:
        crowd.come_and_go()
        if core.under_way is None and (plan := core.plan()) is not None:
            core.launch(plan)
        out = core.take_outbox()
        if core.under_way is not None:
            crowd.come_and_go()
            core.launch_ahead()
            crowd.come_and_go()
            more, stats = core.collect()
            num_ahead += stats.is_ahead
            num_preempted += stats.num_preempted
            out += more
        crowd.take(out)
    crowd.check()
    assert num_ahead > 5
    assert (num_preempted > 0) is (limits is not LIMITS)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("failing", range(2, 12))
def test_memory_that_runs_out_once_costs_no_request(failing: int, late: bool) -> None:
    """The step behind the one that failed is run again, too."""
    worker = Device(late=late, most=2)
    core, num_runs = fake_core(worker, plans_ahead=True), 0

    def raises(plan: StepPlan) -> Exception | None:
        nonlocal num_runs
        num_runs += 1
        return RuntimeError("not enough memory") if num_runs == failing else None

    worker._raises = raises
    for i in range(6):
        core.add(request(f"r{i}", (i,), 20))
    deltas: dict[str, list[Delta]] = {}
    while core.has_work:
        for delta in core.step()[0]:
            deltas.setdefault(delta.request_id, []).append(delta)
    assert num_runs > failing
    assert all(tokens_of(deltas[f"r{i}"]) == expected((i,), 20) for i in range(6))
    assert core.stats().pages_used == 0


def test_a_device_error_behind_another_step_leaves_the_core() -> None:
    worker = Device(late=True, most=2)
    core = fake_core(worker, plans_ahead=True)
    core.add(request("r", max_tokens=20))
    for _ in range(3):
        core.step()
    worker._raises = lambda plan: RuntimeError("CUDA error: device-side assert triggered")
    core.step()
    with pytest.raises(RuntimeError, match="CUDA"):
        core.step()


def test_a_prompt_that_arrives_while_two_steps_are_under_way_joins_the_next_plan() -> None:
    core = fake_core(Device(most=2), plans_ahead=True)
    core.add(request("a", (1, 2), 30))
    for _ in range(3):
        core.step()
    assert core.under_way is not None
    core.add(request("b", (5, 6), 30))
    first = [step for step in range(1, 4) for delta in core.step()[0] if delta.request_id == "b"]
    # Its own step is the one behind the step that was under way already.
    assert first[0] == 2


@pytest.mark.parametrize("num_models", [1, 2])
def test_the_loop_launches_ahead_while_one_model_has_work(num_models: int, tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []
    alone = fake_core(Device(events, most=2), plans_ahead=True)
    other = fake_core(Device(model="b"), plans_ahead=True)
    core = alone if num_models == 1 else SeveralCores({"": alone, "b": other})
    names = ["a", "bb", "ccc"]
    tokens = serve(core, events, tmp_path, names)
    assert tokens == {name: expected((len(name), 7), 10) for name in names}
    steps = [step for what, step in events if what == "launch"]
    assert steps == [step for what, step in events if what == "collect"]
    ahead = [step for step in steps if events.index(("launch", step)) < events.index(("collect", max(1, step - 1)))]
    assert len(ahead) > len(steps) // 2
    for step in ahead[1:]:
        begin, end = events.index(("launch", step)), events.index(("collect", step))
        assert ("drain", 0) in events[begin:end], "what arrives waits for the step"
        assert ("send", step - 1) in events[begin:end], "tokens wait for the step that is under way"


def test_models_that_take_turns_do_not_launch_ahead_of_each_other() -> None:
    cores = {name: fake_core(Device(model=name), plans_ahead=True) for name in ("a", "b")}
    several = SeveralCores(cores)
    for name in cores:
        for i in range(2):
            several.add(_of(name, i))
    tokens: dict[str, list[int]] = {}
    while several.has_work:
        if several.under_way is None and (plan := several.plan()) is not None:
            several.launch(plan)
        # Each of the devices refuses a second step while the other model has work, too.
        if all(core.has_work for core in cores.values()):
            several.launch_ahead()
        for delta in several.collect()[0]:
            tokens.setdefault(delta.request_id, []).extend(delta.tokens)
    assert tokens == {f"{name}{i}": expected((i, 4), 8, name) for name in cores for i in range(2)}


def _of(model: str, number: int) -> Request:
    return replace(request(f"{model}{number}", (number, 4)), model=model)
