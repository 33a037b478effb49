"""Every order of events for three requests in a pool of four pages: add, abort, plan, abort in flight, result.

States that look the same from outside the clock are visited once, so this ends; the random worlds cover large scopes.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.types import Limits, Request, Sampling
from tests.scheduler.worlds import World

LIMITS = Limits(4, 2, 8, 4, 2, watermark_pages=0, max_prefill_share=0.5)
REQUESTS = (
    Request("a", (1, 2, 3, 4), 3, Sampling(seed=1)),
    Request("b", (1, 2, 3, 4), 2, Sampling(seed=2)),
    Request("c", (1, 2, 5), 4, Sampling(seed=1), priority=-1),
)
MAX_EVENTS = 6


@dataclass(frozen=True)
class Event:
    """What happens, and to whom; an abort that happens in flight is part of its step."""

    kind: str
    target: str = ""


def events_after(path: tuple[Event, ...]) -> list[Event]:
    added = {event.target for event in path if event.kind == "add"}
    aborted = {event.target for event in path if event.kind.startswith("abort")}
    alive = added - aborted
    return [
        *(Event("add", request.id) for request in REQUESTS if request.id not in added),
        Event("step"),
        *(Event("abort", request_id) for request_id in sorted(alive)),
        *(Event("abort in flight", request_id) for request_id in sorted(alive)),
    ]


def replay(path: tuple[Event, ...]) -> World:
    world = World(LIMITS)
    for event in path:
        if event.kind == "add":
            world.add(next(request for request in REQUESTS if request.id == event.target))
        elif event.kind == "abort":
            abort(world, event.target)
        elif event.kind == "step":
            world.step()
        else:
            world.step(between=lambda target=event.target: abort(world, target))  # type: ignore[misc]
        world.scheduler.check_invariants()
    return world


def abort(world: World, request_id: str) -> None:
    if world.stories[request_id].is_alive:
        world.abort(request_id)
    else:
        world.scheduler.abort(request_id)


def fingerprint(world: World) -> tuple[object, ...]:
    """What the future depends on: who is where, with which tokens and pages. Times and counters of ids are left out."""
    queues = world.scheduler._queues
    pool = world.scheduler._memory.pool
    rows = tuple(
        (seq.request.id, tuple(seq.tokens), seq.num_committed, tuple(seq.pages), seq.status, seq.num_entered)
        for seq in (*queues.running, *queues.waiting)
    )
    idle = tuple(pool._idle)
    stories = tuple((name, story.is_alive) for name, story in sorted(world.stories.items()))
    return rows, idle, tuple(pool._free), stories


def test_every_order_of_events_keeps_the_rules_and_ends_with_the_right_texts() -> None:
    seen: set[tuple[object, ...]] = set()
    frontier: list[tuple[Event, ...]] = [()]
    num_ended = num_preempted = 0
    for _ in range(MAX_EVENTS):
        paths = [(*path, event) for path in frontier for event in events_after(path)]
        frontier = []
        for path in paths:
            world = replay(path)
            state = fingerprint(world)
            if state in seen:
                continue
            seen.add(state)
            frontier.append(path)
            world.finish()
            num_ended += 1
            num_preempted += sum(stats.num_preempted for stats in world.stats)
    assert num_ended > 200
    assert num_preempted > 0
