"""Stores that learn from many requests: what they learn, for whom, within which bounds, and over a restart."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.philox import gumbel
from scheduler.types import Sampling, Speculation, VerifyMode
from server.worker.drafters.base import RowTops, Want
from server.worker.drafters.lookup import LookupDrafter
from server.worker.drafters.stores.adjacency import AdjacencyStore
from server.worker.drafters.stores.history import HistoryStore
from server.worker.drafters.stores.ngram_prob import NgramProbStore
from server.worker.drafters.stores.persistence import load_stores, save_stores
from server.worker.drafters.stores.suffix import SuffixStore
from server.worker.drafters.stores.trigram import TrigramStore
from tests.server.worker.drafters.wants import VOCAB, accepted, make_state, make_want

TEXT = random.Random(21).sample(range(VOCAB), 80)
TableStore = AdjacencyStore | NgramProbStore | TrigramStore
STORES: dict[str, Callable[[int], TableStore]] = {
    "adjacency": AdjacencyStore,
    "ngram_prob": NgramProbStore,
    "trigram": TrigramStore,
}


def tops_of(text: Sequence[int], start: int, share: float = 0.9) -> RowTops:
    """Rows that gave text[start:]: the right token first, nine others behind it."""
    ends = tuple(range(start, len(text)))
    ids = np.array([[text[end], *((text[end] + i) % VOCAB for i in range(1, 10))] for end in ends], dtype=np.int32)
    row = np.log([share, *([(1 - share) / 10] * 9)]).astype(np.float32)
    return RowTops(ends, ids, np.tile(row, (len(ends), 1)))


def teach(store: TableStore | SuffixStore, text: Sequence[int], salt: str = "", seq_id: int = 1, **state: Any) -> Want:
    """Show the store a whole sequence, as one step that judged all its rows would."""
    want = make_want(text, 8, make_state(text, 1, salt, **state), seq_id, tops_of(text, 1))
    LookupDrafter(store).propose([want], 0)
    return want


def ask(store: TableStore | SuffixStore, tokens: Sequence[int], salt: str = "", **kwargs: Any) -> list[int]:
    state = kwargs.pop("state", None) or make_state(tokens, 1, salt)
    (drafts,) = LookupDrafter(store).propose([make_want(tokens, 8, state, 99, **kwargs)], 0)
    return list(drafts.tokens) if drafts is not None else []


@pytest.mark.parametrize("name", STORES)
def test_what_one_request_showed_is_drafted_for_the_next(name: str) -> None:
    store = STORES[name](1 << 20)
    assert ask(store, TEXT[:20]) == []
    for seq_id in range(8):
        teach(store, TEXT, seq_id=seq_id)
    drafts = ask(store, TEXT[:20])
    assert len(drafts) >= 2
    assert drafts == TEXT[20 : 20 + len(drafts)]


@pytest.mark.parametrize("name", STORES)
def test_tenants_are_strangers(name: str) -> None:
    store = STORES[name](1 << 20)
    other = [*TEXT[:20], *((token + 7) % VOCAB for token in TEXT[20:])]
    for seq_id in range(8):
        teach(store, TEXT, "a", seq_id)
        teach(store, other, "b", 100 + seq_id)
    assert ask(store, TEXT[:20], "a")[0] == TEXT[20]
    assert ask(store, TEXT[:20], "b")[0] == other[20]
    assert ask(store, TEXT[:20]) == []


@pytest.mark.parametrize("name", STORES)
def test_the_same_step_twice_teaches_once(name: str) -> None:
    once, twice = STORES[name](1 << 20), STORES[name](1 << 20)
    want = teach(once, TEXT)
    teach(twice, TEXT)
    LookupDrafter(twice).propose([want], 0)
    assert {key: array.tolist() for key, array in once.save().items()} == {
        key: array.tolist() for key, array in twice.save().items()
    }


@pytest.mark.parametrize("name", STORES)
def test_memory_is_bounded_and_counts_stay_right(name: str) -> None:
    rng, limit = random.Random(1), 100_000
    store = STORES[name](limit)
    for seq_id in range(40):
        teach(store, [rng.randrange(VOCAB) for _ in range(60)], str(seq_id % 5), seq_id)
        store.tables.check()
        assert store.num_bytes <= limit
    assert store.num_bytes > limit / 2


@pytest.mark.parametrize("name", STORES)
def test_trees_are_grown_where_they_are_allowed(name: str) -> None:
    store = STORES[name](1 << 20)
    other = [*TEXT[:20], *((token + 7) % VOCAB for token in TEXT[20:])]
    for seq_id in range(8 if name != "adjacency" else 1):
        teach(store, TEXT, seq_id=seq_id)
        teach(store, other, seq_id=100 + seq_id)
    (tree,) = LookupDrafter(store).propose([make_want(TEXT[:20], 24, make_state(TEXT[:20]), 99, tree=True)], 0)
    assert tree is not None
    assert len(set(tree.parents)) < len(tree.parents)
    if name != "adjacency":
        assert accepted(tree, TEXT[20:22]) == accepted(tree, other[20:22]) == 2


def test_rates_of_ranks_follow_what_comes_true() -> None:
    store = AdjacencyStore(1 << 20)
    (before,) = LookupDrafter(store).propose([teach(store, TEXT)], 0)
    for seq_id in range(2, 30):
        teach(store, TEXT, seq_id=seq_id)
    (after,) = LookupDrafter(store).propose([make_want(TEXT[:20])], 0)
    assert after is not None
    assert after.survivals[0] > 0.8 > 0.5 > (before.survivals[0] if before else 0.0)


class TestCoupling:
    """`ngram_prob` ranks by log q plus the noise of the position."""

    def store(self) -> NgramProbStore:
        store = NgramProbStore(1 << 20)
        for seq_id in range(4):
            want = make_want(TEXT, 8, make_state(TEXT), seq_id, tops_of(TEXT, 1, share=0.3))
            LookupDrafter(store).propose([want], 0)
        return store

    def truth(self, num_output: int, seed: int) -> int:
        """What a target with the very same probabilities samples there."""
        token = TEXT[1 + num_output]
        ids = np.array([(token + i) % VOCAB for i in range(10)])
        shares = np.array([0.3, *([0.07] * 9)])
        return int(ids[np.argmax(np.log(shares) + gumbel(seed, 0, num_output, ids))])

    @pytest.mark.parametrize(
        ("verify", "temperature", "hits"),
        [(VerifyMode.COUPLED, 1.0, 200), (VerifyMode.REJECTION, 1.0, 60), (VerifyMode.COUPLED, 0.0, 60)],
    )
    def test_the_first_draft_is_the_targets_sample_only_under_coupling(
        self, verify: VerifyMode, temperature: float, hits: int
    ) -> None:
        store, right, asked = self.store(), 0, 0
        for seed in range(200):
            num_output = 5 + seed % 60
            sampling = Sampling(temperature=temperature, seed=seed)
            state = make_state(TEXT[: 1 + num_output], 1, speculation=Speculation(verify=verify), sampling=sampling)
            drafts = ask(store, TEXT[: 1 + num_output], state=state)
            right += bool(drafts) and drafts[0] == self.truth(num_output, seed)
            asked += 1
        assert abs(right - hits) <= (0 if hits == asked else 30)


def test_exploration_brings_up_rare_candidates() -> None:
    shy, curious = TrigramStore(1 << 20, explore=0.0), TrigramStore(1 << 20, explore=3.0)
    for store in (shy, curious):
        for seq_id, third in enumerate([30] * 30 + [40]):
            teach(store, [1, 10, 20, third], seq_id=seq_id)
    shares = []
    for store in (shy, curious):
        (tree,) = LookupDrafter(store).propose([make_want([1, 10, 20], 8, tree=True)], 0)
        assert tree is not None
        shares.append(dict(zip(tree.tokens, tree.survivals, strict=True)).get(40, 0.0))
    assert shares[0] == 0.0
    assert shares[1] > 0.05


class TestPersistence:
    def stores(self) -> list[Any]:
        return [*(make(1 << 20) for make in STORES.values()), SuffixStore(HistoryStore(), 1 << 20)]

    def taught(self) -> list[Any]:
        stores = self.stores()
        for store in stores:
            for seq_id in range(8):
                want = teach(store, TEXT, "tenant", seq_id, name=str(seq_id))
                store.release(seq_id, want.state)
        return stores

    def test_what_was_learnt_survives_a_restart(self, tmp_path: Path) -> None:
        file = tmp_path / "deep" / "stores.npz"
        before = self.taught()
        assert save_stores(file, before, VOCAB)
        after = self.stores()
        assert load_stores(file, after, VOCAB)
        for old, new in zip(before, after, strict=True):
            while isinstance(old, SuffixStore) and old.work(1000):
                pass
            assert ask(new, TEXT[:20], "tenant") == ask(old, TEXT[:20], "tenant") != []
            assert ask(new, TEXT[:20], "stranger") == []
            assert new.num_bytes == old.num_bytes
        after[-1].check()
        assert [path.name for path in file.parent.iterdir()] == ["stores.npz"]
        assert file.stat().st_mode & 0o077 == 0
        assert b"tenant" not in file.read_bytes().replace(b"/tenants", b"")

    def test_empty_stores_are_kept_too(self, tmp_path: Path) -> None:
        file = tmp_path / "stores.npz"
        assert save_stores(file, self.stores(), VOCAB)
        assert load_stores(file, self.stores(), VOCAB)

    def test_no_file_is_a_silent_fresh_start(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert not load_stores(tmp_path / "none", self.stores(), VOCAB)
        assert not caplog.records

    @pytest.mark.parametrize("damage", ["truncated", "text", "flipped", "empty", "other vocabulary", "objects"])
    def test_a_file_that_is_not_ours_is_refused_with_a_line(
        self, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file, vocab_size = tmp_path / "stores.npz", VOCAB
        save_stores(file, self.taught(), VOCAB)
        good = file.read_bytes()
        if damage == "truncated":
            file.write_bytes(good[: len(good) // 2])
        elif damage == "text":
            file.write_text("not an archive")
        elif damage == "flipped":
            middle = len(good) // 3
            file.write_bytes(
                good[:middle] + bytes(255 - byte for byte in good[middle : middle + 400]) + good[middle + 400 :]
            )
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "other vocabulary":
            vocab_size = VOCAB + 1
        else:
            np.savez(file, header=np.array([{"a": 1}], dtype=object))
        with caplog.at_level(logging.WARNING):
            stores = self.stores()
            assert not load_stores(file, stores, vocab_size)
        assert len(caplog.records) == 1
        assert "is not used" in caplog.text

    @pytest.mark.parametrize("part", ["owners", "lengths", "tokens"])
    def test_arrays_that_do_not_fit_together_are_refused(self, part: str) -> None:
        arrays = self.taught()[-1].save()
        arrays[part] = arrays[part][:-1] + (5 if part == "owners" else 0)
        with pytest.raises(ValueError, match=r"texts|array|tenant"):
            SuffixStore(HistoryStore(), 1 << 20).load(arrays)

    def test_a_place_that_cannot_be_written_is_a_line_in_the_log(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        assert not save_stores(tmp_path / "file" / "stores.npz", self.stores(), VOCAB)
        assert "cannot be written" in caplog.text
