"""The warm-up's step times: what is measured, what an earlier start's are good for, what it leaves behind."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from scheduler.fake_worker import features_of
from scheduler.types import Request, Sampling, StepPlan, StepResult
from server.worker.profile import RECHECKED, SHAPES, measure_steps
from server.worker.profile_memory import MAX_FILES, DiskMemory, default_folder
from tests.server.worker.tiny_model import Driver, TinyModel, make_worker

CONDITIONS: dict[str, str | int] = {"model": "tiny", "threads": 1}


class Clock:
    """Runs no step and says how long it took: `seconds` for the first shape, in proportion for larger ones."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds
        self.plans: list[StepPlan] = []
        self.num_pages, self.page_size, self.model_len = 4096, 16, 2048

    def run(self, plan: StepPlan) -> StepResult:
        if plan.spans:
            self.plans.append(plan)
        return StepResult(plan.step, (), self.seconds * (1 + plan.num_tokens / 100))


@pytest.fixture
def memory(tmp_path: Path) -> DiskMemory:
    return DiskMemory(tmp_path / "profiles", CONDITIONS)


def test_the_profile_times_growing_steps_and_leaves_nothing_behind() -> None:
    model = TinyModel(40)
    worker = make_worker(model, num_pages=64)
    samples = worker.profile()
    assert samples[0].features.tokens == 1
    assert max(sample.features.prefill_tokens for sample in samples) >= 64
    assert any(sample.features.draft_context for sample in samples)
    assert all(sample.seconds > 0 for sample in samples)
    asked = Request("a", (5, 6, 7), 9, Sampling(temperature=0.0))
    assert Driver(worker).generate([asked]) == Driver(make_worker(model)).generate([asked])


def test_the_features_of_every_shape_are_those_of_its_plan() -> None:
    clock = Clock()
    samples = measure_steps(clock.run, clock, 512, 4096)
    plans = {features_of(plan) for plan in clock.plans}
    assert {sample.features for sample in samples} == plans == {shape.features for shape in SHAPES}


def test_shapes_beyond_the_limits_are_left_out() -> None:
    clock = Clock()
    clock.num_pages = 8
    samples = measure_steps(clock.run, clock, 8, 64)
    assert samples
    assert all(sample.features.tokens <= 64 and sample.features.decode_seqs <= 8 for sample in samples)


def test_a_second_start_measures_a_few_shapes_and_remembers_the_rest(memory: DiskMemory) -> None:
    first, second = Clock(0.010), Clock(0.012)
    measured = measure_steps(first.run, first, 512, 4096, memory)
    again = measure_steps(second.run, second, 512, 4096, memory)
    assert again == measured
    assert shapes_of(first) == len(SHAPES)
    assert shapes_of(second) == RECHECKED
    assert stat.S_IMODE(memory.path.parent.stat().st_mode) == 0o700


def test_a_better_time_than_the_remembered_one_stays(memory: DiskMemory) -> None:
    first, second = Clock(0.012), Clock(0.010)
    measured = measure_steps(first.run, first, 512, 4096, memory)
    again = measure_steps(second.run, second, 512, 4096, memory)
    assert again[RECHECKED:] == measured[RECHECKED:]
    assert [sample.seconds for sample in again[:RECHECKED]] == pytest.approx(
        [sample.seconds / 1.2 for sample in measured[:RECHECKED]]
    )
    assert memory.load() == again


@pytest.mark.parametrize("seconds", [0.004, 0.03])
def test_a_machine_of_another_pace_is_measured_anew(memory: DiskMemory, seconds: float) -> None:
    first, second = Clock(0.01), Clock(seconds)
    measure_steps(first.run, first, 512, 4096, memory)
    samples = measure_steps(second.run, second, 512, 4096, memory)
    assert shapes_of(second) == len(SHAPES)
    assert samples[0].seconds == pytest.approx(1.01 * seconds)
    assert memory.load() == samples


def shapes_of(clock: Clock) -> int:
    return len({plan.spans for plan in clock.plans})


def test_what_cannot_be_read_is_as_if_it_were_not_there(memory: DiskMemory) -> None:
    clock = Clock()
    samples = measure_steps(clock.run, clock, 512, 4096, memory)
    good = json.loads(memory.path.read_text())
    broken: list[object] = ["", "{", "[]", "null", '{"conditions": {}}']
    for change in (
        {"seconds": -1.0},
        {"seconds": "1"},
        {"features": [1, 2]},
        {"features": [1.5] * 7},
        {"seconds": 1e999},
    ):
        broken.append(json.dumps(good | {"samples": [good["samples"][0] | change]}))
    for text in broken:
        memory.path.write_text(str(text))
        assert memory.load() == []
    assert measure_steps(clock.run, clock, 512, 4096, memory) == samples
    assert memory.load() == samples
    others = DiskMemory(memory.path.parent, CONDITIONS | {"threads": 2})
    assert others.load() == []
    memory.path.rename(others.path)
    assert others.load() == [], "a file that is not about these conditions"


def test_a_folder_that_cannot_be_written_costs_a_measurement_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock()
    memory = DiskMemory(tmp_path / "file" / "profiles", CONDITIONS)
    assert measure_steps(clock.run, clock, 512, 4096, memory)


def test_old_profiles_go_when_there_are_too_many(tmp_path: Path) -> None:
    clock = Clock()
    samples = measure_steps(clock.run, clock, 8, 64)
    memories = [DiskMemory(tmp_path, CONDITIONS | {"threads": i}) for i in range(MAX_FILES + 3)]
    for age, memory in enumerate(reversed(memories)):
        memory.save(samples)
        os.utime(memory.path, (1000 - age, 1000 - age))
    memories[0].save(samples)
    kept = [memory for memory in memories if memory.load()]
    assert len(kept) == len(list(tmp_path.iterdir())) == MAX_FILES
    assert memories[0] in kept


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "braid" / "profiles"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "braid" / "profiles"
