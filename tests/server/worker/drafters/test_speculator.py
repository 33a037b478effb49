"""The composite: the best offer wins, and no member, however bad, does more harm than silence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from scheduler.types import Drafts, Speculation, VerifyMode
from server.worker.drafters.base import Want
from server.worker.drafters.build import DRAFTERS, check_names
from server.worker.drafters.lookup import LookupDrafter
from server.worker.drafters.speculator import Speculator
from server.worker.drafters.stores.history import HistoryStore
from server.worker.grammar import GrammarMatcher
from server.worker.sequences import SequenceState
from tests.server.worker.drafters.wants import VOCAB, make_state, make_want


@dataclass
class Member:
    """A drafter that answers what it is told to."""

    name: str
    offer: Callable[[Want], Drafts | None]
    is_sequential: bool = False
    needs_top: int = 0
    num_bytes: int = 10
    asked: list[list[int]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    serves_all: bool = True

    def serves(self, state: SequenceState) -> bool:
        return self.serves_all or bool(state.request.speculation.prediction)

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        self.asked.append([want.seq_id for want in wants])
        return [self.offer(want) for want in wants]

    def release(self, seq_id: int, state: SequenceState) -> None:
        self.released.append(seq_id)


def chain(source: str, *survivals: float, first: int = 10) -> Callable[[Want], Drafts]:
    tokens = tuple(range(first, first + len(survivals)))
    return lambda want: Drafts(tokens, survivals, source)


def speculator(*members: Member | LookupDrafter, draft_tree: bool = True, has_window: bool = False) -> Speculator:
    return Speculator(members, VOCAB, draft_tree, has_window)


def test_the_offer_that_expects_most_tokens_wins() -> None:
    few = Member("few", chain("few", 0.9))
    many = Member("many", chain("many", 0.7, 0.6))
    (best,) = speculator(few, many).propose([make_want([1])], 0)
    assert best is not None
    assert best.source == "many"


def test_on_a_tie_the_earlier_drafter_wins() -> None:
    members = [Member(name, chain(name, 0.5)) for name in ("one", "two")]
    (best,) = speculator(*members).propose([make_want([1])], 0)
    assert best is not None
    assert best.source == "one"


def test_a_request_gets_the_drafter_it_names() -> None:
    members = [Member("one", chain("one", 0.9)), Member("two", chain("two", 0.1))]
    wants = [
        make_want([1], state=make_state([1], speculation=Speculation(drafter=name)), seq_id=i)
        for i, name in enumerate(("two", "auto", "one", "none of these"))
    ]
    offers = speculator(*members).propose(wants, 0)
    assert [offer and offer.source for offer in offers] == ["two", "one", "one", None]
    assert [member.asked for member in members] == [[[1, 2]], [[0, 1]]]


def test_who_can_have_nothing_for_a_sequence_is_not_asked_about_it() -> None:
    picky, other = Member("picky", chain("picky", 0.9), serves_all=False), Member("other", chain("other", 0.5))
    predicted = make_state([1], speculation=Speculation(prediction=(1, 2)))
    wants = [make_want([1], seq_id=3), make_want([1], state=predicted, seq_id=4)]
    composite = speculator(picky, other)
    offers = composite.propose(wants, 0)
    assert [offer and offer.source for offer in offers] == ["other", "picky"]
    assert (picky.asked, other.asked) == ([[4]], [[3, 4]])
    # The next sequence of that number may be another one.
    composite.release([(3, wants[0].state)])
    (offer,) = composite.propose([make_want([1], state=predicted, seq_id=3)], 0)
    assert offer is not None
    assert offer.source == "picky"


def test_a_model_drafter_works_only_where_depth_allows_and_lookup_is_worse() -> None:
    lookup = Member("lookup", lambda want: Drafts((5,) * 4, (0.9,) * 4, "lookup") if want.seq_id == 0 else None)
    model = Member("model", chain("model", 0.6, 0.5), is_sequential=True)
    composite = speculator(model, lookup)
    wants = [make_want([1], 4, seq_id=0), make_want([1], 4, seq_id=1)]
    assert [offer and offer.source for offer in composite.propose(wants, 0)] == ["lookup", None]
    assert model.asked == []
    assert [offer and offer.source for offer in composite.propose(wants, 4)] == ["lookup", "model"]
    assert model.asked == [[1]]


def test_a_drafter_that_raises_is_off_and_its_neighbours_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(want: Want) -> Drafts:
        raise RuntimeError("lost")

    broken, good = Member("broken", fail), Member("good", chain("good", 0.5))
    composite = speculator(broken, good)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            (best,) = composite.propose([make_want([1])], 0)
            assert best is not None
            assert best.source == "good"
    assert len(broken.asked) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "drafter broken failed and is off until the next start"
    ]
    assert composite.disabled == {"broken": "RuntimeError: lost"}
    assert composite.drafters == (("broken", False), ("good", False))


def test_a_drafter_that_answers_for_too_few_sequences_is_off() -> None:
    short = Member("short", chain("short", 0.5))
    short.propose = lambda wants, depth: []  # type: ignore[method-assign]
    composite = speculator(short)
    assert composite.propose([make_want([1])], 0) == [None]
    assert "short" in composite.disabled


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (Drafts((), (), "x"), "no tokens"),
        (Drafts((1, 2), (0.5,), "x"), "survival for each"),
        (Drafts((1,) * 9, (0.5,) * 9, "x"), "more drafts"),
        (Drafts((VOCAB,), (0.5,), "x"), "vocabulary"),
        (Drafts((-1,), (0.5,), "x"), "vocabulary"),
        (Drafts((1, 2), (0.5, 0.6), "x"), "rise"),
        (Drafts((1, 2), (1.5, 0.6), "x"), "rise"),
        (Drafts((1, 2), (0.5, 0.0), "x"), "rise"),
        (Drafts((1, 2, 3), (0.5, float("nan"), 0.4), "x"), "rise"),
        (Drafts((1, 2), (0.5, 0.4), "x", (1, -1)), "parents"),
        (Drafts((1, 2), (0.5, 0.4), "x", (-1, -2)), "parents"),
        (Drafts((1, 2), (0.5, 0.4), "x", (-1,)), "parents"),
        (Drafts((1, 1), (0.5, 0.4), "x", (-1, -1)), "equal children"),
    ],
)
def test_a_malformed_offer_is_dropped_and_counted(offer: Drafts, reason: str) -> None:
    bad, good = Member("bad", lambda want: offer), Member("good", chain("good", 0.01))
    composite = speculator(bad, good)
    (best,) = composite.propose([make_want([1])], 0)
    assert best is not None
    if offer.survivals:
        assert [reason in counted for counted in composite.num_dropped] == [True]
    assert best.source == "good"
    assert not composite.disabled


@pytest.mark.parametrize(
    ("speculation", "draft_tree", "has_window", "allowed"),
    [
        (Speculation(), True, False, True),
        (Speculation(), False, False, False),
        (Speculation(tree=True), False, False, True),
        (Speculation(tree=False), True, False, False),
        (Speculation(tree=True), True, True, False),
        (Speculation(tree=True, verify=VerifyMode.REJECTION), True, False, False),
        (Speculation(tree=True, verify=VerifyMode.BLOCK), True, False, False),
    ],
)
def test_trees_only_where_request_and_model_allow(
    speculation: Speculation, draft_tree: bool, has_window: bool, allowed: bool
) -> None:
    seen: list[bool] = []

    def offer(want: Want) -> Drafts:
        seen.append(want.tree)
        return Drafts((1, 2), (0.5, 0.4), "x", (-1, -1))

    composite = speculator(Member("x", offer), draft_tree=draft_tree, has_window=has_window)
    (best,) = composite.propose([make_want([1], state=make_state([1], speculation=speculation))], 0)
    assert seen == [allowed]
    assert (best is not None) is allowed


class Even:
    """A grammar of even tokens."""

    def num_legal(self, history: Sequence[int], drafts: Sequence[int]) -> int:
        return next((i for i, token in enumerate(drafts) if token % 2), len(drafts))


def even_state() -> SequenceState:
    state = make_state([2])
    state.matcher = cast(GrammarMatcher, Even())
    return state


def test_drafts_are_cut_at_the_first_that_the_grammar_forbids() -> None:
    composite = speculator(Member("x", lambda want: Drafts((2, 4, 5, 6), (0.9, 0.8, 0.7, 0.6), "x")))
    assert composite.propose([make_want([2], state=even_state())], 0) == [Drafts((2, 4), (0.9, 0.8), "x")]
    assert composite.num_dropped.total() == 1


def test_a_branch_that_the_grammar_forbids_is_cut_out_of_a_tree() -> None:
    tree = Drafts((2, 3, 4, 6, 8), (0.9, 0.5, 0.4, 0.3, 0.2), "x", (-1, -1, 1, 0, 3))
    composite = speculator(Member("x", lambda want: tree))
    assert composite.propose([make_want([2], state=even_state())], 0) == [
        Drafts((2, 6, 8), (0.9, 0.3, 0.2), "x", (-1, 0, 1))
    ]


def test_an_offer_that_is_all_illegal_leaves_the_place_to_the_next() -> None:
    composite = speculator(Member("odd", chain("odd", 0.9, first=11)), Member("even", chain("even", 0.2)))
    (best,) = composite.propose([make_want([2], state=even_state())], 0)
    assert best is not None
    assert best.source == "even"


def test_releases_reach_every_drafter_and_a_failing_one_is_off() -> None:
    class Leaky(Member):
        def release(self, seq_id: int, state: SequenceState) -> None:
            raise KeyError(seq_id)

    leaky, good = Leaky("leaky", chain("leaky", 0.5)), Member("good", chain("good", 0.5))
    composite = speculator(leaky, good)
    composite.release([(3, make_state([1])), (4, make_state([1]))])
    assert good.released == [3, 4]
    assert list(composite.disabled) == ["leaky"]


def test_what_was_learnt_is_kept_at_the_end_if_it_is_to_be_kept() -> None:
    kept: list[bool] = []
    Speculator([], VOCAB, False, False, keep=lambda: kept.append(True)).close()
    speculator().close()
    assert kept == [True]


def test_needs_and_sizes_are_those_of_all_members_together() -> None:
    composite = speculator(Member("a", chain("a", 0.5), needs_top=8), Member("b", chain("b", 0.5), needs_top=4))
    assert (composite.needs_top, composite.num_bytes) == (8, 20)


def test_the_composite_of_real_stores_offers_what_the_history_repeats() -> None:
    (best,) = speculator(LookupDrafter(HistoryStore())).propose([make_want([1, 2, 3] * 9, 6)], 0)
    assert best is not None
    assert best.tokens == (1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize(
    ("names", "problem"), [((), "empty"), (("history", "magic"), "'magic'"), (("history", "history"), "twice")]
)
def test_names_that_cannot_be_built_are_refused_with_a_sentence(names: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_names(names)


def test_every_name_of_the_table_is_accepted() -> None:
    check_names(tuple(DRAFTERS))


def sampled(offer: Drafts, q: torch.Tensor) -> Callable[[Want], Drafts]:
    def draw(want: Want) -> Drafts:
        want.state.draft_q = q
        return offer

    return draw


def test_what_an_offer_was_drawn_from_stays_only_if_the_offer_is_taken() -> None:
    q = torch.full((1, VOCAB), 1 / VOCAB)
    other = torch.zeros(1, VOCAB)
    drawn = Member("drawn", sampled(Drafts((3,), (0.5,), "drawn"), q), is_sequential=True)
    for survival, source, kept in ((0.4, "drawn", q), (0.55, "lookup", None)):
        want = make_want([1], state=make_state([1], speculation=Speculation(verify=VerifyMode.REJECTION)))
        (best,) = speculator(Member("lookup", chain("lookup", survival)), drawn).propose([want], 4)
        assert best is not None
        assert best.source == source
        assert want.state.draft_q is kept
    worse = Member("worse", sampled(Drafts((4,), (0.1,), "worse"), other), is_sequential=True)
    want = make_want([1])
    speculator(drawn, worse).propose([want], 4)
    assert want.state.draft_q is q


def test_sampled_drafts_are_chosen_by_what_was_known_before_they_were_drawn() -> None:
    q = torch.full((2, VOCAB), 1 / VOCAB)
    # The second survival depends on which token came first; it must not decide whether the first is verified.
    long = Member("long", sampled(Drafts((3, 4), (0.5, 0.5), "long"), q), is_sequential=True)
    (best,) = speculator(Member("lookup", chain("lookup", 0.6)), long).propose([make_want([1])], 4)
    assert best is not None
    assert best.source == "lookup"


def test_sampled_drafts_are_not_cut_where_the_grammar_forbids_one() -> None:
    offer, q = Drafts((2, 3, 4), (0.5, 0.4, 0.3), "x"), torch.full((3, VOCAB), 1 / VOCAB)
    state = even_state()
    (whole,) = speculator(Member("x", sampled(offer, q))).propose([make_want([2], state=state)], 0)
    assert whole == offer, "whether a drawn draft is submitted must not depend on which token it is"
    (cut,) = speculator(Member("x", lambda _: offer)).propose([make_want([2], state=even_state())], 0)
    assert cut == Drafts((2,), (0.5,), "x")
