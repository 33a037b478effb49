"""Trees of a model's drafts: each node sees its own path, children follow the target's noise, offers hang together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scheduler.types import Drafts, Request, Sampling
from server.worker.drafters.draft_kv import DraftKV
from server.worker.drafters.draft_tree import MOST_NODES, Tree, ranked
from server.worker.drafters.soundness import flaw
from server.worker.process_logits import JudgedRow
from server.worker.recipe import make_recipe
from tests.server.worker.drafters.model_rig import Sequences, TargetText, drafter_of, want
from tests.server.worker.tiny_model import TinyModel

VOCAB = 40
RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7, "seed": 7},
    "hot": {"temperature": 1.3, "seed": -5, "sample_index": 2},
    "penalties": {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    "words": {"temperature": 1.0, "seed": 6, "bad_words": ((5, 9), (11,)), "min_tokens": 20},
}


@pytest.fixture(scope="module")
def target() -> TinyModel:
    return TinyModel(VOCAB)


@pytest.fixture(scope="module")
def other() -> TinyModel:
    model = TinyModel(VOCAB)
    model.head = model.head + 0.3 * torch.randn(model.head.shape, generator=torch.Generator().manual_seed(5))
    return model


def request(length: int = 11, **sampling: Any) -> Request:
    return Request("x", tuple(3 + 7 * i % (VOCAB - 3) for i in range(length)), 100, Sampling(**sampling))


def paths(offer: Drafts) -> list[tuple[int, ...]]:
    parents = offer.parents or tuple(range(-1, len(offer.tokens) - 1))
    found: list[tuple[int, ...]] = []
    for token, parent in zip(offer.tokens, parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@pytest.mark.parametrize("rules", RULES)
def test_the_likeliest_child_of_every_node_is_the_chain_s_draft_after_its_path(target: TinyModel, rules: str) -> None:
    """A node that saw a sibling, missed an ancestor or stood at a wrong position would say something else."""
    sequences = Sequences()
    state = sequences.admit(1, request(**RULES[rules]))
    tokens = [*state.request.prompt, 7, 8]
    offer = drafter_of(target, sequences, DraftKV(256, 10)).propose([want(1, state, tokens, 24, tree=True)], 4)[0]
    assert offer is not None
    assert offer.parents
    found = paths(offer)
    assert len(set(found)) == len(found)
    inner = {path[:-1] for path in found}
    assert max(len(path) for path in inner) >= 2
    for path in inner:
        first = next(other_path[-1] for other_path in found if other_path[:-1] == path)
        fresh = drafter_of(target, sequences, DraftKV(256, 10))
        chain = fresh.propose([want(1, state, [*tokens, *path], 1)], 1)[0]
        assert chain is not None
        assert chain.tokens == (first,)


@pytest.mark.parametrize("rules", RULES)
def test_a_tree_of_the_target_itself_holds_the_target_s_text(target: TinyModel, rules: str) -> None:
    sequences, text = Sequences(), TargetText(target)
    state = sequences.admit(1, request(**RULES[rules]))
    drafter = drafter_of(target, sequences, DraftKV(256, 10))
    tokens = list(state.request.prompt)
    for _ in range(4):
        offer = drafter.propose([want(1, state, tokens, 12, tree=True)], 3)[0]
        assert offer is not None
        follows = text.extended(state, tokens, 3)[len(tokens) :]
        assert tuple(follows[:1]) in paths(offer)
        # Each step ends somewhere else: the keys behind the tokens are another path's.
        tokens += follows[:2]


def test_trees_and_chains_of_several_sequences_grow_together_as_each_alone(other: TinyModel) -> None:
    sequences = Sequences(num_pages=128)
    wants = []
    for seq_id, (rules, tree) in enumerate((("greedy", True), ("warm", False), ("hot", True), ("words", True))):
        state = sequences.admit(seq_id, request(5 + 4 * seq_id, **RULES[rules]))
        wants.append(want(seq_id, state, state.request.prompt, 9, tree=tree))
    drafter = drafter_of(other, sequences, DraftKV(256, 20))
    together = drafter.propose(wants, 4)
    for one, offer in zip(wants, together, strict=True):
        alone = drafter_of(other, sequences, DraftKV(256, 20)).propose([one], 4)[0]
        assert offer is not None
        assert alone is not None
        assert (offer.tokens, offer.parents) == (alone.tokens, alone.parents)
        assert flaw(offer, one, VOCAB) is None
        assert max(map(len, paths(offer))) <= 4
    assert together[1] is not None
    assert together[1].parents == ()


@pytest.mark.parametrize("num_tokens", [16, 17, 18, 21])
def test_a_tree_stays_inside_the_sequence_s_pages(target: TinyModel, num_tokens: int) -> None:
    sequences = Sequences(page_size=3)
    state = sequences.admit(1, request(16, temperature=1.0, seed=3), num_tokens=num_tokens)
    # Poisoned pages: a key that was not written would make every child of its node vanish.
    offer = drafter_of(target, sequences, DraftKV(256, 20)).propose(
        [want(1, state, state.request.prompt, 40, tree=True)], 5
    )[0]
    assert offer is not None
    assert flaw(offer, want(1, state, state.request.prompt, 40, tree=True), VOCAB) is None


def test_no_more_nodes_are_offered_than_asked_for_and_than_masks_have_bits(target: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request(temperature=1.5, seed=1))
    drafter = drafter_of(target, sequences, DraftKV(256, 20))
    for num_drafts in (1, 2, 7, 200):
        offer = drafter.propose([want(1, state, state.request.prompt, num_drafts, tree=True)], 12)[0]
        assert offer is not None
        assert 0 < len(offer.tokens) <= min(num_drafts, MOST_NODES)


def test_children_are_ranked_with_the_target_s_noise() -> None:
    """Golden: at temperature 0 by probability; else by the sum of log-probability and noise, whoever is likelier."""
    ids, logq = np.array([4, 9, 2]), np.log(np.array([0.6, 0.3, 0.1], dtype=np.float32))
    greedy = JudgedRow(make_recipe(request(temperature=0.0), ()), (), 3)
    tokens, chances = ranked(greedy, ids, logq)
    assert tokens == [4, 9, 2]
    assert chances == pytest.approx([0.6, 0.3, 0.1])
    firsts = set()
    for seed in range(40):
        warm = JudgedRow(make_recipe(request(temperature=1.0, seed=seed), ()), (), 3)
        tokens, chances = ranked(warm, ids, logq)
        firsts.add(tokens[0])
        assert chances == sorted(chances, reverse=True)
    assert firsts == {4, 9, 2}


def test_banned_tokens_are_no_children() -> None:
    row = JudgedRow(make_recipe(request(temperature=1.0), ()), (), 0)
    tokens, _ = ranked(row, np.array([4, 9, 2]), np.array([-0.1, -2.3, -np.inf], dtype=np.float32))
    assert set(tokens) <= {4, 9}


def test_an_offer_of_equals_keeps_parents_before_children() -> None:
    state = Sequences().admit(1, request())
    tree = Tree(want(1, state, state.request.prompt, 3, tree=True), most=3, most_depth=4, room=9)
    tree.add(-1, [5, 6], [1.0, 0.0])
    tree.add(0, [7, 8], [1.0, 0.0])
    tree.add(2, [9], [1.0])
    offer = tree.offer("x")
    assert offer == Drafts((5, 7, 9), (1.0, 1.0, 1.0), "x", ())
