"""From names to drafters: the default set, bounds that are shared, stores that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.worker.drafters.build import SHARED
from tests.server.worker.drafters.wants import VOCAB, build_lookups, make_state, make_want

TEXT = list(range(100, 160))


def test_the_default_drafters_are_lookups_that_need_no_logits() -> None:
    speculator = build_lookups()
    assert speculator.drafters == (("prediction", False), ("grammar", False), ("suffix", False))
    assert speculator.needs_top == 0


def test_drafters_that_learn_from_logits_say_how_many() -> None:
    assert build_lookups(drafters=("history", "adjacency")).needs_top == 8
    assert build_lookups(drafters=("ngram_prob", "adjacency")).needs_top == 10


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"drafters": ()}, "drafters is empty"),
        ({"drafters": ("histroy",)}, "'histroy'; expected some of adjacency"),
        ({"drafters": ("draft_model",)}, "no draft model is given"),
        ({"drafters": ("synthetic",)}, "synthetic_acceptance is not set"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_sentence(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build_lookups(**fields)


def test_stores_come_back_after_a_restart(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"drafters": ("suffix", "trigram"), "store_file": str(tmp_path / "stores.npz")}
    first = build_lookups(**fields)
    want = make_want(TEXT, 8, make_state(TEXT, 1))
    first.propose([want], 0)
    first.release([(1, want.state)])
    first.close()
    (offer,) = build_lookups(**fields).propose([make_want(TEXT[:20], 8, make_state(TEXT[:20], 1), seq_id=2)], 0)
    assert offer is not None
    assert offer.tokens == tuple(TEXT[20:28])


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_lookups().close()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_divided_among_the_shared_stores() -> None:
    names = tuple(sorted(SHARED))
    speculator = build_lookups(drafters=names, store_bytes=400_000)
    for seq_id in range(200):
        text = [(seq_id * 37 + i * i) % VOCAB for i in range(60)]
        want = make_want(text, 8, make_state(text, 1, name=str(seq_id)), seq_id)
        for _ in range(4):
            speculator.propose([want], 0)
        speculator.release([(seq_id, want.state)])
    assert speculator.num_bytes < 600_000


def test_a_window_in_any_layer_keeps_drafts_to_chains() -> None:
    text = [50, 51, 52, 53, 1, 2, 50, 51, 52, 53, 7, 8, 50, 51, 52, 53]
    for windows, is_tree in (((None, None), True), ((None, 64), False)):
        (offer,) = build_lookups(windows=windows, draft_tree=True).propose([make_want(text, 8)], 0)
        assert offer is not None
        assert bool(offer.parents) is is_tree
