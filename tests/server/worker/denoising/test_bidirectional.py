"""Canvases through `Worker` without a cache against the published loops, token for token (bidirectional.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from torch import Tensor

from scheduler.decoding.canvas import DREAM_EPS
from scheduler.types import EosRule
from server.worker.denoising.learn2pd import Filter
from tests.server.worker.denoising.bidirectional import (
    MASK,
    VOCAB,
    CanvasDriver,
    Choice,
    Tiny,
    confidence,
    entropy,
    margin,
    oracle,
    request,
    surest,
)

TINY = Tiny()


def quota(steps: int) -> Choice:
    """LLaDA: the masks of a block in equal shares, the larger ones first."""
    return lambda rows, step, masks: surest(confidence, rows, masks // steps + (step < masks % steps))


def dream(score: Callable[[Tensor], float], steps: int) -> Choice:
    """Dream: the share of the masks by which t falls from 1 to eps, all in the last step; never none."""

    def choose(rows: dict[int, Tensor], step: int, masks: int) -> list[int]:
        t, s = (1 - (1 - DREAM_EPS) * at / steps for at in (step, step + 1))
        count = len(rows) if step == steps - 1 else int(len(rows) * (1 - s / t))
        return surest(score, rows, max(1, count))

    return choose


def above(tau: float) -> Choice:
    return lambda rows, step, masks: [
        p for p in rows if confidence(rows[p]) >= tau or p == surest(confidence, rows, 1)[0]
    ]


def factor(rows: dict[int, Tensor], step: int, masks: int) -> list[int]:
    """Fast-dLLM's theorem with f = 1: the largest n with (n + 1)(1 - c_n) < 1."""
    order = surest(confidence, rows, len(rows))
    count = max((n for n, p in enumerate(order, 1) if (n + 1) * (1 - confidence(rows[p])) < 1), default=1)
    return order[:count]


def localleap(rows: dict[int, Tensor], step: int, masks: int) -> list[int]:
    best = surest(confidence, rows, 1)[0]
    anchors = [p for p in rows if confidence(rows[p]) >= 0.5]
    near = [p for p in rows if confidence(rows[p]) >= 0.3 and any(abs(p - a) <= 1 for a in anchors)]
    return sorted({best, *anchors, *near})


def certain(rows: dict[int, Tensor], step: int, masks: int) -> list[int]:
    best = min(rows, key=lambda p: (entropy(rows[p]), p))
    return [p for p in rows if entropy(rows[p]) <= 1.5 or p == best]


RULES = {
    "one at a time": (partial(request), quota(4)),
    "in three steps": (partial(request, steps=3), quota(3)),
    "maskgit_plus": (partial(request, "maskgit_plus", steps=3), dream(confidence, 3)),
    "topk_margin": (partial(request, "topk_margin", steps=3), dream(margin, 3)),
    "entropy": (partial(request, "entropy", steps=3), dream(lambda probs: -entropy(probs), 3)),
    "dream, whole canvas": (
        partial(request, "entropy", steps=8, block_size=12, gen_length=12),
        dream(lambda probs: -entropy(probs), 8),
    ),
    "sequential": (partial(request, "sequential"), lambda rows, step, masks: [min(rows)]),
    "threshold": (partial(request, "threshold", values={"threshold": 0.5}), above(0.5)),
    "factor": (partial(request, "factor"), factor),
    "localleap": (
        partial(request, "localleap", values={"threshold": 0.5, "relaxed": 0.3, "radius": 1}),
        localleap,
    ),
    "entropy threshold": (partial(request, "dparallel", values={"entropy": 1.5}), certain),
}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", RULES)
def test_without_a_cache_the_text_is_the_papers(name: str, shift: int, model_type: str) -> None:
    make, choose = RULES[name]
    tiny = Tiny(model_type, shift, seed=3)
    asked = [make(prompt=1), make(prompt=9, max_tokens=11)]
    if name != "dream, whole canvas":
        asked.append(make(prompt=6, max_tokens=5))
    for one, told in zip(asked, CanvasDriver(tiny, twice=True).run(asked), strict=True):
        expected, forwards = oracle(tiny, one, choose)
        assert told.tokens == expected[: one.max_tokens]
        assert len(told.tokens) < len(expected) or told.forwards == forwards
        assert len(told.logprobs) == len(told.tokens)


def test_random_orders_are_drawn_beforehand_and_the_tokens_are_the_models() -> None:
    asked = [request("random", seed=seed, steps=2) for seed in range(4)]
    orders = set()
    for one, told in zip(asked, CanvasDriver(TINY).run(asked), strict=True):
        canvas, order = [*one.prompt, *[MASK] * 12], []
        for outcome in told.outcomes:
            assert outcome.denoised is not None
            logits = TINY.logits(canvas)
            for position, token in zip(outcome.denoised.positions, outcome.tokens, strict=True):
                assert token == int(logits[position].argmax())
                canvas[position] = token
            order.append(outcome.denoised.positions)
        assert [len(positions) for positions in order] == [2] * 6
        orders.add(tuple(order))
    assert len(orders) == 4, "each seed has an order of its own"


def test_origin_fixes_each_mask_by_chance_and_all_in_the_end() -> None:
    asked = [request("origin", seed=seed, block_size=12, gen_length=12, steps=4) for seed in range(12)]
    counts = []
    for told in CanvasDriver(TINY).run(asked):
        counts.append([len(outcome.tokens) for outcome in told.outcomes])
        assert sum(counts[-1]) == 12
        assert len(counts[-1]) <= 4
    assert len({tuple(count) for count in counts}) > 6


def test_a_canvas_shapes_the_text_and_max_tokens_only_cuts_it() -> None:
    long, cut, short = CanvasDriver(TINY).run(
        [request(gen_length=12), request(gen_length=12, max_tokens=5, seed=6), request(gen_length=8, seed=7)]
    )
    assert cut.tokens == long.tokens[:5]
    assert len(short.tokens) == 8


def test_neighbours_change_nothing() -> None:
    asked = [
        request(policy, seed=seed, temperature=seed % 2 * 0.8)
        for policy in ("origin", "threshold", "random", "entropy")
        for seed in range(2)
    ]
    alone = [CanvasDriver(TINY).run([one])[0] for one in asked]
    together = CanvasDriver(TINY).run(asked)
    assert [told.tokens for told in together] == [told.tokens for told in alone]
    assert [told.forwards for told in together] == [told.forwards for told in alone]


@pytest.mark.parametrize("policy", ["low_confidence", "random", "origin", "threshold", "auto"])
def test_a_preemption_at_every_step_changes_no_token(policy: str) -> None:
    asked = request(policy, temperature=0.9)
    (plain,) = CanvasDriver(TINY).run([asked])
    for at in range(2, plain.forwards + 1):
        (told,) = CanvasDriver(TINY).run([asked], lambda step, at=at: [0] if step == at else [])  # type: ignore[misc]
        assert told.tokens == plain.tokens
        assert told.forwards == plain.forwards
    (told,) = CanvasDriver(TINY).run([asked], lambda step: [0])
    assert told.tokens == plain.tokens, "preempted before every step"


def test_a_request_that_is_sent_again_goes_on_where_it_stopped() -> None:
    asked = request("threshold", temperature=0.7)
    (plain,) = CanvasDriver(TINY).run([asked])
    for num_out in range(12):
        (told,) = CanvasDriver(TINY).run([replace(asked, output=tuple(plain.tokens[:num_out]))])
        assert plain.tokens[:num_out] + told.tokens == plain.tokens


@pytest.mark.parametrize("place", range(5))
def test_a_stop_token_ends_the_text(place: int) -> None:
    (plain,) = CanvasDriver(TINY).run([request()])
    stop = plain.tokens[place]
    (told,) = CanvasDriver(TINY).run([request(stop_ids=(stop,))])
    assert told.tokens == plain.tokens[: plain.tokens.index(stop) + 1]
    assert told.reason == "stop"


def test_eos_may_be_kept_for_last_or_never_chosen() -> None:
    (plain,) = CanvasDriver(TINY).run([request()])
    stop = plain.tokens[3]

    def late(probs: Tensor) -> float:
        return -1.0 if int(probs.argmax()) == stop else confidence(probs)

    never, last = CanvasDriver(TINY).run(
        [request(stop_ids=(stop,), eos=EosRule.NEVER), request(stop_ids=(stop,), eos=EosRule.LAST, seed=6)]
    )
    assert stop not in never.tokens
    assert len(never.tokens) == 12
    expected, _ = oracle(TINY, last.request, lambda rows, step, masks: surest(late, rows, 1))
    assert last.tokens == expected[: expected.index(stop) + 1 if stop in expected else 12]


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 5, 12])
def test_max_tokens_at_the_edges_of_blocks(max_tokens: int) -> None:
    (told,) = CanvasDriver(TINY).run([request(max_tokens=max_tokens)])
    assert (len(told.tokens), told.reason) == (max_tokens, "length")
    assert MASK not in told.tokens
    assert all(0 <= token < VOCAB for token in told.tokens)


def test_prophet_goes_all_in_and_without_hope_is_the_baseline() -> None:
    inf = float("inf")
    gaps = {"early": inf, "middle": inf, "late": inf}
    never, plain, at_once = CanvasDriver(TINY).run(
        [
            request("prophet", stopper="prophet", values=gaps),
            request(seed=6),
            request("prophet", stopper="prophet", values=dict.fromkeys(gaps, -inf), seed=7),
        ]
    )
    assert (never.tokens, never.forwards) == (plain.tokens, plain.forwards)
    assert at_once.forwards == 1
    logits = TINY.logits([*at_once.request.prompt, *[MASK] * 12])
    assert at_once.tokens == logits[7:].argmax(-1).tolist()


def test_eotp_cuts_the_canvas_behind_a_predicted_end() -> None:
    (plain,) = CanvasDriver(TINY).run([request(max_tokens=16)])
    logits = TINY.logits([*plain.request.prompt, *[MASK] * 16])
    best = logits[7:11].argmax(-1).tolist()
    stop = best[2]
    (told,) = CanvasDriver(TINY).run([request(max_tokens=16, stopper="eotp", stop_ids=(stop,))])
    assert told.reason == "stop"
    assert told.spans[-1].kv_len < 23, "the canvas shrank"
    assert len(told.tokens) <= 4


def test_wino_masks_again_and_ends() -> None:
    values = {"wide": 0.3, "narrow": 1.0}
    revoked, kept = CanvasDriver(TINY, twice=True).run(
        [
            request("wino", values=values, max_tokens=16, block_size=8),
            request("wino", values=values | {"narrow": 0.0}, block_size=8, seed=6),
        ]
    )
    assert len(revoked.tokens) == 16
    assert MASK not in revoked.tokens
    assert any(MASK in outcome.tokens for outcome in revoked.outcomes)
    assert not any(MASK in outcome.tokens for outcome in kept.outcomes)


def test_edits_end() -> None:
    (told,) = CanvasDriver(TINY, twice=True).run([request(selector="edit", values={"edit_threshold": 0.3})])
    assert len(told.tokens) == 12
    assert MASK not in told.tokens


def identity_filter(threshold: float) -> Filter:
    """sigmoid(80 (confidence - threshold)) at each position of a block."""
    eye = np.eye(4, dtype=np.float32)
    return Filter(eye, np.zeros(4, np.float32), 80 * eye, np.full(4, -80 * threshold, np.float32))


def test_learn2pd_with_a_filter_of_confidences_is_the_threshold() -> None:
    asked = request("learn2pd", stopper="eos", values={"threshold": 0.5}, steps=4)
    (told,) = CanvasDriver(TINY, learnt=identity_filter(0.5)).run([asked])
    (plain,) = CanvasDriver(TINY).run([request("threshold", values={"threshold": 0.5})])
    assert (told.tokens, told.forwards) == (plain.tokens, plain.forwards)
    (at_once,) = CanvasDriver(TINY, learnt=identity_filter(-1.0)).run([asked])
    assert at_once.forwards == 3


def test_learn2pd_reads_a_block_that_eotp_has_cut() -> None:
    (plain,) = CanvasDriver(TINY).run([request(max_tokens=16)])
    stop = TINY.logits([*plain.request.prompt, *[MASK] * 16])[9].argmax().item()
    asked = request("learn2pd", max_tokens=16, stop_ids=(int(stop),), steps=4)
    (told,) = CanvasDriver(TINY, learnt=identity_filter(0.9)).run([asked])
    assert told.reason == "stop"
    assert len(told.tokens) < 16
