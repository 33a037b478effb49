"""Steps planned before the tokens of the step in flight are known: no text changes, no page is freed too early."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from scheduler import foresight
from scheduler.decoding.autoregressive import Autoregressive
from scheduler.decoding.base import After
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from scheduler.types import (
    UNKNOWN,
    FinishReason,
    Grammar,
    GrammarKind,
    Outcome,
    Sampling,
    Span,
    SpeculationSettings,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from tests.scheduler.diffusion_worlds import diffusion_world, play_diffusion
from tests.scheduler.draft_worlds import draft_world, flat_cost, play_drafts
from tests.scheduler.worlds import World, make_limits, make_request, play, random_limits

NUM_WORLDS = 240


def ahead(world: World, seed: int, share: float = 0.9) -> World:
    """The world, planning most steps ahead."""
    rng = random.Random(f"ahead {seed}")
    world.plans_ahead = lambda: rng.random() < share
    return world


def plain_world(seed: int) -> World:
    return World(random_limits(random.Random(seed)))


def check_ends(world: World) -> None:
    """The worlds allow for requests that fail; here none may."""
    ends = [story.deltas[-1].finish_reason for story in world.stories.values() if story.deltas]
    assert FinishReason.ERROR not in ends, "a request failed"


@pytest.mark.parametrize("part", range(6))
def test_every_text_of_a_world_that_plans_ahead_is_what_it_is_alone(part: int) -> None:
    """Prompts in chunks, arrivals, aborts, preemption, stop ids, prefix hits, prompt logprobs."""
    num_ahead = num_surplus = num_preempted = num_hits = num_mixed = 0
    for seed in range(part, NUM_WORLDS, 6):
        world = ahead(plain_world(seed), seed)
        try:
            play(world, seed)
            check_ends(world)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        plans = [plan for plan in world.plans if plan.after is not None]
        num_ahead += len(plans)
        num_mixed += sum(bool(plan.admitted) for plan in plans)
        num_surplus += sum(stats.num_surplus for stats in world.stats)
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        num_hits += sum(stats.prefix_hits for stats in world.stats if stats.is_ahead)
        assert [stats.is_ahead for stats in world.stats] == [plan.after is not None for plan in world.plans]
    # Worlds in which nothing happens would prove nothing.
    assert num_ahead > 200
    assert num_surplus > 20
    assert num_preempted > 20
    assert num_hits > 10
    assert num_mixed > 10


@pytest.mark.parametrize(
    ("make", "run"), [(draft_world, play_drafts), (diffusion_world, play_diffusion)], ids=["drafts", "diffusion"]
)
def test_worlds_with_drafts_and_blocks_fall_back_step_by_step(
    make: Callable[[int], World], run: Callable[[World, int], None]
) -> None:
    num_ahead = num_drafts = num_denoise = 0
    for seed in range(80):
        world = ahead(make(seed), seed)
        try:
            run(world, seed)
            check_ends(world)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_ahead += sum(stats.is_ahead for stats in world.stats)
        num_drafts += sum(stats.draft_tokens for stats in world.stats)
        num_denoise += sum(stats.denoise_tokens for stats in world.stats)
        assert not any(stats.is_ahead and stats.draft_tokens for stats in world.stats)
    assert num_ahead > 40
    assert num_drafts > 100
    assert run is play_drafts or num_denoise > 100


def _find_a_failing_world(patience: int = 60) -> str | None:
    for seed in range(patience):
        try:
            world = ahead(plain_world(seed), seed, 1.0)
            play(world, seed)
            check_ends(world)
        except (AssertionError, RuntimeError, ValueError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
    return None


_foresee = Autoregressive.foresee


def _goes_on_for_ever(machine: Autoregressive, span: Span) -> After:
    after = _foresee(machine, span)
    return After.TOKEN if after is After.END else after


def _forgets_the_token(machine: Autoregressive, span: Span) -> After:
    after = _foresee(machine, span)
    return After.PROMPT if after is After.TOKEN else after


def _leaves_it_there(in_step: list[tuple[Sequence, Span, After]]) -> None:
    """Sequences are not put back."""


def _preempts(scheduler: Scheduler, now: float) -> StepPlan | None:
    """Without a look at the pages that are missing."""
    scheduler._decodes.num_missing = lambda running: 0  # type: ignore[method-assign]
    return _ahead(scheduler, now)


_ahead = Scheduler.schedule_ahead


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (Autoregressive, "foresee", _goes_on_for_ever),
        (Autoregressive, "foresee", _forgets_the_token),
        (foresight, "_put_back", _leaves_it_there),
        (Scheduler, "schedule_ahead", _preempts),
    ],
)
def test_a_broken_scheduler_is_caught_by_the_worlds(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: Callable[..., object]
) -> None:
    assert _find_a_failing_world(6) is None
    monkeypatch.setattr(owner, name, broken)
    assert _find_a_failing_world() is not None


def one_decode(scheduler: Scheduler, *names: str, **others: object) -> StepPlan:
    """Requests past their prompts, and the step in flight that decodes them."""
    for name in names:
        assert scheduler.add(make_request(name, 5, max_tokens=9, **others), 0.0) is None
    plan = scheduler.schedule(0.0)
    assert plan is not None
    answer(scheduler, plan)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def answer(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> None:
    entry = TokenLogprob(token, 0.0, 1)
    outcomes = tuple(
        Outcome(span.seq_id, (token,), (entry,)) if span.judged else Outcome(span.seq_id) for span in plan.spans
    )
    scheduler.update(plan, StepResult(plan.step, outcomes, 0.01), 0.0)


def test_an_ahead_step_is_of_unknown_tokens_and_of_prompts_that_are_here() -> None:
    scheduler = Scheduler(make_limits())
    plan = one_decode(scheduler, "a", "b")
    assert scheduler.add(make_request("late", tuple(range(30, 60))), 0.0) is None
    after = scheduler.schedule_ahead(0.0)
    assert after is not None
    assert (after.after, after.step) == (plan.step, plan.step + 1)
    assert [span.tokens for span in after.spans[:2]] == [(UNKNOWN,), (UNKNOWN,)]
    assert [span.start for span in after.spans[:2]] == [span.kv_len for span in plan.spans]
    assert after.spans[2].tokens == tuple(range(30, 60))
    assert scheduler.schedule_ahead(0.0) is None, "two steps are in flight at most"
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.schedule(0.0)
    with pytest.raises(ValueError, match="is due"):
        answer(scheduler, after)


def test_pages_of_who_ended_by_surprise_stay_until_the_surplus_row_is_over() -> None:
    scheduler = Scheduler(make_limits(enable_prefix_caching=False))
    plan = one_decode(scheduler, "a", "b", stop_ids=(9,))
    after = scheduler.schedule_ahead(0.0)
    assert after is not None
    pages = scheduler.stats().pages_used
    answer(scheduler, plan, token=9)
    assert (scheduler.stats().num_running, scheduler.stats().pages_used) == (0, pages)
    assert scheduler.has_work
    outcomes = tuple(Outcome(span.seq_id, (3,)) for span in after.spans)
    deltas, stats = scheduler.update(after, StepResult(after.step, outcomes, 0.01), 0.0)
    assert not deltas
    assert (stats.num_surplus, stats.pages_used, stats.is_ahead) == (2, 0, True)
    assert not scheduler.has_work


def test_who_ends_by_length_leaves_no_surplus_row() -> None:
    scheduler = Scheduler(make_limits())
    plan = one_decode(scheduler, "a")
    scheduler.add(make_request("b", 5, max_tokens=20), 0.0)
    for _ in range(6):
        answer(scheduler, plan)
        plan = scheduler.schedule(0.0)  # type: ignore[assignment]
    after = scheduler.schedule_ahead(0.0)
    assert after is not None
    assert len(plan.spans) == 2
    answer(scheduler, plan)
    answer(scheduler, after)
    plan = scheduler.schedule(0.0)  # type: ignore[assignment]
    after = scheduler.schedule_ahead(0.0)
    assert after is not None
    assert (len(plan.spans), len(after.spans)) == (1, 1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(grammar=Grammar(GrammarKind.REGEX, "a")),
        Sampling(repetition_penalty=1.1),
        Sampling(presence_penalty=0.1),
        Sampling(frequency_penalty=0.1),
        Sampling(bad_words=((1,),)),
    ],
)
def test_who_needs_its_tokens_on_the_host_keeps_the_next_step_waiting(sampling: Sampling) -> None:
    scheduler = Scheduler(make_limits())
    one_decode(scheduler, "a", sampling=sampling)
    assert scheduler.schedule_ahead(0.0) is None


def test_a_step_that_asks_for_drafts_is_not_followed_ahead() -> None:
    settings = SpeculationSettings(policy="fixed", max_drafts=2)
    scheduler = Scheduler(make_limits(), flat_cost(), speculation=settings)
    plan = one_decode(scheduler, "a")
    assert plan.spans[0].num_drafts
    assert scheduler.schedule_ahead(0.0) is None


def test_nothing_is_planned_ahead_of_nothing() -> None:
    scheduler = Scheduler(make_limits())
    assert scheduler.schedule_ahead(0.0) is None
    scheduler.add(make_request("a", 5, max_tokens=1), 0.0)
    assert scheduler.schedule_ahead(0.0) is None, "there is no step to plan behind"
    assert scheduler.schedule(0.0) is not None
    assert scheduler.schedule_ahead(0.0) is None, "the step in flight is the last one of all who are here"
