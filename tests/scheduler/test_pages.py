"""Pages are conserved, shared pages are counted, and idle ones go in LRU order (R2)."""

from __future__ import annotations

import random

import pytest

from scheduler.pages import PagePool


def make_pool(num_pages: int = 4) -> tuple[PagePool, list[int]]:
    evicted: list[int] = []
    return PagePool(num_pages, evicted.append), evicted


def test_a_page_released_twice_is_refused() -> None:
    pool, _ = make_pool()
    pages = pool.take(2)
    pool.release(pages)
    with pytest.raises(RuntimeError, match="double free"):
        pool.release(pages)


def test_taking_too_many_pages_changes_nothing() -> None:
    pool, _ = make_pool()
    table = pool.take(3)
    with pytest.raises(RuntimeError, match="2 pages wanted, 1 available"):
        pool.take(2)
    assert pool.num_available == 1
    pool.check([table])


def test_a_shared_page_is_free_when_its_last_owner_leaves() -> None:
    pool, _ = make_pool()
    table = pool.take(1)
    pool.share(table)
    pool.release(table)
    assert pool.num_owned == 1
    pool.release(table)
    assert pool.num_owned == 0
    assert pool.num_idle == 0


def test_a_free_page_cannot_be_shared_or_kept() -> None:
    pool, _ = make_pool()
    with pytest.raises(RuntimeError, match="free"):
        pool.share([0])
    with pytest.raises(RuntimeError, match="no owner"):
        pool.keep(0)


def test_idle_pages_are_evicted_least_recently_used_first_and_tails_before_heads() -> None:
    pool, evicted = make_pool(4)
    old, new = pool.take(2), pool.take(2)
    for page in old + new:
        pool.keep(page)
    pool.release(old)
    pool.release(new)
    assert pool.num_idle == 4
    pool.take(4)
    assert evicted == [old[1], old[0], new[1], new[0]]


def test_empty_pages_are_taken_before_idle_ones() -> None:
    pool, evicted = make_pool(2)
    kept = pool.take(1)
    pool.keep(kept[0])
    pool.release(kept)
    assert pool.take(1) != kept
    assert evicted == []


def test_an_idle_page_that_is_shared_is_no_longer_evictable() -> None:
    pool, evicted = make_pool(2)
    kept = pool.take(1)
    pool.keep(kept[0])
    pool.release(kept)
    pool.share(kept)
    pool.take(1)
    with pytest.raises(RuntimeError, match="available"):
        pool.take(1)
    assert evicted == []


def test_check_finds_a_page_nobody_accounts_for() -> None:
    pool, _ = make_pool()
    pool.take(1)
    with pytest.raises(AssertionError, match="R2"):
        pool.check([])


@pytest.mark.parametrize("seed", range(20))
def test_pages_are_conserved_through_random_use(seed: int) -> None:
    rng = random.Random(seed)
    pool, _ = make_pool(8)
    tables: list[list[int]] = []
    for _ in range(300):
        choice = rng.random()
        if choice < 0.4 and pool.num_available:
            tables.append(pool.take(rng.randint(1, pool.num_available)))
        elif choice < 0.6 and tables:
            pool.keep(rng.choice(rng.choice(tables)))
        elif choice < 0.7 and tables:
            shared = rng.choice(tables)[:2]
            pool.share(shared)
            tables.append(list(shared))
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
        assert pool.num_owned + pool.num_available == 8
