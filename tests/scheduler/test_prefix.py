"""Names of prefix pages: equal only for equal tokens, parents and salts; entered once; pending while computed."""

from __future__ import annotations

from scheduler.prefix import PrefixIndex


def make_index() -> PrefixIndex:
    return PrefixIndex(4, root=bytes(32))


def names_of(index: PrefixIndex, tokens: list[int], salt: str = "") -> list[bytes]:
    names: list[bytes] = []
    index.extend_names(names, tokens, salt)
    return names


def test_a_name_covers_all_tokens_before_it() -> None:
    index = make_index()
    one = names_of(index, [1, 2, 3, 4, 5, 6, 7, 8])
    other = names_of(index, [9, 2, 3, 4, 5, 6, 7, 8])
    assert one[0] != other[0]
    assert one[1] != other[1]
    assert names_of(index, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == one


def test_a_name_covers_the_salt() -> None:
    index = make_index()
    names = {names_of(index, [1, 2, 3, 4], salt)[0] for salt in ("", "a", "b", "ab")}
    assert len(names) == 4


def test_page_contents_that_collide_in_one_page_do_not_share_across_parents_or_salts() -> None:
    """The page's own tokens are equal everywhere here: only parent and salt tell the pages apart."""
    index = make_index()
    page = [7, 7, 7, 7]
    tables = [names_of(index, [first] * 4 + page, salt)[1] for first in (1, 2) for salt in ("", "x")]
    assert len(set(tables)) == 4
    index.enter(tables[0], 0)
    assert index.lookup([tables[0]]) == [0]
    assert all(index.lookup([name]) == [] for name in tables[1:])


def test_tokens_are_told_apart_beyond_one_byte() -> None:
    index = make_index()
    assert names_of(index, [1, 0, 0, 0]) != names_of(index, [257, 0, 0, 0])
    assert names_of(index, [1, 0, 0, 0]) != names_of(index, [0, 1, 0, 0])


def test_names_differ_between_processes() -> None:
    assert names_of(PrefixIndex(4), [1, 2, 3, 4]) != names_of(PrefixIndex(4), [1, 2, 3, 4])


def test_a_lone_surrogate_in_a_salt_is_no_error() -> None:
    assert names_of(make_index(), [1, 2, 3, 4], "\ud800") != names_of(make_index(), [1, 2, 3, 4], "?")


def test_lookup_stops_at_the_first_missing_page() -> None:
    index = make_index()
    names = names_of(index, list(range(12)))
    index.enter(names[0], 5)
    index.enter(names[2], 6)
    assert index.lookup(names) == [5]
    index.evict(5)
    assert index.lookup(names) == []
    index.check()


def test_content_that_is_indexed_already_is_not_entered_again() -> None:
    index = make_index()
    (name,) = names_of(index, [1, 2, 3, 4])
    assert index.enter(name, 1)
    assert not index.enter(name, 2)
    assert index.lookup([name]) == [1]


def test_a_pending_page_belongs_to_the_first_who_announced_it() -> None:
    index = make_index()
    names = names_of(index, list(range(8)))
    index.announce(names, (0, 1))
    index.announce(names, (0, 2))
    index.withdraw(names, (0, 2))
    assert index.pending_owner(names[0]) == (0, 1)
    index.withdraw(names[:1], (0, 1))
    assert index.pending_owner(names[0]) is None
    assert index.pending_owner(names[1]) == (0, 1)
