"""What may be verified of an offer, what was accepted of a span, and what a verified span does to its sequence."""

from __future__ import annotations

import pytest

from scheduler.decoding.autoregressive import Autoregressive
from scheduler.decoding.base import BadOutcome
from scheduler.decoding.drafts import accepted_path, chain_length, is_well_formed, span_parents
from scheduler.sequence import Sequence
from scheduler.types import (
    Drafts,
    FinishReason,
    Outcome,
    Read,
    Request,
    Sampling,
    Span,
    SpeculationUsage,
    TokenLogprob,
)

CHAIN = Drafts((7, 8, 9), (0.9, 0.8, 0.7), "history")
#           root 4 -> 7 -> 9,  root 4 -> 8 -> 9
TREE = Drafts((7, 8, 9, 9), (0.6, 0.4, 0.3, 0.2), "suffix", (-1, -1, 0, 1))


def decoding(drafts: Drafts | None, max_tokens: int = 20, **others: object) -> tuple[Sequence, Autoregressive]:
    """A sequence with prompt (1, 2, 3) and one output token, 4, that has `drafts` to verify."""
    seq = Sequence(Request("a", (1, 2, 3), max_tokens, **others), (0, 1), 0.0, [1, 2, 3])  # type: ignore[arg-type]
    seq.seq_id, seq.prefill_end = 7, 3
    seq.decoding = machine = Autoregressive(seq, 100)
    logprobs = (TokenLogprob(4, -1.0, 1),) if seq.request.sampling.logprobs is not None else ()
    machine.absorb(machine.next_span(9), Outcome(7, (4,), logprobs, drafts=drafts))
    return seq, machine


def test_a_span_takes_the_first_drafts_along_and_reads_every_row() -> None:
    _, machine = decoding(CHAIN)
    assert machine.next_span(1) == Span(7, (4,), 3, 4, 1, (0,), Read.SAMPLE)
    assert machine.next_span(3) == Span(7, (4, 7, 8), 3, 6, 1, (0, 1, 2), Read.VERIFY)
    assert machine.next_span(9, 5).num_drafts == 5
    assert len(machine.next_span(9).tokens) == 4


def test_a_cut_of_a_tree_is_a_tree_and_a_cut_without_a_branch_is_a_chain() -> None:
    _, machine = decoding(TREE)
    assert machine.next_span(5).parents == (-1, 0, 0, 1, 2)
    assert machine.next_span(3).parents == (-1, 0, 0)
    assert machine.next_span(2).parents == ()
    assert chain_length(TREE) == 1
    assert span_parents(Drafts((1, 2), (0.5, 0.5), "x", (-1, 0)), 2) == ()


@pytest.mark.parametrize(("max_tokens", "num_drafts"), [(2, 0), (3, 1), (4, 2), (5, 3)])
def test_drafts_that_could_not_become_output_are_left_out(max_tokens: int, num_drafts: int) -> None:
    _, machine = decoding(CHAIN, max_tokens)
    assert machine.most_drafts == max_tokens - 2
    assert len(machine.next_span(9).tokens) == 1 + num_drafts


@pytest.mark.parametrize("answer", [(5,), (7, 5), (7, 8, 5), (7, 8, 9, 5)])
def test_accepted_drafts_and_one_more_become_output(answer: tuple[int, ...]) -> None:
    seq, machine = decoding(CHAIN)
    news = machine.absorb(machine.next_span(9), Outcome(7, answer))
    assert news.tokens == answer
    assert news.speculation == SpeculationUsage(3, len(answer) - 1, 1)
    assert seq.tokens == [1, 2, 3, 4, *answer]
    # The last one has no KV yet.
    assert seq.num_committed == len(seq.tokens) - 1
    assert machine.drafts is None


@pytest.mark.parametrize("answer", [(), (8, 9), (7, 9, 5), (7, 8, 9, 5, 6), (9,) * 5])
def test_an_answer_that_does_not_follow_the_drafts_changes_nothing(answer: tuple[int, ...]) -> None:
    seq, machine = decoding(CHAIN)
    with pytest.raises(BadOutcome, match="do not follow 3 drafts"):
        machine.absorb(machine.next_span(9), Outcome(7, answer))
    assert (seq.tokens, seq.num_committed, machine.drafts) == ([1, 2, 3, 4], 3, CHAIN)


def test_a_path_of_a_tree_is_accepted_and_a_jump_between_branches_is_not() -> None:
    _, machine = decoding(TREE)
    span = machine.next_span(9)
    assert accepted_path(span, (8, 9, 1)) == (2, 4)
    assert accepted_path(span, (7, 9, 1)) == (1, 3)
    assert accepted_path(span, (5,)) == ()
    assert accepted_path(span, (9, 1)) is None
    assert accepted_path(span, (7, 9, 9, 1)) is None
    assert accepted_path(span, ()) is None


def test_what_follows_a_stop_token_never_existed() -> None:
    sampling = Sampling(logprobs=0)
    seq, machine = decoding(CHAIN, stop_ids=(8,), sampling=sampling)
    answer = (7, 8, 9, 5)
    logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in answer)
    news = machine.absorb(machine.next_span(9), Outcome(7, answer, logprobs))
    assert news.tokens == (7, 8)
    assert [entry.token for entry in news.logprobs] == [7, 8]
    assert (seq.finish_reason, seq.stop_id) == (FinishReason.STOP, 8)
    assert news.speculation == SpeculationUsage(3, 2, 1)
    assert seq.num_committed <= len(seq.tokens)


def test_a_logprob_is_due_for_each_token() -> None:
    _, machine = decoding(CHAIN, sampling=Sampling(logprobs=0))
    with pytest.raises(BadOutcome, match="0 logprobs for 2 tokens"):
        machine.absorb(machine.next_span(9), Outcome(7, (7, 5)))


def test_drafts_do_not_outlive_the_kv() -> None:
    _, machine = decoding(CHAIN)
    machine.restart()
    assert machine.drafts is None


@pytest.mark.parametrize(
    "bad",
    [
        Drafts((), (), "x"),
        Drafts((1,), (0.0,), "x"),
        Drafts((1,), (1.1,), "x"),
        Drafts((1,), (float("nan"),), "x"),
        Drafts((1, 2), (0.5,), "x"),
        Drafts((1, 2), (0.5, 0.6), "x"),
        Drafts((1, 2), (0.5, 0.4), "x", (-1,)),
        Drafts((1, 2), (0.5, 0.4), "x", (-1, 1)),
        Drafts((1, 2), (0.5, 0.4), "x", (1, -1)),
        Drafts((1,) * 64, (0.5,) * 64, "x", (-1,) * 64),
    ],
)
def test_an_offer_that_cannot_be_verified_is_told(bad: Drafts) -> None:
    assert not is_well_formed(bad)
    assert is_well_formed(CHAIN)
    assert is_well_formed(TREE)
