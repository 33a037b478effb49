"""The state machine of a bidirectional request, driven by a model made of hashes (canvas_worker.py)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import pytest

from scheduler.decoding.base import BadOutcome
from scheduler.hashing import mix
from scheduler.policies import make_diffusion
from scheduler.types import (
    MASK_ALL,
    Denoised,
    EosRule,
    FinishReason,
    Outcome,
    Read,
    Request,
    Topology,
)
from tests.scheduler.canvas_worker import (
    MASK,
    Keys,
    Run,
    choose,
    diffusion,
    digest,
    logprob,
    model,
    request,
    with_output,
)

CACHED = ("prefix", "dual", "vicinity", "dsb", "dkv_decode", "dkv_greedy", "elastic")


def llada(run: Run, random_order: bool = False) -> list[int]:
    """The canvas as LLaDA fills it, one token a step, block by block: written from the paper's loop."""
    asked = run.request.decoding
    assert asked is not None
    prompt, size = list(run.request.prompt), asked.block_size or run.diffusion.block_size
    length = -(-run.request.max_tokens // size) * size
    canvas = prompt + [MASK] * min(length, run.max_model_len - len(prompt))
    for lo in range(len(prompt), len(canvas), size):
        while any(token == MASK for token in canvas[lo : lo + size]):
            first = [mix(token, row) for row, token in enumerate(canvas)]
            seen = digest(first)
            context = digest([mix(own, seen) for own in first])
            block = [p for p in range(lo, min(lo + size, len(canvas))) if canvas[p] == MASK]
            if random_order:
                key = {p: order_key(run.request, p - len(prompt)) for p in block}
                best = min(block, key=key.__getitem__)
            else:
                best = max(block, key=lambda p: (choose(context, p, run.request)[1], -p))
            canvas[best] = choose(context, best, run.request)[0]
    return canvas


def order_key(asked: Request, number: int) -> bytes:
    word = struct.pack("<qqq", asked.sampling.seed, asked.sampling.sample_index, number)
    return hashlib.blake2b(word, digest_size=8).digest()


@pytest.mark.parametrize("prompt", [1, 4, 5])
@pytest.mark.parametrize("max_tokens", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("policy", ["low_confidence", "random"])
def test_without_a_cache_the_text_is_lladas(policy: str, max_tokens: int, prompt: int) -> None:
    run = Run(request(diffusion(policy), prompt, max_tokens)).finish()
    right = llada(run, policy == "random")[prompt : prompt + max_tokens]
    assert list(run.tokens) == right
    assert run.seq.finish_reason is FinishReason.LENGTH
    assert len(run.logprobs) == max_tokens
    assert all(span.mask_block == MASK_ALL and span.start == 0 for span in run.spans)
    assert (run.forwards, run.rows) == (len(run.spans), sum(len(span.tokens) for span in run.spans))


def test_a_block_that_the_context_cuts_short_is_shorter() -> None:
    run = Run(request(diffusion(), 5, 10), max_model_len=12).finish()
    assert len(run.tokens) == 7
    assert run.seq.finish_reason is FinishReason.LENGTH
    assert {span.kv_len for span in run.spans} == {12}


def test_gen_length_is_the_canvas_whatever_max_tokens_says() -> None:
    short = Run(request(diffusion(gen_length=12), max_tokens=3)).finish()
    long = Run(request(diffusion(gen_length=12), max_tokens=12)).finish()
    beyond = Run(request(diffusion(gen_length=12), max_tokens=40)).finish()
    assert short.tokens == long.tokens[:3]
    assert beyond.tokens == long.tokens
    assert {span.kv_len for span in short.spans} == {17}


@pytest.mark.parametrize("cache", CACHED)
def test_each_cache_computes_fewer_rows_and_ends_the_same_way(cache: str) -> None:
    policy = "random" if cache == "dkv_greedy" else "low_confidence"
    planner = "dsb" if cache == "dsb" else "fixed"
    plain = Run(request(diffusion(policy, planner=planner), max_tokens=16)).finish()
    values = {"vicinity": {"margin": 1, "warm_up": 1}, "elastic": {"width": 2}, "dsb": {"cache.prefix": 1}}.get(cache)
    cached = Run(request(diffusion(policy, cache, planner=planner, values=values), max_tokens=16)).finish()
    assert len(cached.tokens) == len(plain.tokens) == 16
    assert cached.forwards == plain.forwards, "the cache changes no number of steps of a fixed schedule"
    assert cached.rows < plain.rows
    assert len(cached.spans[0].tokens) == cached.spans[0].kv_len, "the first step computes all rows"
    assert MASK not in cached.tokens


ALWAYS_FRESH = [
    ("dkv_decode", "low_confidence", {"refresh": 1}),
    ("dkv_greedy", "random", {"refresh": 1}),
    ("dkv_greedy", "random", {"window": 100}),
    ("vicinity", "low_confidence", {"warm_up": 256}),
    ("vicinity", "low_confidence", {"margin": 1000}),
    ("dual", "threshold", {"threshold": 0.0}),
    ("prefix", "threshold", {"threshold": 0.0}),
]


@pytest.mark.parametrize(("cache", "policy", "values"), ALWAYS_FRESH)
@pytest.mark.parametrize("shift", [0, 1])
def test_a_cache_that_refreshes_every_step_is_none(
    cache: str, policy: str, values: dict[str, float], shift: int
) -> None:
    own = {key: value for key, value in values.items() if key == "threshold"}
    plain = Run(request(diffusion(policy, values=own), max_tokens=13), model(shift=shift)).finish()
    cached = Run(request(diffusion(policy, cache, values=values), max_tokens=13), model(shift=shift)).finish()
    assert cached.tokens == plain.tokens
    assert cached.spans == plain.spans
    assert cached.logprobs == plain.logprobs


@pytest.mark.parametrize("cache", ["prefix", "dual", "vicinity", "elastic", "dsb"])
def test_after_a_refresh_with_nothing_changed_a_step_sees_what_a_full_one_sees(cache: str) -> None:
    planner, values = "dsb" if cache == "dsb" else "fixed", {"warm_up": 0} if cache == "vicinity" else None
    asked = diffusion(cache=cache, planner=planner, values=values)
    run = Run(request(asked, max_tokens=16))
    run.step()
    for _ in range(3):
        span = run.machine.next_span(1)
        full = Keys()
        everything = span._replace(start=0, positions=(), tokens=tuple(run.machine._canvas.tokens))
        context = full.run(everything)
        run.keys = Keys(list(full.first), list(full.second))  # as a refresh leaves them
        assert run.keys.run(span) == context
        run.step()


@pytest.mark.parametrize("policy", ["low_confidence", "random", "threshold", "entropy", "sequential"])
@pytest.mark.parametrize("at", range(12))
def test_a_preemption_at_any_step_changes_no_token_without_a_cache(policy: str, at: int) -> None:
    asked = diffusion(policy, values={"threshold": 0.8} if policy == "threshold" else None)
    plain = Run(request(asked, max_tokens=11)).finish()
    run = Run(request(asked, max_tokens=11))
    for _ in range(at):
        if run.seq.finish_reason is None:
            run.step()
    run.preempt()
    run.finish()
    assert (run.tokens, run.forwards, run.logprobs) == (plain.tokens, plain.forwards, plain.logprobs)


@pytest.mark.parametrize("cache", CACHED)
@pytest.mark.parametrize("at", range(0, 16, 3))
def test_with_a_cache_a_preemption_goes_back_to_the_last_step_of_all_rows(cache: str, at: int) -> None:
    policy = "random" if cache == "dkv_greedy" else "low_confidence"
    asked = diffusion(policy, cache, values={"dkv_decode": {"refresh": 3}, "dsb": {"cache.prefix": 1}}.get(cache))
    plain = Run(request(asked, max_tokens=16)).finish()
    run = Run(request(asked, max_tokens=16))
    for _ in range(at):
        run.step()
    run.preempt()
    span = run.machine.next_span(1)
    assert len(span.tokens) == span.kv_len
    run.finish()
    assert run.tokens == plain.tokens
    assert run.logprobs == plain.logprobs
    assert run.forwards >= plain.forwards, "steps that are done again are counted again"


@pytest.mark.parametrize("cache", ["none", "dual", "dkv_decode"])
@pytest.mark.parametrize("num_out", range(10))
def test_a_request_that_is_sent_again_emits_only_what_was_not_out(cache: str, num_out: int) -> None:
    asked = request(diffusion(cache=cache), max_tokens=10)
    plain = Run(asked).finish()
    again = Run(with_output(asked, plain.tokens[:num_out])).finish()
    assert plain.tokens[:num_out] + again.tokens == plain.tokens
    assert again.logprobs == plain.logprobs[num_out:]
    assert again.seq.finish_reason is plain.seq.finish_reason


def test_what_a_client_has_stands_where_a_replay_would_choose_otherwise() -> None:
    asked = request(diffusion(), max_tokens=10)
    plain = Run(asked).finish()
    other = 1 + plain.tokens[1] % 18
    again = Run(with_output(asked, (plain.tokens[0], other))).finish()
    assert again.machine._canvas.tokens[5:7] == [plain.tokens[0], other]
    assert len(again.tokens) == 8


@pytest.mark.parametrize("place", range(6))
def test_a_stop_token_ends_the_text_once_everything_left_of_it_is_fixed(place: int) -> None:
    plain = Run(request(diffusion(), max_tokens=12)).finish()
    stop = plain.tokens[place]
    first = plain.tokens.index(stop)
    run = Run(request(diffusion(), max_tokens=12, stop_ids=(stop,))).finish()
    assert run.tokens == plain.tokens[: first + 1]
    assert (run.seq.finish_reason, run.seq.stop_id) == (FinishReason.STOP, stop)
    assert run.forwards <= plain.forwards


def test_the_text_never_retracts_and_holds_no_mask() -> None:
    run = Run(request(diffusion("random"), max_tokens=12))
    seen: tuple[int, ...] = ()
    while run.seq.finish_reason is None:
        run.step()
        assert run.tokens[: len(seen)] == seen
        assert MASK not in run.tokens
        canvas = run.machine._canvas.tokens[5:17]
        assert len(run.tokens) == next((i for i, token in enumerate(canvas) if token == MASK), 12)
        seen = run.tokens


def test_threshold_zero_takes_one_step_a_block_and_two_one_token_a_step() -> None:
    fast = Run(request(diffusion("threshold", values={"threshold": 0.0}), max_tokens=12)).finish()
    slow = Run(request(diffusion("threshold", values={"threshold": 2.0}), max_tokens=12)).finish()
    assert (fast.forwards, slow.forwards) == (3, 12)
    assert slow.tokens == Run(request(diffusion(), max_tokens=12)).finish().tokens


def test_dsb_with_a_window_of_one_block_slides_from_left_to_right() -> None:
    run = Run(request(diffusion("sequential", planner="dsb", values={"first": 4, "most": 4}), max_tokens=8))
    windows = []
    while run.seq.finish_reason is None:
        span = run.machine.next_span(1)
        assert span.denoise is not None
        windows.append(span.denoise.window)
        position = span.denoise.window[0]
        run.take(span, Outcome(1, (9,), (logprob(0, 0, 9),), denoised=Denoised((position,))))
    assert windows == [(5 + i, min(9 + i, 13)) for i in range(8)]


def test_the_window_of_masks_holds_the_first_ones_wherever_they_are() -> None:
    run = Run(request(diffusion("random", planner="masks", values={"width": 3}), max_tokens=8))
    while run.seq.finish_reason is None:
        span = run.machine.next_span(1)
        assert span.denoise is not None
        first, end = span.denoise.window
        masks = [p for p in range(5, 13) if run.machine._canvas.tokens[p] == MASK]
        assert [p for p in range(first, end) if run.machine._canvas.tokens[p] == MASK] == masks[:3]
        run.step()


def test_adablock_ends_the_block_at_the_delimiter_the_worker_found() -> None:
    run = Run(request(diffusion("adablock", planner="adablock"), max_tokens=16))
    span = run.machine.next_span(1)
    assert span.denoise is not None
    assert span.denoise.window == (5, 9)
    run.take(span, Outcome(1, (9,), (logprob(0, 0, 9),), denoised=Denoised((6,), window_end=7)))
    span = run.machine.next_span(1)
    assert span.denoise is not None
    assert span.denoise.window == (5, 7)
    run.take(span, Outcome(1, (8,), (logprob(0, 0, 8),), denoised=Denoised((5,))))
    span = run.machine.next_span(1)
    assert span.denoise is not None
    assert span.denoise.window == (7, 11), "the next block starts behind the delimiter, with the default length"


def test_an_end_that_is_predicted_shortens_the_canvas() -> None:
    run = Run(request(diffusion("learn2pd", stopper="eotp"), max_tokens=16))
    span = run.machine.next_span(1)
    assert span.judged == (5, 6, 7, 8), "the filter wants to see every position of the block"
    run.take(span, Outcome(1, (9,), (logprob(0, 0, 9),), denoised=Denoised((5,), end=7)))
    span = run.machine.next_span(1)
    assert (span.kv_len, len(span.tokens)) == (7, 7)
    assert span.denoise is not None
    assert span.denoise.window == (5, 7)
    run.take(span, Outcome(1, (8,), (logprob(0, 0, 8),), denoised=Denoised((6,))))
    assert (run.tokens, run.seq.finish_reason, run.seq.stop_id) == ((9, 8), FinishReason.STOP, None)


def test_prophet_may_fill_all_masks_at_once() -> None:
    run = Run(request(diffusion("prophet", stopper="prophet"), max_tokens=8))
    run.step()
    span = run.machine.next_span(1)
    masks = [p for p in range(5, 13) if run.machine._canvas.tokens[p] == MASK]
    assert [span.start + offset for offset in span.judged] == masks
    assert span.denoise is not None
    assert 0 < span.denoise.progress < 1
    logprobs = tuple(logprob(0, p, 7) for p in masks)
    run.take(span, Outcome(1, (7,) * 7, logprobs, denoised=Denoised(tuple(masks))))
    assert (len(run.tokens), run.forwards) == (8, 2)


@pytest.mark.parametrize("others", [{"eos": EosRule.LAST}, {"stopper": "prophet"}, {"planner": "adablock"}])
def test_a_random_order_is_not_drawn_beforehand_where_all_masks_are_looked_at(others: dict[str, Any]) -> None:
    drawn = Run(request(diffusion("random"), max_tokens=16)).machine.next_span(1)
    seen = Run(request(diffusion("random", **others), max_tokens=16)).machine.next_span(1)
    assert (len(drawn.judged), len(seen.judged)) == (1, 16 if "stopper" in others else 4)


def test_edits_go_on_until_a_step_changes_nothing() -> None:
    asked = replace(diffusion(), selector=make_diffusion("llada2_edit", Topology.BLOCK_CAUSAL).selector)
    run = Run(request(asked, max_tokens=4))
    pairs = [((5, 6, 7, 8), (1, 2, 3, 4)), ((6,), (9,)), ((6,), (8,)), ((), ())]
    for number, (positions, tokens) in enumerate(pairs):
        assert run.tokens == (), "an edited block is emitted when it is over"
        span = run.machine.next_span(1)
        assert span.judged == (5, 6, 7, 8)
        logprobs = tuple(logprob(number, p, t) for p, t in zip(positions, tokens, strict=True))
        run.take(span, Outcome(1, tokens, logprobs, denoised=Denoised(positions)))
    assert run.tokens == (1, 8, 3, 4)
    assert run.logprobs[1] == logprob(2, 6, 8), "the value at the last change"


def test_the_number_of_edits_has_a_bound() -> None:
    selector = make_diffusion("llada2_edit", Topology.BLOCK_CAUSAL, values={"max_post_edits": 3}).selector
    run = Run(request(replace(diffusion(), selector=selector), max_tokens=4))
    while run.seq.finish_reason is None:
        masks = [p for p in range(5, 9) if run.machine._canvas.tokens[p] == MASK]
        positions = tuple(masks) or (6,)
        tokens = tuple(1 + (run.forwards + len(run.spans)) % 5 for _ in positions)
        logprobs = tuple(logprob(0, p, 1) for p in positions)
        run.take(run.machine.next_span(1), Outcome(1, tokens, logprobs, denoised=Denoised(positions)))
    assert run.forwards == 4


BAD = [
    (Outcome(1), "did not say"),
    (Outcome(1, (7,), (), denoised=Denoised((5,))), "logprobs"),
    (Outcome(1, (7,), denoised=Denoised(())), "tokens for positions"),
    (Outcome(1, (), denoised=Denoised(())), "fixed 0 masks"),
    (Outcome(1, (7,), (logprob(0, 0, 7),), denoised=Denoised((4,))), "not judged"),
    (Outcome(1, (MASK,), (logprob(0, 0, 7),), denoised=Denoised((5,))), "fixed 0 masks"),
    (Outcome(1, (7, 7), (logprob(0, 0, 7),) * 2, denoised=Denoised((6, 5))), "tokens for positions"),
    (Outcome(1, (7,), (logprob(0, 0, 7),), denoised=Denoised((5,), end=5)), "before its first mask"),
]


@pytest.mark.parametrize(("outcome", "message"), BAD)
def test_an_outcome_that_does_not_answer_changes_nothing(outcome: Outcome, message: str) -> None:
    run = Run(request(diffusion(), max_tokens=8))
    span = run.machine.next_span(1)
    with pytest.raises(BadOutcome, match=message):
        run.machine.absorb(span, outcome)
    assert run.machine.next_span(1) == span
    assert run.finish().tokens == Run(request(diffusion(), max_tokens=8)).finish().tokens


def test_snapshots_show_the_block_with_its_masks() -> None:
    run = Run(request(diffusion(snapshots=True), max_tokens=8))
    span = run.machine.next_span(1)
    news = run.machine.absorb(span, Outcome(1, (7,), (logprob(0, 0, 7),), denoised=Denoised((6,))))
    assert news.tokens == ()
    assert news.snapshot is not None
    assert (news.snapshot.start, news.snapshot.tokens, news.snapshot.step) == (5, (MASK, 7, MASK, MASK), 1)
    assert news.decoding is not None


def test_nothing_is_committed_and_nothing_is_shared() -> None:
    run = Run(request(diffusion(cache="dual"), max_tokens=12))
    while run.seq.finish_reason is None:
        machine = run.machine
        assert (machine.most_cached, machine.reach, machine.is_denoising) == (0, 17, True)
        assert run.seq.num_committed == 0
        run.step()
    assert all(span.read is Read.DENOISE for span in run.spans)
