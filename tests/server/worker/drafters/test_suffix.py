"""The suffix store: what is offered was said before, tenants are strangers, memory is bounded."""

from __future__ import annotations

import random

from scheduler.types import Speculation, SpeculationMode
from server.worker.drafters.lookup import LookupDrafter
from server.worker.drafters.stores.history import HistoryStore
from server.worker.drafters.stores.suffix import SuffixStore
from tests.server.worker.drafters.wants import accepted, make_state, make_want

Text = list[int]


def finish(
    store: SuffixStore, text: Text, salt: str = "", name: str = "done", speculation: Speculation | None = None
) -> None:
    store.release(7, make_state(text, 1, salt, speculation, name=name))
    while store.work(1000):
        pass


def offer(store: SuffixStore, tokens: Text, salt: str = "", num_drafts: int = 8) -> Text:
    (drafts,) = LookupDrafter(store).propose([make_want(tokens, num_drafts, make_state(tokens, 1, salt))], 0)
    return list(drafts.tokens) if drafts is not None else []


def new_store(max_bytes: int = 1 << 20) -> SuffixStore:
    return SuffixStore(HistoryStore(), max_bytes)


ANSWER = random.Random(9).sample(range(900), 60)


def test_a_finished_output_is_drafted_for_the_next_request() -> None:
    store = new_store()
    assert offer(store, ANSWER[:12]) == []
    finish(store, ANSWER)
    assert offer(store, ANSWER[:12]) == ANSWER[12:20]
    assert offer(store, [950, 951, *ANSWER[20:23]], num_drafts=4) == ANSWER[23:27]
    assert offer(store, [950, 951, 952]) == []
    store.check()


def test_two_tenants_with_equal_suffixes_do_not_see_each_other() -> None:
    store = new_store()
    finish(store, [*ANSWER[:10], *range(100, 120)], salt="a", name="1")
    finish(store, [*ANSWER[:10], *range(300, 320)], salt="b", name="2")
    assert offer(store, ANSWER[:10], "a", 4) == [100, 101, 102, 103]
    assert offer(store, ANSWER[:10], "b", 4) == [300, 301, 302, 303]
    assert offer(store, ANSWER[:10], "", 4) == []


def test_the_more_frequent_continuation_is_drafted() -> None:
    store = new_store()
    for name, after in (("1", 100), ("2", 200), ("3", 200)):
        finish(store, [*ANSWER[:10], *range(after, after + 20)], name=name)
    assert offer(store, ANSWER[:10], num_drafts=3) == [200, 201, 202]
    tree = LookupDrafter(store).propose([make_want(ANSWER[:10], 24, tree=True)], 0)[0]
    assert accepted(tree, [100, 101]) == 2
    assert accepted(tree, [200, 201, 202]) == 3


def test_the_sequences_own_text_counts_too() -> None:
    assert offer(new_store(), [5, 6, 7, 8] * 6) == [5, 6, 7, 8] * 2


def test_learning_is_put_off_and_bounded_per_call() -> None:
    store = new_store()
    store.release(7, make_state(ANSWER, 1))
    assert store.num_shared_bytes == 0
    assert store.work(10) == 10
    store.check()
    assert offer(store, ANSWER[:8], num_drafts=2) == ANSWER[8:10]
    assert offer(store, ANSWER[:20]) == []
    # The output, and what stands behind it.
    assert store.work(1000) == len(ANSWER) + 1 - 10
    assert store.work(1000) == 0
    store.check()


def test_an_offer_ends_where_the_output_ended() -> None:
    store = new_store()
    finish(store, ANSWER[:20], name="1")
    finish(store, ANSWER[30:50], name="2")
    assert offer(store, ANSWER[:17]) == ANSWER[17:20]
    assert offer(store, ANSWER[:20]) == []
    finish(store, ANSWER[:40], name="3")
    tree = LookupDrafter(store).propose([make_want(ANSWER[:19], 12, tree=True)], 0)[0]
    assert accepted(tree, ANSWER[19:40]) == 12


def said_after(texts: list[Text], tail: Text) -> set[int]:
    """By a search through all texts."""
    size = len(tail)
    return {text[at + size] for text in texts for at in range(len(text) - size) if text[at : at + size] == tail}


def test_an_offer_was_said_after_the_same_tokens() -> None:
    rng = random.Random(13)
    store, texts = new_store(), list[Text]()
    for number in range(40):
        texts.append([rng.randrange(12) for _ in range(rng.randrange(4, 60))])
        finish(store, texts[-1], name=str(number))
    num_long = num_silent = 0
    for _ in range(1000):
        # No two tokens alike: the sequence itself says nothing.
        tail = rng.sample(range(14), 5)
        offered = offer(store, [*range(500, 520), *tail], num_drafts=1)
        short, long = said_after(texts, tail[-2:]), said_after(texts, tail[-4:])
        assert set(offered) <= (long or short)
        assert offered or not long
        num_long, num_silent = num_long + bool(long), num_silent + (not short)
    assert num_long > 10 < num_silent


def test_a_preempted_output_is_learnt_once() -> None:
    store = new_store()
    for length in (30, 30, 60):
        finish(store, ANSWER[:length])
    (outputs,) = store._young.values()
    learnt = outputs.text.tolist()
    assert learnt.count(ANSWER[20]) == 2, "as the context of what came after the preemption"
    assert learnt.count(ANSWER[5]) == learnt.count(ANSWER[50]) == 1
    store.check()


def test_a_request_that_opted_out_teaches_nothing() -> None:
    store = new_store()
    finish(store, ANSWER, speculation=Speculation(mode=SpeculationMode.OFF))
    assert offer(store, ANSWER[:12]) == []


def test_memory_stays_within_its_bound_and_the_oldest_outputs_go_first() -> None:
    rng, limit = random.Random(11), 60_000
    store = new_store(limit)
    answers = [[rng.randrange(900) for _ in range(50)] for _ in range(30)]
    for i, answer in enumerate(answers):
        finish(store, answer, salt=str(i % 3), name=str(i))
        store.check()
        assert store.num_shared_bytes <= limit
    assert offer(store, answers[-1][:12], str(29 % 3)) == answers[-1][12:20]
    assert offer(store, answers[0][:12], "0") == [], "two of 900 tokens in a row are in no other answer"


def test_small_pieces_of_work_leave_nothing_out() -> None:
    rng = random.Random(12)
    store = new_store(20_000)
    for i in range(60):
        store.release(i, make_state([rng.randrange(4) for _ in range(rng.randrange(2, 40))], 1, name=str(i)))
        store.work(rng.randrange(40))
        store.check()
