"""Which rows each cache computes: the rules of diffusion reference section 6, on views written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.decoding.caches import RULES, CacheState, View, plan_rows
from scheduler.policies import CACHES
from scheduler.types import Choice

WARM = CacheState(is_warm=True)


def choice(name: str, **values: float) -> Choice:
    return Choice(name, tuple({key: values.get(key, p.default) for key, p in CACHES[name].items()}.items()))


def view(**changes: Any) -> View:
    """Prompt 0-3, canvas to 19, block [8, 12), 9 and 10 still masks, as everything behind the block."""
    base = View(20, 8, 12, 4, (8, 12), 2, (9, 10, *range(12, 20)), (8, 11))
    return base._replace(**changes)


def rows(name: str, at: View, state: CacheState = WARM, **values: float) -> set[int] | None:
    return plan_rows(choice(name, **values), at, state)


def test_every_bidirectional_cache_of_the_catalogue_has_a_rule() -> None:
    assert set(RULES) == set(CACHES) - {"exact", "sub_block"}


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_sequence_without_keys_computes_all_rows(name: str) -> None:
    assert rows(name, view(), CacheState()) is None


def test_none_always_computes_all_rows() -> None:
    assert rows("none", view()) is None


@pytest.mark.parametrize("name", ["prefix", "dual", "vicinity", "dkv_decode", "dkv_greedy"])
def test_the_first_step_of_a_block_computes_all_rows(name: str) -> None:
    assert rows(name, view(step=0)) is None


def test_prefix_computes_the_block_and_everything_behind_it() -> None:
    assert rows("prefix", view(step=1)) == set(range(8, 20))


def test_dual_computes_the_block() -> None:
    assert rows("dual", view(step=1)) == {8, 9, 10, 11}


def test_vicinity_computes_the_neighbourhood_after_its_warm_up() -> None:
    assert rows("vicinity", view(step=1), warm_up=2, margin=3) is None
    assert rows("vicinity", view(step=2), warm_up=2, margin=3) == set(range(5, 15))
    assert rows("vicinity", view(step=1), warm_up=0, margin=0) == {8, 9, 10, 11}
    assert rows("vicinity", view(step=5), margin=100) is None, "a margin that covers all is no cache"


def test_dsb_computes_window_prefix_and_what_was_just_fixed() -> None:
    sliding = view(window=(9, 14), fresh=(4, 8))
    assert rows("dsb", sliding, prefix=2) == set(range(4, 14)), "the just-fixed run is longer than the prefix"
    assert rows("dsb", sliding._replace(fresh=(8,)), prefix=2) == set(range(7, 14))
    assert rows("dsb", sliding, CacheState(is_warm=True, num_fixed=4), prefix=2) is None, "a block's worth was fixed"


def test_dkv_decode_computes_masks_and_tokens_one_step_late() -> None:
    assert rows("dkv_decode", view(step=1)) is None
    assert rows("dkv_decode", view(step=2)) == {9, 10, *range(12, 20), 8, 11}
    assert rows("dkv_decode", view(step=2, shift=1)) == {8, 9, 10, *range(11, 20)}
    assert rows("dkv_decode", view(step=8)) is None
    assert rows("dkv_decode", view(step=9, fresh=())) == {9, 10, *range(12, 20)}
    assert rows("dkv_decode", view(step=5), refresh=1) is None


def test_dkv_greedy_computes_commits_and_the_masks_next_to_them() -> None:
    at = view(step=3, fresh=(8,), due=(10,))
    assert rows("dkv_greedy", at, window=0) == {8, 10}
    assert rows("dkv_greedy", at, window=2) == {8, 9, 10, 12}
    assert rows("dkv_greedy", at._replace(masks=(10,)), window=2) == {7, 8, 9, 10}, "no masks left: other neighbours"
    assert rows("dkv_greedy", at, window=20) is None
    assert rows("dkv_greedy", at._replace(step=4), window=0) is None


def test_elastic_computes_tracked_rows_commits_and_the_first_masks_until_keys_are_stale() -> None:
    state = CacheState(is_warm=True, tracked=(0, 2))
    assert rows("elastic", view(), state, width=3) == {0, 2, 8, 11, 9, 10, 12}
    state.absorb(is_refresh=False, num_fixed=1, is_stale=True, tracked=(1,))
    assert rows("elastic", view(), state, width=3) is None
    state.absorb(is_refresh=True, num_fixed=1, is_stale=False, tracked=(1,))
    assert rows("elastic", view(fresh=()), state, width=1) == {1, 9}


def test_a_state_counts_what_was_fixed_since_all_rows_were_computed() -> None:
    state = CacheState()
    state.absorb(is_refresh=False, num_fixed=2, is_stale=False, tracked=())
    assert not state.is_warm
    state.absorb(is_refresh=True, num_fixed=3, is_stale=False, tracked=())
    state.absorb(is_refresh=False, num_fixed=1, is_stale=False, tracked=())
    assert (state.is_warm, state.num_fixed) == (True, 4)
    state.restart()
    assert state == CacheState()


def test_rows_outside_the_canvas_are_left_out() -> None:
    assert rows("dkv_decode", view(size=14, masks=(9, 10, 12, 13))) == {8, 9, 10, 11, 12, 13}
    assert rows("elastic", view(size=14), CacheState(is_warm=True, tracked=(13, 17)), width=1) == {8, 9, 11, 13}
