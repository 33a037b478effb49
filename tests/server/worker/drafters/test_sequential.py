"""Model drafters on a tiny float32 model: coupled draws, lagging keys, shared pages, stop rules."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from scheduler.types import Request, Sampling, Speculation, VerifyMode
from server.worker.drafters.draft_kv import DraftKV
from server.worker.drafters.stopping import STOP_BELOW, stop_rule
from tests.server.worker.drafters.model_rig import Sequences, TargetText, drafter_of, want
from tests.server.worker.tiny_model import TinyModel

VOCAB = 40
NEAR = 10


@pytest.fixture(scope="module")
def target() -> TinyModel:
    return TinyModel(VOCAB)


@pytest.fixture(scope="module")
def other() -> TinyModel:
    """A model that agrees with the target now and then."""
    model, source = TinyModel(VOCAB), TinyModel(VOCAB)
    noise = torch.Generator().manual_seed(5)
    model.head = source.head + 0.3 * torch.randn(source.head.shape, generator=noise)
    return model


def request(name: str, length: int = 11, verify: VerifyMode = VerifyMode.COUPLED, **sampling: Any) -> Request:
    prompt = tuple(3 + (7 * i + ord(name[-1])) % (VOCAB - 3) for i in range(length))
    return Request(name, prompt, 100, Sampling(**sampling), speculation=Speculation(verify=verify))


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7, "seed": 7},
    "hot": {"temperature": 1.5, "seed": -5, "sample_index": 2},
    "cut": {"temperature": 1.0, "seed": 3, "top_p": 0.7, "top_k": 9},
    "penalties": {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    "frequency": {"temperature": 0.0, "frequency_penalty": 0.9},
    "words": {"temperature": 1.0, "seed": 6, "bad_words": ((5, 9), (11,)), "min_tokens": 20},
    "bias": {"temperature": 1.2, "seed": 8, "logit_bias": ((5, 3.0), (9, -100.0)), "min_p": 0.02},
}


@pytest.mark.parametrize("rules", RULES)
def test_every_draft_of_the_target_itself_is_accepted_under_any_rules(target: TinyModel, rules: str) -> None:
    sequences, text = Sequences(), TargetText(target)
    state = sequences.admit(1, request(rules, **RULES[rules]))
    drafter = drafter_of(target, sequences, DraftKV(256, NEAR))
    tokens = list(state.request.prompt)
    for _ in range(6):
        offer = drafter.propose([want(1, state, tokens, 4)], depth=4)[0]
        assert offer is not None
        assert len(offer.tokens) == 4
        step = text.verified(state, tokens, offer)
        assert len(step) == 5
        tokens += step


@pytest.mark.parametrize("seed", range(4))
def test_after_any_pattern_of_steps_drafts_are_those_of_a_fresh_drafter(
    target: TinyModel, other: TinyModel, seed: int
) -> None:
    """Keys lag behind where nothing was drafted and hold rejected drafts where something was: both must heal."""
    rng, text = random.Random(seed), TargetText(target)
    sequences = Sequences()
    names = ("greedy", "warm", "hot")
    states = {i: sequences.admit(i, request(name, 5 + 9 * i, **RULES[name])) for i, name in enumerate(names)}
    tokens = {i: list(state.request.prompt) for i, state in states.items()}
    drafter = drafter_of(other, sequences, DraftKV(256, NEAR))
    rejected = 0
    for _ in range(12):
        wants = [want(i, states[i], tokens[i], rng.choice((0, 1, 4))) for i in states if rng.random() < 0.7]
        wants = [one for one in wants if one.num_drafts > 0]
        offers = drafter.propose(wants, depth=4)
        for one, offer in zip(wants, offers, strict=True):
            fresh = drafter_of(other, sequences, DraftKV(256, NEAR))
            assert offer is not None
            assert offer.tokens == fresh.propose([one], depth=4)[0].tokens  # type: ignore[union-attr]
            step = text.verified(one.state, tokens[one.seq_id], offer)
            rejected += len(step) <= len(offer.tokens)
            tokens[one.seq_id] += step
        for i in set(states) - {one.seq_id for one in wants}:
            tokens[i] += text.verified(states[i], tokens[i], None)
    assert rejected > 0
    assert all(tokens[i] == text.extended(states[i], states[i].request.prompt, len(tokens[i]) - states[i].num_prompt)
               for i in states)  # fmt: skip


def test_a_backlog_is_fed_in_bounded_pieces_and_nothing_is_offered_before_it_is_done(target: TinyModel) -> None:
    sequences = Sequences()
    drafter = drafter_of(target, sequences, DraftKV(catch_up_tokens=16, near=6))
    long, short = sequences.admit(1, request("a", 60, temperature=0.0)), sequences.admit(2, request("b", 9))
    wants = [want(1, long, long.request.prompt, 3), want(2, short, short.request.prompt, 3)]
    sizes: list[int] = []

    def count(tokens: Tensor) -> None:
        sizes.append(tokens.numel())

    offers, firsts = [], []
    model = drafter._forward.model
    assert isinstance(model, TinyModel)
    model.before_forward = count
    try:
        for _ in range(5):
            sizes.clear()
            offers.append(drafter.propose(wants, depth=3))
            firsts.append(sizes[0])
    finally:
        model.before_forward = lambda tokens: None
    # The short one is done first; the long one gets what is left of the budget, then all of it.
    assert [offer[1] is not None for offer in offers] == [True] * 5
    assert [offer[0] is not None for offer in offers] == [False, False, False, False, True]
    assert firsts[0] == 16
    assert max(firsts) <= 16 + 6
    alone = drafter_of(target, sequences, DraftKV(256, NEAR)).propose(wants[:1], depth=3)[0]
    assert alone is not None
    assert offers[4][0] is not None
    assert offers[4][0].tokens == alone.tokens


def test_sequences_that_share_pages_draft_as_each_would_alone(other: TinyModel) -> None:
    sequences = Sequences()
    first = sequences.admit(1, request("x", 20, temperature=1.0, seed=1))
    drafter = drafter_of(other, sequences, DraftKV(256, NEAR))
    drafter.propose([want(1, first, first.request.prompt, 4)], depth=4)
    hit = Request("y", (*first.request.prompt[:16], 7, 9), 50, Sampling(temperature=1.0, seed=2))
    second = sequences.admit(2, hit, pages=sequences.pages_of(1)[:2])
    wants = [want(1, first, first.request.prompt, 4), want(2, second, hit.prompt, 4)]
    together = drafter.propose(wants, depth=4)
    alone = [drafter_of(other, sequences, DraftKV(256, NEAR)).propose([one], depth=4)[0] for one in wants]
    assert [offer.tokens for offer in together if offer] == [offer.tokens for offer in alone if offer]
    assert None not in together


def test_a_sequence_readmitted_after_preemption_starts_over(other: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request("x", 20, temperature=1.0, seed=1))
    reach = DraftKV(256, NEAR)
    drafter = drafter_of(other, sequences, reach)
    before = drafter.propose([want(1, state, state.request.prompt, 4)], depth=4)[0]
    drafter.release(1, state)
    drafter.release(1, state)
    assert len(reach) == 0
    again = sequences.admit(2, state.request)
    after = drafter.propose([want(2, again, again.request.prompt, 4)], depth=4)[0]
    assert before == after


def test_drafts_stay_inside_the_sequence_s_pages_and_the_model_s_positions(target: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request("x", 14, temperature=0.0), num_tokens=16)
    offer = drafter_of(target, sequences, DraftKV(256, NEAR)).propose([want(1, state, state.request.prompt, 8)], 8)[0]
    # 16 keys fit: 14 tokens and two drafts are fed, the third draft needs no key.
    assert offer is not None
    assert len(offer.tokens) == 3
    short = drafter_of(target, sequences, DraftKV(256, NEAR), max_len=14)
    assert [len(offer.tokens) for offer in short.propose([want(1, state, state.request.prompt, 8)], 8) if offer] == [1]
    over = drafter_of(target, sequences, DraftKV(256, NEAR), max_len=13)
    assert over.propose([want(1, state, state.request.prompt, 8)], 8) == [None]


def test_without_depth_no_model_runs(target: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request("x"))
    drafter = drafter_of(target, sequences, DraftKV(256, NEAR))

    def fail(tokens: Tensor) -> None:
        raise AssertionError("a forward ran")

    target.before_forward = fail
    try:
        assert drafter.propose([want(1, state, state.request.prompt, 4)], depth=0) == [None]
    finally:
        target.before_forward = lambda tokens: None


def test_a_forward_that_fails_midway_leaves_no_wrong_key_behind(target: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request("x", 20, temperature=0.0))
    drafter = drafter_of(target, sequences, DraftKV(256, NEAR))
    tokens = list(state.request.prompt)
    calls = 0

    def fail_third(tokens_T: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")

    target.before_forward = fail_third
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            drafter.propose([want(1, state, tokens, 4)], depth=4)
    finally:
        target.before_forward = lambda tokens: None
    # Another text than the one drafted before the failure.
    tokens += [5, 6]
    offer = drafter.propose([want(1, state, tokens, 4)], depth=4)[0]
    fresh = drafter_of(target, sequences, DraftKV(256, NEAR)).propose([want(1, state, tokens, 4)], depth=4)[0]
    assert offer is not None
    assert fresh is not None
    assert offer.tokens == fresh.tokens


def test_confidence_stops_a_chain_and_fixed_does_not(target: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request("x", 20, temperature=1.5, seed=3))
    one = want(1, state, state.request.prompt, 8)
    fixed = drafter_of(target, sequences, DraftKV(256, NEAR), stop_rule("fixed")).propose([one], 8)[0]
    sure = drafter_of(target, sequences, DraftKV(256, NEAR), stop_rule("confidence")).propose([one], 8)[0]
    assert fixed is not None
    assert sure is not None
    assert len(fixed.tokens) == 8
    num_kept = next(i for i, survival in enumerate(fixed.survivals) if survival < STOP_BELOW) + 1
    assert num_kept < 8
    assert sure.tokens == fixed.tokens[:num_kept]
    assert list(fixed.survivals) == sorted(fixed.survivals, reverse=True)
    assert all(0 < survival <= 1 for survival in fixed.survivals)


def test_a_chain_ends_in_a_stop_token(target: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request("x", 20, temperature=0.0))
    one = want(1, state, state.request.prompt, 6)
    whole = drafter_of(target, sequences, DraftKV(256, NEAR)).propose([one], 6)[0]
    assert whole is not None
    stop = next(token for token in whole.tokens if token != whole.tokens[0])
    stopping = Request("x", state.request.prompt, 100, state.request.sampling, stop_ids=(stop,))
    other_state = sequences.admit(2, stopping, num_tokens=32)
    cut = drafter_of(target, sequences, DraftKV(256, NEAR)).propose([want(2, other_state, stopping.prompt, 6)], 6)[0]
    assert cut is not None
    assert cut.tokens == whole.tokens[: whole.tokens.index(stop) + 1]


@pytest.mark.parametrize("verify", [VerifyMode.REJECTION, VerifyMode.BLOCK])
def test_under_the_rejection_rules_drafts_have_noise_of_their_own_and_keep_their_distribution(
    target: TinyModel, verify: VerifyMode
) -> None:
    sequences, text = Sequences(num_pages=256), TargetText(target)
    equal = 0
    for seed in range(30):
        asked = request("x", 9, verify, temperature=1.0, seed=seed, top_k=8)
        state = sequences.admit(seed, asked, num_tokens=16)
        drafter = drafter_of(target, sequences, DraftKV(256, NEAR))
        offer = drafter.propose([want(seed, state, asked.prompt, 3)], 3)[0]
        assert offer is not None
        assert state.draft_q is not None
        assert state.draft_q.shape == (3, VOCAB)
        assert torch.allclose(state.draft_q.sum(dim=1), torch.ones(3))
        assert ((state.draft_q > 0).sum(dim=1) >= 8).all()
        assert (state.draft_q == 0).any()
        assert all(state.draft_q[i, token] > 0 for i, token in enumerate(offer.tokens))
        equal += offer.tokens[0] == text.next(state, asked.prompt)
    # With the target's own noise all thirty would be equal.
    assert equal < 25


def test_under_the_rejection_rules_an_offer_does_not_tell_what_was_drawn(target: TinyModel) -> None:
    sequences = Sequences(num_pages=256)
    survivals = set()
    for seed in range(8):
        asked = request("x", 9, VerifyMode.REJECTION, temperature=1.5, seed=seed)
        asked = Request(
            "x", asked.prompt, 100, asked.sampling, tuple(range(0, VOCAB, 2)), speculation=asked.speculation
        )
        state = sequences.admit(seed, asked, num_tokens=16)
        drafter = drafter_of(target, sequences, DraftKV(256, NEAR), stop_rule("confidence"))
        offer = drafter.propose([want(seed, state, asked.prompt, 5)], 5)[0]
        assert offer is not None
        assert len(offer.tokens) == 5, "neither an unlikely draft nor a stop token ends it"
        survivals.add(offer.survivals)
    assert len(survivals) == 1, "eight different chains look alike to whoever cuts them"


def test_greedy_drafts_were_not_drawn_so_no_distribution_is_kept(target: TinyModel) -> None:
    sequences = Sequences()
    state = sequences.admit(1, request("x", 9, VerifyMode.REJECTION, temperature=0.0))
    drafter_of(target, sequences, DraftKV(256, NEAR)).propose([want(1, state, state.request.prompt, 3)], 3)
    assert state.draft_q is None
