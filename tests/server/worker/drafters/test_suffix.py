"""The suffix store: counts are those of a brute-force recount, tenants are strangers, memory is bounded."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence

import pytest

from scheduler.types import Speculation, SpeculationMode
from server.worker.drafters.lookup import LookupDrafter
from server.worker.drafters.stores.history import HistoryStore
from server.worker.drafters.stores.suffix import TEXT_BYTES, SuffixStore
from server.worker.drafters.stores.suffix_tree import MAX_DEPTH, NODE_BYTES, SuffixTree
from tests.server.worker.drafters.wants import accepted, make_state, make_want

Text = list[int]


def recount(suffixes: Sequence[tuple[Text, int]]) -> Counter[tuple[int, ...]]:
    """How often each string begins one of the suffixes, up to the depth bound."""
    counts: Counter[tuple[int, ...]] = Counter()
    for text, first in suffixes:
        suffix = text[first : first + MAX_DEPTH]
        counts.update(tuple(suffix[:length]) for length in range(1, len(suffix) + 1))
    return counts


def strings(tree: SuffixTree) -> dict[tuple[int, ...], int]:
    """Every string of the tree with its count."""
    return {
        path[: len(path) - shorter]: tree.counts[node]
        for node, path in tree.nodes()
        for shorter in range(tree.lengths[node])
    }


def add(tree: SuffixTree, number: int, text: Text) -> None:
    tree.texts[number] = array("i", text)
    for first in range(len(text)):
        tree.insert(number, first)


@pytest.mark.parametrize(("alphabet", "length"), [(2, 30), (3, 90), (1, 100), (50, 60)])
def test_counts_are_those_of_a_recount_while_texts_come_and_go(alphabet: int, length: int) -> None:
    rng = random.Random(alphabet)
    tree, texts, present = SuffixTree(), list[Text](), list[tuple[int, int]]()
    for number in range(12):
        texts.append([rng.randrange(alphabet) for _ in range(rng.randrange(1, length))])
        add(tree, number, texts[-1])
        present += [(number, first) for first in range(len(texts[-1]))]
        while len(present) > 2 * length:
            tree.remove(*present.pop(0))
        for gone in range(present[0][0]):
            # A label that still pointed into a text that is gone would show.
            tree.texts.pop(gone, None)
        tree.check()
        assert strings(tree) == recount([(texts[number], first) for number, first in present])
    while present:
        tree.remove(*present.pop(0))
    tree.check()
    assert tree.num_nodes == 0


def test_a_repeated_text_adds_counts_and_no_nodes() -> None:
    text, tree = [random.Random(0).randrange(20) for _ in range(200)], SuffixTree()
    add(tree, 1, text)
    size = tree.num_nodes
    add(tree, 2, text)
    assert size == tree.num_nodes < 2 * len(text)
    tree.check()


def test_the_check_sees_a_wrong_count() -> None:
    tree = SuffixTree()
    add(tree, 1, [1, 2, 1, 2, 1, 3])
    tree.check()
    tree.counts[next(iter(tree.nodes()))[0]] += 1
    with pytest.raises(AssertionError):
        tree.check()


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
    tree = LookupDrafter(store).propose([make_want(ANSWER[:10], 12, tree=True)], 0)[0]
    assert accepted(tree, [100, 101]) == 2
    assert accepted(tree, [200, 201, 202]) == 3


def test_the_sequences_own_text_counts_too() -> None:
    assert offer(new_store(), [5, 6, 7, 8] * 6) == [5, 6, 7, 8] * 2


def test_learning_is_put_off_and_bounded_per_call() -> None:
    store = new_store()
    store.release(7, make_state(ANSWER, 1))
    assert store.num_shared_bytes == 0
    assert 10 <= store.work(10) <= 10 + MAX_DEPTH
    store.check()
    assert 0 < store.num_shared_bytes < 20 * (NODE_BYTES + TEXT_BYTES) + 60 * TEXT_BYTES
    # Tokens that all differ: the root and one leaf for each suffix.
    assert store.work(1000) == 2 * len(ANSWER) - 10
    assert store.work(1000) == 0
    store.check()


def test_a_preempted_output_is_learnt_once() -> None:
    store = new_store()
    for length in (30, 30, 60):
        finish(store, ANSWER[:length])
    counts = strings(store._trees[store._texts[0].tenant])
    assert counts[(ANSWER[20],)] == 2, "as the context of what came after the preemption"
    assert counts[(ANSWER[5],)] == counts[(ANSWER[50],)] == 1
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
        assert store.num_shared_bytes <= limit + 2 * 50 * 400
    assert offer(store, answers[-1][:12], str(29 % 3)) == answers[-1][12:20]
    assert offer(store, answers[0][:12], "0") == [], "two of 900 tokens in a row are in no other answer"


def test_a_long_run_of_small_pieces_of_work_keeps_counts_consistent() -> None:
    rng = random.Random(12)
    store = new_store(20_000)
    for i in range(60):
        store.release(i, make_state([rng.randrange(4) for _ in range(rng.randrange(2, 40))], 1, name=str(i)))
        store.work(rng.randrange(40))
        store.check()
