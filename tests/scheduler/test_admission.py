"""What `add` refuses, with words that name the field, the value and the limit."""

from __future__ import annotations

import pytest

from scheduler.admission import refuse_impossible
from scheduler.policies import make_diffusion
from scheduler.scheduler import Scheduler
from scheduler.types import (
    Attention,
    AttentionMethod,
    AttentionOffer,
    Fault,
    Limits,
    Request,
    Speculation,
    Topology,
)
from tests.scheduler.worlds import World, make_limits, make_request


def fault_of(limits: Limits, request: Request) -> Fault:
    fault = Scheduler(limits).add(request, 0.0)
    assert fault is not None
    return fault


def test_a_prompt_that_leaves_no_room_for_output_is_refused_in_the_words_clients_know() -> None:
    fault = fault_of(make_limits(max_model_len=10), make_request("a", 10, max_tokens=3))
    assert fault.status == 400
    assert fault.message.startswith(
        "This model's maximum context length is 10 tokens. However, you requested 13 tokens"
    )


def test_a_prompt_as_long_as_the_context_may_be_evaluated() -> None:
    world = World(make_limits(max_model_len=10))
    world.add(make_request("a", 10, max_tokens=0))
    world.finish()


def test_output_ends_where_the_context_ends() -> None:
    world = World(make_limits(max_model_len=10))
    world.add(make_request("a", 8, max_tokens=100))
    world.finish()
    assert len(world.stories["a"].tokens) == 2


def test_a_request_that_can_never_fit_the_pool_is_refused_and_one_that_just_fits_runs() -> None:
    limits = make_limits(num_pages=4, page_size=4, max_model_len=64)
    fault = fault_of(limits, make_request("a", 10, max_tokens=8))
    assert fault.status == 400
    assert "KV cache holds 16" in fault.message
    world = World(limits)
    world.add(make_request("a", 10, max_tokens=7))
    world.finish()
    assert len(world.stories["a"].tokens) == 7


def test_an_empty_prompt_a_negative_length_and_a_finished_output_are_refused() -> None:
    limits = make_limits()
    assert fault_of(limits, make_request("a", ())).param == "prompt"
    assert fault_of(limits, make_request("a", 3, max_tokens=-1)).param == "max_tokens"
    assert "2 tokens already" in fault_of(limits, make_request("a", 3, max_tokens=2, output=(1, 2))).message


def test_a_second_request_with_the_same_id_is_refused() -> None:
    scheduler = Scheduler(make_limits())
    assert scheduler.add(make_request("a"), 0.0) is None
    fault = scheduler.add(make_request("a"), 0.0)
    assert fault is not None
    assert fault.status == 400


def test_the_queue_is_bounded_beyond_the_seats() -> None:
    scheduler = Scheduler(make_limits(max_seqs=2, max_queued_requests=3))
    faults = [scheduler.add(make_request(f"r{number}"), 0.0) for number in range(6)]
    assert faults[:5] == [None] * 5
    assert faults[5] is not None
    assert faults[5].status == 429


def test_queued_tokens_are_bounded_but_a_long_prompt_alone_is_let_in() -> None:
    scheduler = Scheduler(make_limits(max_queued_tokens=20))
    assert scheduler.add(make_request("long", 30), 0.0) is None
    fault = scheduler.add(make_request("b", 1), 0.0)
    assert fault is not None
    assert fault.status == 429
    scheduler.schedule(0.0)
    assert scheduler.add(make_request("b", 20), 0.0) is None


def test_a_resubmitted_request_is_never_refused_for_the_queue() -> None:
    scheduler = Scheduler(make_limits(max_seqs=1, max_queued_requests=1, max_queued_tokens=1))
    assert scheduler.add(make_request("a"), 0.0) is None
    assert scheduler.add(make_request("b", output=(1,)), 0.0) is None
    assert scheduler.add(make_request("c", output=(1,)), 0.0) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_seqs", 100), ("page_size", 0), ("max_prefill_share", 0.0), ("watermark_pages", -1), ("tbt_slo_s", 0.0)],
)
def test_limits_under_which_the_rules_cannot_be_kept_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Scheduler(make_limits(**{field: value}))  # type: ignore[arg-type]


QUEST, LIMITS = AttentionMethod.QUEST, make_limits()


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (Request("a", (1,), 4, attention=Attention(QUEST, 159)), "attention.budget", "needs at least 160"),
        (Request("a", (1,), 4, attention=Attention(AttentionMethod.TIDAL, 999)), "attention.method", "dense and quest"),
        (
            Request("a", (1,), 4, attention=Attention(QUEST, 160), speculation=Speculation(tree=True)),
            "speculation",
            "cannot be of a tree",
        ),
        (
            Request(
                "a", (1,), 4, attention=Attention(QUEST, 160), decoding=make_diffusion("auto", Topology.BLOCK_CAUSAL)
            ),
            "attention",
            "denoised",
        ),
    ],
)
def test_sparse_attention_that_cannot_be_is_refused(request_: Request, param: str, words: str) -> None:
    fault = refuse_impossible(request_, LIMITS, (AttentionOffer(QUEST, 160),))
    assert fault is not None
    assert (fault.status, fault.param) == (400, param)
    assert words in fault.message


def test_sparse_attention_that_is_offered_is_let_in() -> None:
    offers = (AttentionOffer(QUEST, 160),)
    assert refuse_impossible(Request("a", (1,), 4, attention=Attention(QUEST, 160)), LIMITS, offers) is None
    lossless = Attention(QUEST, 160, lossless=True)
    tree = Request("a", (1,), 4, attention=lossless, speculation=Speculation(tree=True))
    assert refuse_impossible(tree, LIMITS, offers) is None
    assert refuse_impossible(tree, LIMITS) is not None
