"""Approximate caches of bidirectional models through `Worker`: the identities that must hold, whatever the weights.

Once a token has changed, a cache's logits may differ from the full ones by any amount on random weights, so closeness
proves nothing (diffusion reference, section 6).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from scheduler.types import Admission, StepPlan
from server.models.observed import ObservedLayers
from server.worker.attention_probe import probabilities
from tests.server.worker.denoising.bidirectional import MASK, CanvasDriver, Tiny, Told, request

CACHED = ("prefix", "dual", "vicinity", "dsb", "dkv_decode", "dkv_greedy", "elastic")
SETTINGS: dict[str, dict[str, Any]] = {
    "vicinity": {"values": {"margin": 1, "warm_up": 1}},
    "dsb": {"values": {"cache.prefix": 1}, "planner": "dsb"},
    "dkv_decode": {"values": {"refresh": 4}},
    "dkv_greedy": {"values": {"refresh": 4, "window": 1}},
    "elastic": {"values": {"width": 4, "drift": 0.9}},
}


def cached(cache: str, **others: Any) -> Any:
    policy = "random" if cache == "dkv_greedy" else "low_confidence"
    return request(policy, cache, **({"max_tokens": 16} | SETTINGS.get(cache, {}) | others))


def run(tiny: Tiny, *asked: Any) -> list[Told]:
    return CanvasDriver(tiny, twice=True).run(asked)


FRESH: list[tuple[str, str, dict[str, float]]] = [
    ("dkv_decode", "low_confidence", {"refresh": 1}),
    ("dkv_greedy", "random", {"refresh": 1}),
    ("dkv_greedy", "random", {"window": 100}),
    ("vicinity", "low_confidence", {"warm_up": 256}),
    ("vicinity", "threshold", {"margin": 100}),
    ("dual", "threshold", {"threshold": 0.0}),
    ("prefix", "threshold", {"threshold": 0.0}),
    ("elastic", "low_confidence", {"drift": 2.0}),
    ("elastic", "threshold", {"drift": 2.0}),
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("cache", "policy", "values"), FRESH)
def test_refreshing_every_step_is_no_cache(cache: str, policy: str, values: dict[str, float], shift: int) -> None:
    tiny = Tiny(shift=shift)
    own = {key: value for key, value in values.items() if key == "threshold"}
    plain, kept = run(
        tiny, request(policy, values=own, temperature=0.5), request(policy, cache, values, temperature=0.5)
    )
    assert kept.tokens == plain.tokens
    assert (kept.forwards, kept.rows) == (plain.forwards, plain.rows)
    assert [entry.logprob for entry in kept.logprobs] == pytest.approx([entry.logprob for entry in plain.logprobs])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", CACHED)
def test_right_after_a_refresh_the_logits_are_those_of_a_full_step(cache: str, shift: int) -> None:
    """A step's rows are computed over keys that a full step of the very same canvas has left."""
    tiny = Tiny(shift=shift)
    (told,) = run(tiny, cached(cache))
    partial = [span for span in told.spans if len(span.tokens) < span.kv_len]
    assert partial, "the cache has saved nothing"
    for span in partial:
        denoise = span.denoise
        assert denoise is not None
        canvas = (*told.request.prompt, *denoise.state)
        worker = CanvasDriver(tiny).worker
        size = worker.info.page_size
        pages = tuple(range(-(-span.kv_len // size)))
        full = span._replace(
            tokens=canvas, start=0, positions=(), judged=tuple(_row(span, offset) for offset in span.judged)
        )
        admission = Admission(span.seq_id, told.request, told.request.prompt)
        first = worker.run(StepPlan(1, (full,), (admission,), ((span.seq_id, pages),))).outcomes[0]
        second = worker.run(StepPlan(2, (span,))).outcomes[0]
        assert second.tokens == first.tokens
        assert [e.logprob for e in second.logprobs] == pytest.approx([e.logprob for e in first.logprobs], abs=1e-4)


def _row(span: Any, offset: int) -> int:
    return int(span.positions[offset]) if span.positions else int(span.start) + offset


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", CACHED)
def test_a_cache_takes_as_many_steps_and_fewer_rows(cache: str, shift: int) -> None:
    tiny = Tiny(shift=shift)
    none = {"planner": "dsb"} if cache == "dsb" else {}
    plain, kept = run(tiny, _uncached(cache, none), cached(cache))
    assert len(kept.tokens) == 16
    assert MASK not in kept.tokens
    assert kept.forwards == plain.forwards == 16
    assert kept.rows < plain.rows
    assert all(max(span.tokens) < 40 for span in kept.spans)


def _uncached(cache: str, settings: dict[str, Any]) -> Any:
    return request("random" if cache == "dkv_greedy" else "low_confidence", max_tokens=16, **settings)


@pytest.mark.parametrize("cache", CACHED)
def test_neighbours_change_nothing(cache: str) -> None:
    tiny = Tiny()
    alone = [run(tiny, cached(cache, seed=seed, prompt=5 + seed, temperature=0.7))[0] for seed in range(3)]
    others = [cached(other, prompt=9) for other in CACHED if other != cache]
    together = run(tiny, *(cached(cache, seed=seed, prompt=5 + seed, temperature=0.7) for seed in range(3)), *others)
    assert [told.tokens for told in together[:3]] == [told.tokens for told in alone]


@pytest.mark.parametrize("cache", CACHED)
def test_a_preemption_at_any_step_changes_no_token(cache: str) -> None:
    tiny, asked = Tiny(), cached(cache, temperature=0.7)
    (plain,) = CanvasDriver(tiny).run([asked])
    for at in range(2, 17, 2):
        (told,) = CanvasDriver(tiny).run([asked], lambda step, at=at: [0] if step == at else [])  # type: ignore[misc]
        assert told.tokens == plain.tokens


@pytest.mark.parametrize("cache", CACHED)
def test_a_request_that_is_sent_again_goes_on_where_it_stopped(cache: str) -> None:
    tiny, asked = Tiny(), cached(cache, temperature=0.7)
    (plain,) = CanvasDriver(tiny).run([asked])
    for num_out in (1, 4, 9, 15):
        (told,) = CanvasDriver(tiny).run([replace(asked, output=tuple(plain.tokens[:num_out]))])
        assert plain.tokens[:num_out] + told.tokens == plain.tokens


def full_steps(told: Told) -> int:
    return sum(len(span.tokens) == span.kv_len for span in told.spans)


def test_elastic_refreshes_never_at_0_always_above_1_and_between_in_between() -> None:
    never, always, between = run(
        Tiny(),
        cached("elastic", values={"width": 4, "drift": 0.0}),
        cached("elastic", values={"width": 4, "drift": 1.5}, seed=6),
        cached("elastic", values={"width": 4, "drift": 0.95}, seed=7),
    )
    assert full_steps(never) == 1
    assert full_steps(always) == always.forwards
    assert 1 < full_steps(between) < between.forwards


def test_a_tracked_row_is_never_a_mask_and_comes_along() -> None:
    (told,) = run(Tiny(), cached("elastic", values={"width": 2, "drift": 0.0}))
    for before, after, outcome in zip(told.spans, told.spans[1:], told.outcomes, strict=False):
        assert before.denoise is not None
        assert outcome.denoised is not None
        tracked = outcome.denoised.tracked
        assert 1 <= len(tracked) <= 2, "one a layer"
        canvas = (*told.request.prompt, *(before.denoise.state or before.tokens[before.denoise.lo :]))
        assert all(canvas[row] != MASK for row in tracked)
        assert set(tracked) <= set(after.positions or range(after.start, after.start + len(after.tokens)))


def test_attention_is_that_of_a_dense_forward() -> None:
    """The row that is tracked is the key that the rows which answer for masks attend to most, by the dense oracle."""
    queries, keys = torch.randn(3, 4, 8), torch.randn(11, 2, 8)
    found = probabilities(queries, keys, 8**-0.5)
    for row in range(3):
        for head in range(4):
            scores = [float(queries[row, head] @ keys[key, head // 2]) * 8**-0.5 for key in range(11)]
            assert torch.allclose(found[row, head], torch.tensor(scores).softmax(0), atol=1e-6)


def test_steps_without_elastic_spans_run_the_models_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("composed layers in a step that looks at nothing")

    monkeypatch.setattr(ObservedLayers, "dense_layers", fail)
    run(Tiny(), cached("dual"), cached("dkv_decode"))
    with pytest.raises(AssertionError, match="looks at nothing"):
        run(Tiny(), cached("elastic"))


def test_a_released_sequence_is_forgotten() -> None:
    driver = CanvasDriver(Tiny())
    driver.run([cached("elastic")])
    probe = driver.worker._attention
    assert probe is not None
    assert len(probe._memories) == 1
    driver.worker.run(StepPlan(1000, (), released=tuple(driver.released)))
    assert not probe._memories
