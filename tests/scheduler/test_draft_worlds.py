"""Random worlds with drafts: every text is what it is without them, and broken schedulers are caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler.decoding import autoregressive
from scheduler.decoding.autoregressive import Autoregressive
from scheduler.decoding.base import News
from scheduler.draft_plan import DraftPlan
from scheduler.types import Drafts, Outcome, Span
from tests.scheduler.draft_worlds import draft_world, play_drafts
from tests.scheduler.worlds import World

NUM_WORLDS = 240


@pytest.mark.parametrize("part", range(6))
def test_every_text_of_a_random_world_is_what_it_is_without_drafts(part: int) -> None:
    num_accepted = num_rejected = num_trees = num_preempted = 0
    for seed in range(part, NUM_WORLDS, 6):
        world = draft_world(seed)
        try:
            play_drafts(world, seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        accepted = sum(stats.accepted_tokens for stats in world.stats)
        num_accepted += accepted
        num_rejected += sum(stats.draft_tokens for stats in world.stats) - accepted
        num_trees += sum(bool(span.parents) for plan in world.plans for span in plan.spans)
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        _check_usage(world)
    # Worlds in which nothing happens would prove nothing.
    assert num_accepted > 100
    assert num_rejected > 100
    assert num_trees > 2
    assert num_preempted > 2


def _check_usage(world: World) -> None:
    """What the clients were told adds up to what the steps did, unless a request was aborted untold."""
    usages = [delta.speculation for story in world.stories.values() for delta in story.deltas if delta.speculation]
    drafted = sum(stats.draft_tokens for stats in world.stats)
    accepted = sum(stats.accepted_tokens for stats in world.stats)
    assert sum(usage.accepted for usage in usages) <= accepted
    if not any(story.is_aborted for story in world.stories.values()):
        assert sum(usage.drafted for usage in usages) == drafted
        assert sum(usage.accepted for usage in usages) == accepted
        assert sum(usage.steps for usage in usages) == sum(stats.drafted_seqs for stats in world.stats)


def _find_a_failing_world(patience: int = 60) -> str | None:
    for seed in range(patience):
        try:
            play_drafts(draft_world(seed), seed)
        except (AssertionError, RuntimeError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
    return None


_original_absorb = Autoregressive._absorb_verified
_original_place = DraftPlan.place_drafts


def _commit_the_rejected(machine: Autoregressive, span: Span, outcome: Outcome) -> News:
    news = _original_absorb(machine, span, outcome)
    machine._seq.num_committed = min(span.kv_len, len(machine._seq.tokens))
    return news


def _take_no_correction(machine: Autoregressive, span: Span, outcome: Outcome) -> News:
    if len(outcome.tokens) > 1:
        outcome = Outcome(outcome.seq_id, outcome.tokens[:-1], outcome.logprobs[:-1])
    return _original_absorb(machine, span, outcome)


def _one_draft_too_many(draft: DraftPlan, index: int, num_drafts: int, num_asked: int) -> None:
    _original_place(draft, index, num_drafts + 1, num_asked)


def _forget_the_root(drafts: Drafts, num_drafts: int) -> tuple[int, ...]:
    return (-1, *drafts.parents[:num_drafts]) if drafts.parents else ()


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (Autoregressive, "_absorb_verified", _commit_the_rejected),
        (Autoregressive, "_absorb_verified", _take_no_correction),
        (DraftPlan, "place_drafts", _one_draft_too_many),
        (autoregressive, "span_parents", _forget_the_root),
        (Autoregressive, "most_drafts", property(lambda machine: 99)),
    ],
)
def test_a_broken_scheduler_is_caught_by_the_worlds(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert _find_a_failing_world() is not None


def test_the_worlds_pass_when_nothing_is_broken() -> None:
    assert _find_a_failing_world(10) is None
