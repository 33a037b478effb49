"""Spans and outcomes of one autoregressive sequence."""

from __future__ import annotations

import pytest

from scheduler.decoding.autoregressive import Autoregressive
from scheduler.decoding.base import BadOutcome, News
from scheduler.sequence import Sequence
from scheduler.types import FinishReason, Outcome, Read, Request, Sampling, Span, TokenLogprob
from tests.scheduler.worlds import make_request


def start(request: Request, max_model_len: int = 100) -> tuple[Sequence, Autoregressive]:
    seq = Sequence(request, (0, 1), 0.0, [*request.prompt, *request.output])
    seq.seq_id = 7
    seq.prefill_end = len(seq.tokens)
    seq.decoding = machine = Autoregressive(seq, max_model_len)
    return seq, machine


def answer(*tokens: int, logprobs: int = 0) -> Outcome:
    return Outcome(7, tokens, prompt_logprobs=tuple(TokenLogprob(n, -1.0, 1) for n in range(logprobs)))


def test_a_prompt_is_cut_into_chunks_and_only_its_last_row_is_judged() -> None:
    seq, machine = start(make_request("a", (5, 6, 7), max_tokens=2))
    first = machine.next_span(2)
    assert first == Span(7, (5, 6), 0, 2, 1, (), Read.NOTHING)
    assert machine.absorb(first, answer()) == News()
    second = machine.next_span(2)
    assert second == Span(7, (7,), 2, 3, 1, (0,), Read.SAMPLE)
    assert machine.absorb(second, answer(9)) == News((9,))
    assert machine.next_span(1) == Span(7, (9,), 3, 4, 1, (0,), Read.SAMPLE)
    assert seq.num_committed == 3


def test_asking_for_a_span_twice_gives_the_same_span() -> None:
    _, machine = start(make_request("a", 9))
    assert machine.next_span(4) == machine.next_span(4)


def test_a_stop_id_ends_the_output_and_is_part_of_it() -> None:
    seq, machine = start(make_request("a", 2, max_tokens=5, stop_ids=(9, 8)))
    assert machine.absorb(machine.next_span(9), answer(8)) == News((8,))
    assert (seq.finish_reason, seq.stop_id) == (FinishReason.STOP, 8)


def test_a_stop_id_at_the_last_allowed_token_is_a_stop() -> None:
    seq, machine = start(make_request("a", 2, max_tokens=1, stop_ids=(8,)))
    machine.absorb(machine.next_span(9), answer(8))
    assert seq.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(1, 100), (50, 3)])
def test_output_ends_at_max_tokens_and_at_the_context(max_tokens: int, max_model_len: int) -> None:
    seq, machine = start(make_request("a", 2, max_tokens=max_tokens), max_model_len)
    machine.absorb(machine.next_span(9), answer(8))
    assert seq.finish_reason is FinishReason.LENGTH
    assert seq.stop_id is None


def test_output_from_before_a_restart_is_prefilled_and_counted() -> None:
    seq, machine = start(make_request("a", (1, 2), max_tokens=4, output=(3, 4)))
    span = machine.next_span(9)
    assert span.tokens == (1, 2, 3, 4)
    assert span.judged == (3,)
    machine.absorb(span, answer(5))
    assert seq.finish_reason is None
    machine.absorb(machine.next_span(9), answer(6))
    assert seq.finish_reason is FinishReason.LENGTH


def test_zero_tokens_judge_nothing_and_end_with_the_prompt() -> None:
    seq, machine = start(make_request("a", 3, max_tokens=0))
    span = machine.next_span(9)
    assert (span.judged, span.read) == ((), Read.NOTHING)
    assert machine.absorb(span, answer()) == News()
    assert seq.finish_reason is FinishReason.LENGTH


def test_prompt_logprobs_judge_every_row_that_predicts_a_prompt_token() -> None:
    sampling = Sampling(prompt_logprobs=2)
    _, machine = start(make_request("a", 5, max_tokens=1, sampling=sampling))
    first = machine.next_span(3)
    assert (first.judged, first.read) == ((0, 1, 2), Read.SAMPLE)
    assert len(machine.absorb(first, answer(logprobs=3)).prompt_logprobs) == 3
    second = machine.next_span(3)
    # Row 0 predicts the last prompt token, row 1 the first output token.
    assert second.judged == (0, 1)
    assert len(machine.absorb(second, answer(9, logprobs=1)).prompt_logprobs) == 1
    assert not machine.judges_prompt
    _, machine = start(make_request("a", 5, max_tokens=0, sampling=sampling))
    assert machine.next_span(9).judged == (0, 1, 2, 3)


def test_prompt_logprobs_that_are_out_are_not_repeated_after_a_preemption() -> None:
    seq, machine = start(make_request("a", 6, max_tokens=1, sampling=Sampling(prompt_logprobs=0)))
    machine.absorb(machine.next_span(3), answer(logprobs=3))
    seq.num_committed = 0
    machine.restart()
    news = machine.absorb(machine.next_span(5), answer(logprobs=5))
    assert [entry.token for entry in news.prompt_logprobs] == [3, 4]


@pytest.mark.parametrize("bad", [answer(), answer(1, 2), answer(1, logprobs=1)])
def test_an_outcome_with_the_wrong_number_of_answers_changes_nothing(bad: Outcome) -> None:
    seq, machine = start(make_request("a", 4, sampling=Sampling(prompt_logprobs=0)))
    with pytest.raises(BadOutcome, match="due"):
        machine.absorb(machine.next_span(9), bad)
    assert seq.num_committed == 0
    assert len(seq.tokens) == 4
