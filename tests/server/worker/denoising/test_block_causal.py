"""Block-causal requests through `Worker.run` against the plain loops of the oracle, token for token."""

from __future__ import annotations

import pytest
import torch

from scheduler.types import Request
from server.worker.worker import Worker
from tests.server.worker.denoising.block_driver import BlockDriver, Running
from tests.server.worker.denoising.oracle import Row, above, block_causal, dense, generate, low_confidence, rules
from tests.server.worker.denoising.worlds import BLOCKS, MASK, SHIFTED, SIZE, VOCAB, plan_of, request, sharp_model
from tests.server.worker.tiny_model import TinyModel, make_worker


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return sharp_model()


def run(
    model: TinyModel, asked: Request, fused: bool = False, shift: int = 0, chunk: int = 1000, twice: bool = False
) -> Running:
    worker = make_worker(model, diffusion=SHIFTED if shift else BLOCKS)
    (one,) = BlockDriver(worker, fused, chunk, twice).generate([asked])
    return one


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("rule", rules())
def test_text_equals_the_plain_loop(model: TinyModel, rule: str, length: int, fused: bool) -> None:
    policy, values, steps, plain = rules()[rule]
    asked = request(rule, policy, values, length, steps=steps, logprobs=0)
    one = run(model, asked, fused, twice=True)
    expected = generate(model, asked, SIZE, MASK, plain)
    assert one.output == expected.tokens
    assert one.fixed == expected.fixed
    assert one.logprobs == {at: pytest.approx(value, abs=1e-4) for at, value in expected.logprobs.items()}


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("rule", ["low_confidence", "threshold", "all", "sequential"])
def test_a_model_whose_rows_answer_for_the_next_token_equals_its_plain_loop(
    model: TinyModel, rule: str, length: int
) -> None:
    policy, values, steps, plain = rules()[rule]
    asked = request(rule, policy, values, length, steps=steps, logprobs=0)
    one = run(model, asked, shift=1, twice=True)
    expected = generate(model, asked, SIZE, MASK, plain, shift=1)
    assert one.output == expected.tokens
    assert one.fixed == expected.fixed
    assert one.logprobs == {at: pytest.approx(value, abs=1e-4) for at, value in expected.logprobs.items()}


@pytest.mark.parametrize("chunk", [4, 8, 12, 1000])
@pytest.mark.parametrize("fused", [False, True])
def test_a_prompt_may_be_cut_at_every_edge_of_a_block(model: TinyModel, chunk: int, fused: bool) -> None:
    asked = request("cut", "threshold", {"threshold": 0.3}, length=26)
    one = run(model, asked, fused, chunk=chunk)
    assert one.output == generate(model, asked, SIZE, MASK, above(0.3)).tokens
    assert max(len(span.tokens) for span in one.spans) <= max(chunk, SIZE) + SIZE


def keys(worker: Worker, pages: list[int], length: int) -> torch.Tensor:
    """K and V of a sequence's first keys, [layers, 2, length, heads, dim]."""
    size = worker.info.page_size
    slots = torch.tensor([pages[at // size] * size + at % size for at in range(length)])
    layers = []
    for layer in worker._pool.layers:
        layers.append(torch.stack([part[slots // size, :, slots % size] for part in layer]))
    return torch.stack(layers)


def test_a_fused_step_equals_the_pass_and_the_denoising_that_it_joins(model: TinyModel) -> None:
    """Logits, through everything that is read from them, and keys and values."""
    asked = request("fuse", "threshold", {"threshold": 0.3}, length=8, logprobs=VOCAB)
    found = []
    for fused in (False, True):
        worker = make_worker(model, diffusion=BLOCKS)
        driver = BlockDriver(worker, fused)
        pages = driver.pages[::-1][:4]
        (one,) = driver.generate([asked])
        found.append((one, keys(worker, pages, one.spans[-1].kv_len)))
    (apart, keys_apart), (joint, keys_joint) = found
    assert joint.forwards == apart.forwards
    # The prompt's last pass and one for every finished block but the last are gone.
    assert apart.passes == joint.passes + 3
    pairs = zip(*([o for o in one.outcomes if o.denoised] for one in (apart, joint)), strict=True)
    for first, second in pairs:
        assert (first.tokens, first.denoised) == (second.tokens, second.denoised)
        for a, b in zip(first.logprobs, second.logprobs, strict=True):
            assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-5)
    torch.testing.assert_close(keys_joint, keys_apart, rtol=1e-5, atol=1e-5)


def test_cached_logits_equal_an_uncached_block_causal_forward(model: TinyModel) -> None:
    asked = request("cache", "low_confidence", length=10, max_tokens=9, logprobs=VOCAB)
    worker = make_worker(model, diffusion=BLOCKS)
    (one,) = BlockDriver(worker, fused=True).generate([asked])
    tokens = list(asked.prompt)
    tokens += [MASK] * (-len(tokens) % SIZE)
    for outcome in one.outcomes:
        if outcome.denoised is None:
            continue
        if MASK not in tokens:
            tokens += [MASK] * SIZE
        raw = dense(model, tokens, block_causal(len(tokens), SIZE))
        raw[:, MASK] = float("-inf")
        for position, token, logprob in zip(outcome.denoised.positions, outcome.tokens, outcome.logprobs, strict=True):
            expected = raw[position].log_softmax(0)
            assert {t: p for t, p in logprob.top if t != MASK} == pytest.approx(
                {t: float(expected[t]) for t in range(VOCAB) if t != MASK}, abs=1e-4
            )
            tokens[position] = token


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        ("threshold", {"threshold": 1.01}),
        ("auto", {"threshold": 1.01, "lowest": 1.01}),
        ("localleap", {"threshold": 1.01, "relaxed": 1.01}),
        ("sdar_dynamic", {"threshold": 1.01}),
        ("hierarchy", {"threshold": 1.01, "low": 1.01}),
        ("factor", {"factor": 0.0}),
        ("maskgit_plus", {}),
        ("wino", {"wide": 1.01, "narrow": 0.0}),
        ("llada2_edit", {"threshold": 1.01, "edit_threshold": 2.0}),
    ],
)
def test_a_limit_that_nothing_passes_fixes_the_surest_one_a_step(
    model: TinyModel, policy: str, values: dict[str, float]
) -> None:
    asked = request("one", policy, values, length=6, max_tokens=10)
    one = run(model, asked, fused=True)
    assert one.output == generate(model, asked, SIZE, MASK, low_confidence).tokens
    changing = [count for count in one.fixed if count]
    assert changing == [1] * 10


@pytest.mark.parametrize(
    ("policy", "values"), [("dparallel", {"entropy": -1.0}), ("entropy_bounded", {"gamma": 0.0}), ("entropy", {})]
)
def test_an_entropy_limit_that_nothing_passes_fixes_the_least_uncertain_one_a_step(
    model: TinyModel, policy: str, values: dict[str, float]
) -> None:
    def least_entropy(rows: list[Row], step: int, masks: int) -> list[Row]:
        return [min(rows, key=lambda row: row.entropy)]

    one = run(model, request("h", policy, values, length=6), fused=True)
    assert one.output == generate(model, request("h", policy, values, length=6), SIZE, MASK, least_entropy).tokens
    assert set(one.fixed) == {1}


@pytest.mark.parametrize(
    ("policy", "values"),
    [("threshold", {"threshold": 0.0}), ("dparallel", {"entropy": 100.0}), ("entropy_bounded", {"gamma": 100.0})],
)
def test_a_limit_that_everything_passes_takes_one_forward_a_block(
    model: TinyModel, policy: str, values: dict[str, float]
) -> None:
    one = run(model, request("all", policy, values, length=6, max_tokens=10), fused=True)
    assert one.fixed == [2, 4, 4]


def test_one_forward_more_or_less_changes_nothing_but_the_count(model: TinyModel) -> None:
    """The guard `is_last` fixes what is left of the window."""
    worker = make_worker(model, diffusion=BLOCKS)
    driver = BlockDriver(worker, fused=True)
    driver.last_after = 1
    (one,) = driver.generate([request("last", "low_confidence", length=8, max_tokens=8)])
    assert one.fixed == [1, 3, 1, 3]


def test_a_span_without_a_row_for_its_window_is_refused(model: TinyModel) -> None:
    asked = request("bad", "threshold", length=4)
    worker = make_worker(model, diffusion=BLOCKS)
    driver = BlockDriver(worker, fused=True)
    (one,) = driver.generate([asked])
    span = one.spans[0]
    denoise = span.denoise
    assert denoise is not None
    assert (span.start, denoise.lo, denoise.hi) == (0, 4, 8)
    for wrong, message in [
        (span._replace(judged=()), "judges no row"),
        (span._replace(denoise=None), "no denoise"),
        (span._replace(denoise=denoise._replace(window=(0, 4))), r"window \[0, 4\)"),
        (span._replace(denoise=denoise._replace(state=(MASK,))), "has 1 tokens of its block"),
        (span._replace(judged=(8,)), r"judges rows \(8,\), but has 8"),
        (span._replace(denoise=denoise._replace(hi=7, window=(4, 7), state=(MASK,) * 3)), "not in its block"),
    ]:
        fresh = make_worker(model, diffusion=BLOCKS)
        with pytest.raises(ValueError, match=message):
            fresh.run(plan_of(asked, asked.prompt, wrong))


def test_the_rules_are_told_apart_by_the_model(model: TinyModel) -> None:
    """An oracle whose rules all gave the same would prove little."""
    texts: dict[str, tuple[int, ...]] = {}
    steps: dict[str, int] = {}
    for name, (policy, values, count, plain) in rules().items():
        asked = request("same", policy, values, 11, steps=count)
        text = generate(model, asked, SIZE, MASK, plain)
        texts[name], steps[name] = tuple(text.tokens), len(text.fixed)
    assert len(set(texts.values())) >= 4, texts
    assert steps["all"] < steps["threshold"] < steps["low_confidence"]
