"""Random worlds under the rules, and the negative controls: broken schedulers that the worlds must catch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from scheduler import sequence
from scheduler.decodes import Decodes
from scheduler.decoding.autoregressive import Autoregressive
from scheduler.draft_plan import DraftPlan
from scheduler.kv_memory import KVMemory
from scheduler.pages import PagePool
from scheduler.prefix import PrefixIndex
from scheduler.queues import Queues
from tests.scheduler.worlds import World, play, random_limits

NUM_WORLDS = 400


@pytest.mark.parametrize("part", range(8))
def test_every_request_of_a_random_world_reads_as_if_it_had_run_alone(part: int) -> None:
    num_preempted = num_hits = num_recomputed = 0
    for seed in range(part, NUM_WORLDS, 8):
        limits = random_limits(random.Random(seed))
        world = World(limits)
        try:
            play(world, seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        num_hits += sum(stats.prefix_hits for stats in world.stats)
        num_recomputed += sum(stats.recomputed_tokens for stats in world.stats)
    # Worlds in which nothing happens would prove nothing.
    assert num_preempted > 20
    assert num_hits > 100
    assert num_recomputed > 100


def _find_a_failing_world(patience: int = 150) -> str | None:
    for seed in range(patience):
        try:
            play(World(random_limits(random.Random(seed))), seed)
        except (AssertionError, RuntimeError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
    return None


_original_name = PrefixIndex.name
_original_publish = KVMemory.publish
_original_drop = KVMemory.drop
_original_share = PagePool.share
_original_end = Queues.end
_original_append = Autoregressive._append


def _parent_blind(index: PrefixIndex, parent: bytes, tokens: Sequence[int]) -> bytes:
    return _original_name(index, bytes(32), tokens)


def _publish_early(memory: KVMemory, seq: sequence.Sequence) -> None:
    seq.num_committed += memory.page_size - 1
    _original_publish(memory, seq)
    seq.num_committed -= memory.page_size - 1


def _leak_the_last_page(memory: KVMemory, seq: sequence.Sequence) -> None:
    seq.pages = seq.pages[:-1]
    _original_drop(memory, seq)


def _free_twice(memory: KVMemory, seq: sequence.Sequence) -> None:
    memory.pool.release(seq.pages)
    _original_drop(memory, seq)


def _share_without_counting(pool: PagePool, pages: list[int]) -> None:
    for page in pages:
        if pool.num_owners(page) == 0:
            _original_share(pool, [page])


def _free_in_flight(queues: Queues, seq: sequence.Sequence, last_step: int) -> None:
    _original_end(queues, seq, last_step)
    queues.bury(last_step)


def _keep_after_preemption(memory: KVMemory, seq: sequence.Sequence) -> None:
    committed = seq.num_committed
    _original_drop(memory, seq)
    seq.num_committed = committed if seq.status is sequence.Status.RUNNING else 0


def _commit_one_too_many(machine: Autoregressive, token: int) -> None:
    _original_append(machine, token)
    machine._seq.num_committed = len(machine._seq.tokens)


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (PrefixIndex, "name", _parent_blind),
        (KVMemory, "publish", _publish_early),
        (KVMemory, "drop", _leak_the_last_page),
        (KVMemory, "drop", _free_twice),
        (KVMemory, "drop", _keep_after_preemption),
        (PagePool, "share", _share_without_counting),
        (Queues, "end", _free_in_flight),
        (Autoregressive, "_append", _commit_one_too_many),
    ],
)
def test_a_broken_scheduler_is_caught_by_the_worlds(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert _find_a_failing_world() is not None


def test_a_scheduler_that_refuses_decodes_is_caught_by_the_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Decodes.place

    def forgetful(
        self: Decodes, draft: DraftPlan, running: list[sequence.Sequence], now: float
    ) -> list[sequence.Sequence]:
        prefills = original(self, draft, running, now)
        if prefills and draft.spans:
            draft.spans.pop()
            draft.owners.pop()
            draft.num_decodes -= 1
        return prefills

    monkeypatch.setattr(Decodes, "place", forgetful)
    failure = _find_a_failing_world()
    assert failure is not None
    assert "R1" in failure


def test_the_worlds_pass_when_nothing_is_broken() -> None:
    assert _find_a_failing_world(20) is None
