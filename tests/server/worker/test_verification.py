"""Coupled verification: the text is the target's own, the drafts decide only how much of it comes at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

from server.worker.verification import Verdict, verify_coupled


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
