"""Coupled verification: the text is the target's own, the drafts decide only how much of it comes at once.

And what the rejection modes owe their callers, whatever the distribution (that is test_verification_law.py's).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.reference import ReferenceOps
from scheduler.types import Request, Sampling, VerifyMode
from server.worker.recipe import Recipe, make_recipe
from server.worker.verification import Judgement, Verdict, draft_stream, verify_coupled, verify_sampled

REJECTION, BLOCK = VerifyMode.REJECTION, VerifyMode.BLOCK


def test_without_drafts_a_span_gives_its_one_sample() -> None:
    assert verify_coupled([7], []) == Verdict((7,), (0,))
    assert verify_coupled([7], [], (-1,)) == Verdict((7,), (0,))


def test_a_chain_is_accepted_up_to_the_first_draft_that_is_not_the_sample() -> None:
    assert verify_coupled([1, 2, 3, 4], [1, 2, 3]) == Verdict((1, 2, 3, 4), (0, 1, 2, 3))
    assert verify_coupled([1, 9, 3, 4], [1, 2, 3]) == Verdict((1, 9), (0, 1))
    assert verify_coupled([9, 2, 3, 4], [1, 2, 3]) == Verdict((9,), (0,))


def test_a_tree_is_followed_along_the_branch_that_the_samples_take() -> None:
    # 0 -> 1 (token 5), 2 (token 6); 1 -> 3 (token 7); 2 -> 4 (token 8); 4 -> 5 (token 5)
    parents, drafts = (-1, 0, 0, 1, 2, 4), [5, 6, 7, 8, 5]
    assert verify_coupled([6, 0, 8, 0, 5, 3], drafts, parents) == Verdict((6, 8, 5, 3), (0, 2, 4, 5))
    assert verify_coupled([5, 9, 0, 0, 0, 0], drafts, parents) == Verdict((5, 9), (0, 1))
    assert verify_coupled([8, 9, 0, 0, 0, 0], drafts, parents) == Verdict((8,), (0,))


def test_a_row_that_failed_ends_the_path_and_is_its_last_row() -> None:
    assert verify_coupled([1, -1, 3], [1, 2]) == Verdict((1, -1), (0, 1))
    assert verify_coupled([1, -1, 3], [1, 2], (-1, 0, 1)) == Verdict((1, -1), (0, 1))


def test_a_chain_written_as_a_tree_gives_the_same_verdict() -> None:
    generator = random.Random(5)
    for _ in range(300):
        num_drafts = generator.randrange(6)
        drafts = [generator.randrange(2) for _ in range(num_drafts)]
        samples = [generator.randrange(2) for _ in range(num_drafts + 1)]
        parents = tuple(range(-1, num_drafts))
        assert verify_coupled(samples, drafts, parents) == verify_coupled(samples, drafts)


def test_the_text_is_that_of_plain_decoding_whatever_is_drafted() -> None:
    generator = random.Random(1)

    def target(text: Sequence[int]) -> int:  # the keyed sample: a function of the text before it
        return hash((3, *text[-3:])) % 4

    plain = [0]
    while len(plain) < 400:
        plain.append(target(plain))
    for tree in (False, True):
        text, num_steps = [0], 0
        while len(text) < 400:
            num_drafts = generator.randrange(8)
            parents = [-1] + [generator.randrange(row) if tree else row - 1 for row in range(1, num_drafts + 1)]
            drafts = [generator.randrange(4) for _ in range(num_drafts)]
            contexts: list[list[int]] = [[]]
            for row in range(1, num_drafts + 1):
                contexts.append([*contexts[parents[row]], drafts[row - 1]])
            samples = [target(text + context) for context in contexts]
            verdict = verify_coupled(samples, drafts, tuple(parents) if tree else ())
            assert contexts[verdict.path[-1]] == list(verdict.tokens[:-1])
            text += verdict.tokens
            num_steps += 1
        assert text[:400] == plain
        assert num_steps < 395, "some drafts were accepted, or this showed nothing"


def test_of_two_children_with_the_same_token_the_first_is_taken() -> None:
    assert verify_coupled([4, 5, 6, 7], [4, 4, 6], (-1, 0, 0, 2)) == Verdict((4, 5), (0, 1))


def recipe(seed: int = 0, temperature: float = 1.0) -> Recipe:
    return make_recipe(Request("r", (0,), 8, Sampling(temperature=temperature, seed=seed)), ())


def crowd(seed: int) -> tuple[Tensor, list[Judgement]]:
    """Spans of every kind in one step, and their logits over 12 tokens, some banned."""
    generator = torch.Generator().manual_seed(seed)
    judgements = []
    shapes: list[tuple[int, ...]] = [(), (-1, 0, 0, 1), (-1, 0, 0, 0, 2), (), (), (-1,), ()]
    for index, parents in enumerate(shapes):
        num_drafts = len(parents) - 1 if parents else index
        mode = REJECTION if parents or index % 2 else BLOCK
        drafts = torch.randint(0, 12, (num_drafts,), generator=generator).tolist()
        q = torch.softmax(torch.randn(num_drafts, 12, generator=generator), 1)
        one = Judgement(
            drafts, mode, recipe(index, 0.0 if index == 3 else 0.8), index * 5, parents, q if index % 3 else None
        )
        judgements.append(one)
    logits = torch.randn(sum(1 + len(one.drafts) for one in judgements), 12, generator=generator) * 2
    logits[:, 4] = float("-inf")
    return logits, judgements


def test_a_verdict_is_the_same_alone_in_a_crowd_and_a_second_time_and_leaves_the_logits() -> None:
    for seed in range(10):
        logits, judgements = crowd(seed)
        before = logits.clone()
        together = verify_sampled(ReferenceOps(), logits, judgements)
        assert together == verify_sampled(ReferenceOps(), logits, judgements)
        assert torch.equal(logits, before)
        first = 0
        for judgement, verdict in zip(judgements, together, strict=True):
            rows = logits[first : first + 1 + len(judgement.drafts)]
            assert verify_sampled(ReferenceOps(), rows, [judgement]) == [verdict]
            assert 4 not in verdict.tokens, "it is banned"
            first += len(rows)


def test_nothing_to_verify_is_legal() -> None:
    assert verify_sampled(ReferenceOps(), torch.empty(0, 5), []) == []


@pytest.mark.parametrize("mode", [REJECTION, BLOCK])
@pytest.mark.parametrize("with_q", [True, False])
def test_at_temperature_zero_every_mode_gives_the_coupled_verdict(mode: VerifyMode, with_q: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    greedy = recipe(temperature=0.0)
    seen = set()
    for _ in range(60):
        logits = torch.randn(4, 3, generator=generator)
        logits[0, 1] = logits[0, 2]  # ties go to the lowest id, as in plain decoding
        drafts = torch.randint(0, 3, (3,), generator=generator).tolist()
        q = torch.softmax(torch.randn(3, 3, generator=generator), 1) if with_q else None
        [verdict] = verify_sampled(ReferenceOps(), logits, [Judgement(drafts, mode, greedy, 0, (), q)])
        assert verdict == verify_coupled(logits.argmax(1).tolist(), drafts)
        seen.add(len(verdict.tokens))
    assert seen == {1, 2, 3, 4}


def test_certain_drafts_are_all_accepted_and_banned_ones_never() -> None:
    logits = torch.full((3, 5), float("-inf"))
    logits[0, 1] = logits[1, 2] = logits[2, 3] = 0.0
    for mode in (REJECTION, BLOCK):
        sure, banned, unknown = (
            verify_sampled(ReferenceOps(), logits, [Judgement(drafts, mode, recipe(), 7)])[0]
            for drafts in ([1, 2], [1, 4], [-1, 2])
        )
        assert sure == Verdict((1, 2, 3), (0, 1, 2))
        assert banned == Verdict((1, 2), (0, 1))
        assert unknown == Verdict((1,), (0,))


@pytest.mark.parametrize("is_nan", [True, False], ids=["not a number", "named as failed"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_failed_row_ends_the_path_and_gives_no_token(temperature: float, is_nan: bool) -> None:
    logits = torch.full((5, 5), -30.0)
    logits[[0, 1, 2, 3, 4], [1, 2, 3, 0, 4]] = 30.0
    if is_nan:
        logits[1] = float("nan")
    chain = Judgement([1, 2, 3], REJECTION, recipe(temperature=temperature), 0)
    plain = Judgement([], REJECTION, recipe(temperature=temperature), 0)
    verdicts = verify_sampled(ReferenceOps(), logits, [chain, plain], failed=() if is_nan else (1,))
    assert verdicts == [Verdict((1, -1), (0, 1)), Verdict((4,), (0,))]


def test_what_cannot_be_verified_is_refused() -> None:
    ops, logits = ReferenceOps(), torch.zeros(3, 5)
    tree = Judgement([1, 2], BLOCK, recipe(), 0, (-1, 0, 0))
    for judgement, message in [
        (tree, "tree cannot be verified in block mode"),
        (Judgement([1, 2], VerifyMode.COUPLED, recipe(), 0), "'coupled'"),
        (Judgement([1, 2], REJECTION, recipe(), 0, (), torch.ones(3, 5) / 5), r"shape \[3, 5\]; \(2, 5\)"),
        (Judgement([1], REJECTION, recipe(), 0), "2 rows, but 3 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            verify_sampled(ops, logits, [judgement])
    as_chain = dataclasses.replace(recipe(), seed=4)
    in_words = verify_sampled(ops, logits, [Judgement([1, 2], BLOCK, as_chain, 0, (-1, 0, 1))])
    assert in_words == verify_sampled(ops, logits, [Judgement([1, 2], BLOCK, as_chain, 0)])


def test_no_two_draws_of_a_span_share_a_stream() -> None:
    streams = [draft_stream(node, draw) for node in range(64) for draw in range(8)]
    assert len({0, 1, 2, *streams}) == 3 + len(streams)
