"""Sparse rows that are corrected: random worlds in which every text is what it is alone, and the plan of a lone one.

The fake worker's sparse rows leave a mark on all keys behind them, so a correction that comes late, early or not at
all, a draft beyond it, and a page that is shared uncorrected change a text.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler.decoding.autoregressive import Autoregressive
from scheduler.fake_worker import run_alone
from scheduler.kv_memory import KVMemory
from scheduler.scheduler import Scheduler
from scheduler.types import Attention, AttentionMethod, AttentionOffer, Limits, Read, Request, SpeculationSettings
from tests.scheduler.draft_worlds import RandomDrafter, flat_cost, random_settings, random_speculation
from tests.scheduler.worlds import World, make_limits, make_request, play, random_limits

NUM_WORLDS = 240
OFFERS = (AttentionOffer(AttentionMethod.QUEST, 1), AttentionOffer(AttentionMethod.TIDAL, 1))


def sparse(every: int = 0, lossless: bool = False) -> Attention:
    return Attention(AttentionMethod.QUEST, 4, lossless, every)


def sparse_world(seed: int) -> World:
    """With drafts or without, as the dice say."""
    rng = random.Random(f"corrections {seed}")
    limits = random_limits(random.Random(seed))
    settings = random_settings(rng) if rng.random() < 0.6 else None
    scheduler = Scheduler(limits, flat_cost(), bytes(32), settings, attention=OFFERS)
    return World(limits, scheduler, drafter=RandomDrafter(rng, branches=False))


def play_sparse(world: World, seed: int) -> None:
    rng = random.Random(f"methods {seed}")

    def decorate(request: Request) -> Request:
        asked = random_speculation(rng, request)
        every = rng.choice((0, 1, 2, 3, 5, 8, 16))
        attention = rng.choice((None, sparse(every), sparse(every), sparse(lossless=True)))
        if attention is not None and not attention.lossless:
            asked = replace(asked, speculation=replace(asked.speculation, tree=None))
        # What it has put out already came of another way to read keys.
        text, _, _ = run_alone(replace(asked, output=(), attention=attention), world.limits.max_model_len, 23)
        return replace(asked, attention=attention, output=text[: len(asked.output)])

    play(world, seed, decorate)


@pytest.mark.parametrize("part", range(6))
def test_every_corrected_text_of_a_random_world_is_what_it_is_alone(part: int) -> None:
    num_corrected = num_preempted = num_hits = num_accepted = 0
    for seed in range(part, NUM_WORLDS, 6):
        world = sparse_world(seed)
        try:
            play_sparse(world, seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_corrected += sum(stats.corrected_tokens for stats in world.stats)
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        num_hits += sum(stats.prefix_hits for stats in world.stats)
        num_accepted += sum(stats.accepted_tokens for stats in world.stats)
    # Worlds in which nothing happens would prove nothing.
    assert num_corrected > 300
    assert num_preempted > 2
    assert num_hits > 50
    assert num_accepted > 50


def test_every_corrected_text_of_a_world_that_plans_ahead_is_what_it_is_alone() -> None:
    """Beside steps that are planned before the last token is known: one that begins or ends a correction waits."""
    num_corrected = num_ahead = 0
    for seed in range(NUM_WORLDS // 2):
        world, rng = sparse_world(seed), random.Random(f"ahead {seed}")
        world.plans_ahead = lambda rng=rng: rng.random() < 0.9  # type: ignore[misc]
        try:
            play_sparse(world, seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_corrected += sum(stats.corrected_tokens for stats in world.stats)
        num_ahead += sum(stats.is_ahead for stats in world.stats)
    assert num_corrected > 300
    assert num_ahead > 100


def lone(limits: Limits, *requests: Request) -> World:
    scheduler = Scheduler(limits, root=bytes(32), attention=OFFERS)
    world = World(limits, scheduler)
    for request in requests:
        world.add(request)
    return world


def test_the_rows_between_two_multiples_are_computed_again_before_the_row_behind_them() -> None:
    world = lone(make_limits(), make_request("r", 6, 10, attention=sparse(4)))
    world.finish()
    spans = [plan.spans[0] for plan in world.plans]
    shape = [(span.start, span.kv_len, span.dense_end) for span in spans if len(span.tokens) > 1]
    # The prompt's last token gives the first output token, whose row is position 6. The tenth has none.
    assert shape == [(0, 6, 6), (6, 10, 10), (10, 14, 14)]
    assert [span.start for span in spans if len(span.tokens) == 1] == [*range(6, 10), *range(10, 14), 14]
    assert sum(stats.corrected_tokens for stats in world.stats) == 8
    assert [span.read for span in spans if len(span.tokens) > 1] == [Read.SAMPLE, Read.NOTHING, Read.NOTHING]


def test_a_correction_is_cut_into_chunks_beside_decodes_that_never_wait() -> None:
    limits = make_limits(max_batched_tokens=6, max_seqs=4)
    dense = [make_request(f"d{i}", (i, 2, 3), 120) for i in range(3)]
    world = lone(limits, *dense, make_request("r", 3, 60, attention=sparse(16)))
    world.finish()
    corrected = [stats.corrected_tokens for stats in world.stats if stats.corrected_tokens]
    assert sum(corrected) == 48
    assert max(corrected) == 3


def test_a_text_that_ends_at_a_multiple_is_not_corrected() -> None:
    world = lone(make_limits(), make_request("r", 6, 9, attention=sparse(8)))
    world.finish()
    assert not any(stats.corrected_tokens for stats in world.stats)
    # Behind its ninth token nothing comes that reads the keys: the pages stay its own.
    assert world.scheduler.stats().pages_cached == 6 // 4


def test_corrected_pages_are_shared_with_dense_requests_and_no_others_are() -> None:
    limits = make_limits()
    world = lone(limits, make_request("r", 6, 17, attention=sparse(5)))
    world.finish()
    text = (*world.stories["r"].request.prompt, *world.stories["r"].tokens)
    # Corrected up to 6 + 3 x 5 = 21: five pages of 4.
    world.add(make_request("dense", text, 4))
    world.add(make_request("sparse", text, 4, attention=sparse(5)))
    world.finish()
    assert {story.deltas[0].cached_tokens for name, story in world.stories.items() if name != "r"} == {20}


def test_an_uncorrected_text_shares_its_prompt_alone() -> None:
    world = lone(make_limits(), make_request("r", 6, 16, attention=sparse()))
    world.finish()
    text = (*world.stories["r"].request.prompt, *world.stories["r"].tokens)
    world.add(make_request("dense", text, 4))
    world.finish()
    assert world.stories["dense"].deltas[0].cached_tokens == 4


def test_drafts_end_in_front_of_a_correction() -> None:
    limits = make_limits()
    settings = SpeculationSettings(policy="fixed", max_drafts=8)
    rng = random.Random(1)
    drafter = RandomDrafter(rng, branches=False)
    drafter._rightness = 1.0
    world = World(limits, Scheduler(limits, flat_cost(), bytes(32), settings, attention=OFFERS), drafter=drafter)
    world.add(make_request("r", 6, 60, attention=sparse(7)))
    world.finish()
    verified = [span for plan in world.plans for span in plan.spans if span.read is Read.VERIFY]
    assert any(len(span.tokens) > 3 for span in verified)
    for span in verified:
        assert (span.start - 6) // 7 == (span.kv_len - 1 - 6) // 7
    assert sum(stats.corrected_tokens for stats in world.stats) == 56


def _find_a_failing_world(patience: int = 60) -> str | None:
    for seed in range(patience):
        try:
            play_sparse(sparse_world(seed), seed)
        except (AssertionError, RuntimeError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
    return None


def _share_all(memory: KVMemory, seq: object, num_tokens: int) -> int:
    return num_tokens // memory.page_size


def _never(machine: Autoregressive) -> None:
    """No correction, though the plan's other parts expect it."""


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (KVMemory, "num_shareable", _share_all),
        (Autoregressive, "_correct_if_due", _never),
        (Autoregressive, "most_drafts", property(lambda self: self._max_total - len(self._seq.tokens) - 1)),
    ],
)
def test_the_worlds_notice_a_broken_scheduler(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: object
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert _find_a_failing_world() is not None
