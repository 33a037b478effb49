"""Synthetic acceptance: a request seen before is replayed with the asked share of wrong drafts, and nothing else is."""

from __future__ import annotations

import random

import pytest

from scheduler.types import Sampling
from server.worker.drafters.synthetic import SyntheticDrafter
from server.worker.sequences import SequenceState
from tests.server.worker.drafters.wants import VOCAB, accepted, make_state, make_want, replay

NUM_PROMPT = 20


def text_of(seed: int, length: int = 4000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(NUM_PROMPT + length)]


def seen(drafter: SyntheticDrafter, text: list[int], sampling: Sampling | None = None, salt: str = "") -> SequenceState:
    """Let the drafter see a request to its end."""
    state = make_state(text, NUM_PROMPT, salt, sampling=sampling)
    drafter.release(1, state)
    return state


@pytest.mark.parametrize("acceptance", [0.5, 0.8, 1.0])
def test_as_many_drafts_are_accepted_as_asked(acceptance: float) -> None:
    drafter = SyntheticDrafter(acceptance, VOCAB, 1 << 20)
    text = text_of(1)
    state = seen(drafter, text)
    steps = replay(drafter, text, NUM_PROMPT, num_drafts=4, state=state)
    wanted = sum(acceptance**i for i in range(5))
    assert sum(steps) / len(steps) == pytest.approx(wanted, rel=0.08)


def test_survivals_are_what_the_share_says() -> None:
    drafter = SyntheticDrafter(0.5, VOCAB, 1 << 20)
    state = seen(drafter, text_of(1))
    (drafts,) = drafter.propose([make_want(text_of(1)[:NUM_PROMPT], 3, state)], 0)
    assert drafts is not None
    assert drafts.survivals == (0.5, 0.25, 0.125)


def test_a_new_request_gets_nothing() -> None:
    drafter = SyntheticDrafter(1.0, VOCAB, 1 << 20)
    text = text_of(1)
    assert drafter.propose([make_want(text[:NUM_PROMPT], state=make_state(text, NUM_PROMPT))], 0) == [None]


def test_another_seed_or_salt_is_another_request_unless_the_text_is_greedy() -> None:
    text = text_of(1)
    drafter = SyntheticDrafter(1.0, VOCAB, 1 << 20)
    seen(drafter, text, Sampling(temperature=0.7, seed=1))
    for sampling, salt, is_known in (
        (Sampling(temperature=0.7, seed=1), "", True),
        (Sampling(temperature=0.7, seed=2), "", False),
        (Sampling(temperature=0.7, seed=1, sample_index=1), "", False),
        (Sampling(temperature=0.7, seed=1), "other", False),
    ):
        state = make_state(text, NUM_PROMPT, salt, sampling=sampling)
        (drafts,) = drafter.propose([make_want(text[:NUM_PROMPT], state=state, seq_id=hash((sampling, salt)))], 0)
        assert (drafts is not None) == is_known
    seen(drafter, text, Sampling(temperature=0.0, seed=1))
    state = make_state(text, NUM_PROMPT, sampling=Sampling(temperature=0.0, seed=9))
    (drafts,) = drafter.propose([make_want(text[:NUM_PROMPT], state=state, seq_id=99)], 0)
    assert accepted(drafts, text[NUM_PROMPT:]) == 8


def test_a_text_that_goes_another_way_is_left_alone() -> None:
    drafter = SyntheticDrafter(1.0, VOCAB, 1 << 20)
    text = text_of(1)
    state = seen(drafter, text)
    other = [*text[: NUM_PROMPT + 5], (text[NUM_PROMPT + 5] + 1) % VOCAB]
    assert drafter.propose([make_want(other, state=state)], 0) == [None]
    assert drafter.propose([make_want([*other, 3], state=state)], 0) == [None]


def test_a_part_of_what_is_known_does_not_replace_it() -> None:
    drafter = SyntheticDrafter(1.0, VOCAB, 1 << 20)
    text = text_of(1)
    seen(drafter, text)
    state = seen(drafter, text[: NUM_PROMPT + 3])
    (drafts,) = drafter.propose([make_want(text[: NUM_PROMPT + 3], state=state)], 0)
    assert accepted(drafts, text[NUM_PROMPT + 3 :]) == 8


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    drafter = SyntheticDrafter(1.0, VOCAB, 8 * 1000)
    texts = [text_of(seed, 400) for seed in range(5)]
    for text in texts:
        seen(drafter, text)
        assert drafter.num_bytes <= 8 * 1000
    offers = [
        drafter.propose([make_want(text[:NUM_PROMPT], state=make_state(text, NUM_PROMPT), seq_id=10 + i)], 0)[0]
        for i, text in enumerate(texts)
    ]
    assert [offer is not None for offer in offers] == [False, False, False, True, True]


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="synthetic acceptance is 0"):
        SyntheticDrafter(0.0, VOCAB, 1)
