"""Which drafter is believed: by what its offers came to, per request, taken or not."""

from __future__ import annotations

import pytest

from scheduler.types import Drafts
from server.worker.drafters.track_record import TrackRecord, num_right
from tests.server.worker.drafters.wants import make_want

LOUD = Drafts((9, 9, 9), (0.9, 0.9, 0.9), "loud")
QUIET = Drafts((1, 2, 3), (0.5, 0.4, 0.3), "quiet")


def tell(record: TrackRecord, seq_id: int, times: int, length: int = 10) -> None:
    """Both drafters offer, and the tokens 1, 2, 3 follow each time."""
    for _ in range(times):
        for offer in (LOUD, QUIET):
            record.remember(seq_id, length, offer)
        length += 3
        record.settle(seq_id, [*range(length - 3), 1, 2, 3])


def test_claims_are_believed_until_something_is_known() -> None:
    assert TrackRecord().trust(1, "anyone") == 1.0


def test_a_drafter_that_was_never_taken_wins_by_being_right() -> None:
    record = TrackRecord()
    tell(record, 1, 30)
    assert record.trust(1, "loud") < 0.2
    assert record.trust(1, "quiet") > 2.0
    assert 0.1 < record.trust(2, "loud") < 0.5 < 1.5 < record.trust(2, "quiet")


def test_one_request_does_not_speak_for_another() -> None:
    record = TrackRecord()
    tell(record, 1, 3)
    assert record.trust(1, "loud") < record.trust(2, "loud") / 1.5


def test_an_offer_is_judged_once_and_only_by_tokens_that_came_after_it() -> None:
    record = TrackRecord()
    record.remember(1, 4, QUIET)
    record.settle(1, [5, 5, 5, 5])
    assert record.trust(1, "quiet") == 1.0, "nothing is known yet: the step is run again"
    record.settle(1, [5, 5, 5, 5, 1])
    once = record.trust(1, "quiet")
    assert once > 1.0
    record.settle(1, [5, 5, 5, 5, 1, 2])
    assert record.trust(1, "quiet") == once


def test_a_released_sequence_is_forgotten_but_its_lesson_stays() -> None:
    record = TrackRecord()
    tell(record, 1, 30)
    record.release(1)
    assert record.trust(1, "loud") == record.trust(2, "loud") < 1.0


@pytest.mark.parametrize(
    ("new", "right", "claimed"),
    [([1], 1, 0.9 + 0.5), ([1, 4], 2, 0.9 + 0.5 + 0.4 + 0.2), ([2, 4], 1, 2.0), ([7], 0, 1.4), ([1, 3, 5], 3, 2.1)],
)
def test_in_a_tree_the_path_that_came_true_counts(new: list[int], right: int, claimed: float) -> None:
    tree = Drafts((1, 2, 3, 4, 5), (0.9, 0.5, 0.4, 0.2, 0.1), "tree", (-1, -1, 0, 0, 2))
    assert num_right(tree, new)[0] == right
    assert num_right(tree, new)[1] == pytest.approx(claimed)


def test_the_composite_turns_to_the_drafter_that_is_right() -> None:
    from tests.server.worker.drafters.test_speculator import Member, speculator

    composite = speculator(Member("loud", lambda want: LOUD), Member("quiet", lambda want: QUIET))
    tokens, sources = [5, 5, 5], []
    for _ in range(20):
        (best,) = composite.propose([make_want(tokens)], 0)
        assert best is not None
        sources.append(best.source)
        tokens += [1, 2, 3]
    assert sources[0] == "loud"
    assert set(sources[8:]) == {"quiet"}
