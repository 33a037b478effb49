"""Lookup drafters against an oracle target: what repeats is accepted, what does not is not offered."""

from __future__ import annotations

import random

import pytest

from scheduler.types import MAX_TREE_NODES, Speculation
from server.worker.drafters import lookup
from server.worker.drafters.expansion import best_first
from server.worker.drafters.lookup import LookupDrafter
from server.worker.drafters.stores.history import HistoryStore, continuations
from server.worker.drafters.stores.ngram_index import BYTES_PER_TOKEN, Spot
from server.worker.drafters.stores.prediction import PredictionStore
from tests.server.worker.drafters.wants import accepted, make_state, make_want, replay


def history() -> LookupDrafter:
    return LookupDrafter(HistoryStore())


@pytest.mark.parametrize("period", [1, 2, 3, 7, 40])
def test_a_periodic_text_is_accepted_whole(period: int) -> None:
    text = [(i % period) + 5 for i in range(6 * period + 200)]
    emitted = replay(history(), text, num_prompt=period + 8)
    assert emitted[:-1] == [9] * (len(emitted) - 1)


def test_a_random_text_is_offered_nothing() -> None:
    text = random.Random(0).sample(range(100_000), 500)
    drafter = history()
    assert [drafter.propose([make_want(text[:end])], 0) for end in range(1, 500, 7)] == [[None]] * 72


def test_what_was_said_in_the_prompt_is_copied() -> None:
    rng = random.Random(1)
    passage = [rng.randrange(900) for _ in range(60)]
    text = [*passage, 901, 902, 903, *passage]
    emitted = replay(history(), text, num_prompt=63)
    # Two tokens are needed before the passage is recognised.
    assert emitted[:2] == [1, 1]
    assert sum(emitted[2:]) / len(emitted[2:]) > 8


def test_asking_twice_is_the_same_as_asking_once() -> None:
    rng = random.Random(2)
    text = [rng.randrange(6) for _ in range(400)]
    once, twice = history(), history()
    for end in range(1, 400, 3):
        wanted = [make_want(text[:end], tree=True)]
        first = once.propose(wanted, 0)
        assert twice.propose(wanted, 0) == first
        assert twice.propose(wanted, 0) == first


def test_a_sequence_that_goes_back_is_offered_what_its_tokens_say() -> None:
    """A step that failed is run again with fewer tokens than the drafter has seen."""
    text = [1, 2, 3, 4, 5, 6, 7, 8] * 4
    drafter = history()
    drafter.propose([make_want(text)], 0)
    (drafts,) = drafter.propose([make_want(text[:20])], 0)
    assert accepted(drafts, text[20:]) == 8


@pytest.mark.parametrize("end", [None, 0])
def test_a_chain_taken_as_a_slice_is_the_chain_walked_token_by_token(end: int | None) -> None:
    rng, num_sliced = random.Random(4), 0
    for _ in range(400):
        text = [rng.randrange(rng.choice((2, 3, 6))) for _ in range(rng.randrange(4, 80))] * rng.randrange(1, 4)
        if end is not None:
            text.append(end)
        origins = sorted({rng.randrange(2, len(text)) for _ in range(rng.randrange(1, 4))}, reverse=True)
        spots = [Spot(at, rng.randrange(2, 33)) for at in origins if text[at] != end]
        if not spots:
            continue
        spots.sort(key=lambda spot: -spot.match)
        walk = continuations(text, spots, end)
        most, floor = rng.randrange(1, 20), rng.choice((0.0, 0.04, 0.3))
        assert walk.line is not None
        num_sliced += walk.line(most, floor) is not None
        sliced = best_first(walk, most, 1, floor, "x")
        assert sliced == best_first(walk._replace(line=None), most, 1, floor, "x")
    assert num_sliced > 100


def test_survivals_never_rise_and_parents_come_first() -> None:
    rng = random.Random(3)
    branching = 0
    for trial in range(200):
        text = [rng.randrange(rng.choice((2, 4, 8))) for _ in range(rng.randrange(2, 300))]
        (drafts,) = history().propose([make_want(text, rng.randrange(1, 70), tree=trial % 2 == 0)], 0)
        if drafts is None:
            continue
        assert len(drafts.tokens) == len(drafts.survivals) < MAX_TREE_NODES + 8
        assert all(1.0 >= a >= b > 0.0 for a, b in zip(drafts.survivals, drafts.survivals[1:], strict=False))
        if drafts.parents:
            assert len(drafts.tokens) < MAX_TREE_NODES
            assert all(-1 <= parent < node for node, parent in enumerate(drafts.parents))
            assert len(set(zip(drafts.parents, drafts.tokens, strict=True))) == len(drafts.tokens)
            branching += len(set(drafts.parents)) < len(drafts.parents)
    assert branching > 20


def test_a_tree_holds_both_of_two_continuations() -> None:
    start = [50, 51, 52, 53]
    text = [*start, 1, 2, 3, *start, 7, 8, 9, *start]
    (tree,) = history().propose([make_want(text, 16, tree=True)], 0)
    assert accepted(tree, [1, 2, 3]) == accepted(tree, [7, 8, 9]) == 3
    (chain,) = history().propose([make_want(text, 16)], 0)
    assert chain is not None
    assert accepted(chain, [7, 8, 9]) == 3
    assert not chain.parents


def test_occurrences_that_agree_are_trusted_more() -> None:
    start = [50, 51, 52, 53]
    agree = [*start, 1, 2, *start, 1, 2, *start]
    differ = [*start, 1, 2, *start, 7, 2, *start]
    survivals = []
    for text in (agree, differ):
        (drafts,) = history().propose([make_want(text, 1)], 0)
        assert drafts is not None
        survivals.append(drafts.survivals[0])
    assert survivals[0] > 1.5 * survivals[1]


def test_a_long_prompt_is_taken_in_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "LEARN_MOST", 100)
    text = [*range(300), *range(250)]
    drafter = history()
    offers = [drafter.propose([make_want(text)], 0)[0] for _ in range(8)]
    assert offers[:2] == [None, None]
    assert offers[2] is not None, "300 tokens are known, and the end of the text repeats some of them"
    assert offers[2:] == [offers[2]] * 6
    assert drafter.num_bytes == 549 * BYTES_PER_TOKEN


def test_the_indexes_of_all_sequences_are_bounded_together() -> None:
    store = HistoryStore(max_bytes=100 * BYTES_PER_TOKEN)
    drafter, wants = LookupDrafter(store), [make_want([i, 5, 6, 7] * 20, seq_id=i) for i in range(3)]
    drafter.propose(wants, 0)
    assert store.num_bytes == 100 * BYTES_PER_TOKEN
    assert drafter.propose([wants[2]], 0) == [None]
    drafter.release(0, wants[0].state)
    (drafts,) = drafter.propose([wants[2]], 0)
    assert drafts is not None
    for want in wants:
        drafter.release(want.seq_id, want.state)
    assert store.num_bytes == 0


def test_a_released_sequence_leaves_nothing_behind() -> None:
    drafter = history()
    want = make_want([1, 2, 3] * 10)
    drafter.propose([want], 0)
    assert drafter.num_bytes > 0
    drafter.release(1, want.state)
    drafter.release(1, want.state)
    assert drafter.num_bytes == 0


class TestPrediction:
    def replayed(self, prediction: list[int], truth: list[int]) -> list[int]:
        speculation = Speculation(prediction=tuple(prediction))
        text = [999, *truth]
        return replay(LookupDrafter(PredictionStore()), text, 1, 8, make_state(text, 1, speculation=speculation))

    def test_a_prediction_that_comes_true_is_accepted_from_the_first_token(self) -> None:
        text = random.Random(4).sample(range(900), 90)
        assert self.replayed(text, text) == [9] * 10

    @pytest.mark.parametrize("change", ["replace", "insert", "delete"])
    def test_it_is_taken_up_again_after_a_departure(self, change: str) -> None:
        prediction = random.Random(5).sample(range(900), 180)
        truth = list(prediction)
        for at in (150, 100, 50):
            if change == "replace":
                truth[at] = 950
            elif change == "insert":
                truth[at:at] = [950, 951]
            else:
                del truth[at : at + 3]
        emitted = self.replayed(prediction, truth)
        assert len(emitted) <= len(truth) / 9 + 3 * 5

    def test_without_a_prediction_nothing_is_offered(self) -> None:
        assert LookupDrafter(PredictionStore()).propose([make_want([1, 2, 3])], 0) == [None]

    def test_a_prediction_that_is_wrong_is_soon_left_alone(self) -> None:
        speculation = Speculation(prediction=tuple(range(100, 200)))
        text = [1, *range(500, 520)]
        state = make_state(text, 1, speculation=speculation)
        drafter = LookupDrafter(PredictionStore())
        offers = [drafter.propose([make_want(text[:end], 8, state)], 0)[0] for end in range(1, 21)]
        assert offers[0] is not None
        assert offers[6:] == [None] * 14

    def test_it_stops_at_the_end_of_the_prediction(self) -> None:
        speculation = Speculation(prediction=(5, 6, 7))
        state = make_state([1], 1, speculation=speculation)
        (drafts,) = LookupDrafter(PredictionStore()).propose([make_want([1], 8, state)], 0)
        assert drafts is not None
        assert drafts.tokens == (5, 6, 7)
