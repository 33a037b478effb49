"""What ends a text or a window early, and what `auto` reports: EoTP, Prophet, AdaBlock, Learn2PD, guesses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from scheduler.types import Choice, Request
from server.worker.denoising.learn2pd import FILTER_FILE, Filter, load_filter
from server.worker.denoising.planning import adablock
from server.worker.denoising.stopping import all_in, eotp
from tests.server.worker.denoising.block_driver import BlockDriver, Running
from tests.server.worker.denoising.oracle import above, block_causal, dense, generate, low_confidence, row_of
from tests.server.worker.denoising.worlds import BLOCKS, MASK, SIZE, request, sharp_model
from tests.server.worker.tiny_model import EOS, TinyModel, make_worker

INF = float("inf")


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return sharp_model()


def run(model: TinyModel, asked: Request, learnt: Filter | None = None) -> Running:
    (one,) = BlockDriver(make_worker(model, diffusion=BLOCKS, learnt=learnt), True, twice=True).generate([asked])
    assert one.error is None
    return one


def test_eotp_cuts_behind_the_first_fixed_end_or_the_surest_predicted_one() -> None:
    best, top = np.array([5, EOS, EOS]), np.array([0.9, 0.4, 0.6], dtype=np.float32)
    assert eotp({10: 5, 12: EOS, 14: EOS}, [11, 13, 15], best, top, (EOS,)) == 13
    assert eotp({10: 5, 12: 7}, [11, 13, 15], best, top, (EOS,)) == 16
    assert eotp({10: 5}, [11], best[:1], top[:1], (EOS,)) is None
    assert eotp({10: EOS}, [], best[:0], top[:0], ()) is None
    equal = np.array([0.5, 0.5], dtype=np.float32)
    assert eotp({}, [11, 13], best[1:], equal, (EOS,)) == 12


def test_eotp_never_cuts_left_of_a_fixed_end() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        tokens = generator.choice([EOS, 5, MASK], 12, p=[0.2, 0.4, 0.4]).tolist()
        fixed = {at: token for at, token in enumerate(tokens) if token != MASK}
        masked = [at for at, token in enumerate(tokens) if token == MASK]
        best = generator.choice([EOS, 5], len(masked))
        end = eotp(fixed, masked, best, generator.random(len(masked)).astype(np.float32), (EOS,))
        ends = [at for at, token in fixed.items() if token == EOS]
        assert end == ends[0] + 1 if ends else end is None or tokens[end - 1] == MASK


@pytest.mark.parametrize("length", [6, 8])
def test_eotp_ends_a_text_no_later_and_only_at_an_end(model: TinyModel, length: int) -> None:
    limits = {"threshold": 0.4}
    plain = request("end", "threshold", limits, length, 20, logit_bias=((EOS, 6.5),), stop_ids=(EOS,))
    cut = request(
        "end", "threshold", limits, length, 20, logit_bias=((EOS, 6.5),), stop_ids=(EOS,), parts={"stopper": "eotp"}
    )
    without, one = run(model, plain), run(model, cut)
    assert without.end is None
    assert one.end is not None
    assert one.forwards < without.forwards
    # Up to its end the text is what it was: a cut changes no token.
    text = one.tokens[length : one.end]
    assert text == without.tokens[length : one.end]
    never = request("end", "threshold", limits, length, 20, parts={"stopper": "eotp"})
    assert run(model, never).end is None


def test_prophet_goes_all_in_by_the_mean_gap_of_its_third() -> None:
    choice = Choice("prophet", (("early", 7.5), ("middle", 5.0), ("late", 2.5)))
    gap = np.array([2.0, 8.0], dtype=np.float32)
    assert [all_in(gap, progress, choice) for progress in (0.0, 0.3, 0.34, 0.6, 0.67, 0.99)] == [False] * 4 + [True] * 2
    assert all_in(gap + 1, 0.5, choice)
    assert not all_in(gap[:0], 0.9, choice)


@pytest.mark.parametrize("length", [6, 8])
def test_prophet_is_the_plain_method_without_its_limits_and_one_forward_a_block_below_them(
    model: TinyModel, length: int
) -> None:
    def limits(value: float) -> dict[str, float]:
        return {"early": value, "middle": value, "late": value}

    off = run(model, request("p", "prophet", limits(INF), length, 12))
    assert off.output == generate(model, request("p", "prophet", {}, length, 12), SIZE, MASK, low_confidence).tokens
    always = run(model, request("p", "prophet", limits(-INF), length, 12))
    assert max(always.fixed[1:]) == SIZE
    assert always.output == generate(model, request("p", "prophet", {}, length, 12), SIZE, MASK, above(0.0)).tokens
    some = run(model, request("p", "prophet", limits(1.5), length, 12))
    assert always.forwards < some.forwards <= off.forwards


def test_adablock_ends_a_window_behind_its_surest_delimiter() -> None:
    positions, best = np.arange(8, 16), np.array([3, 7, 3, 9, 7, 3, 3, 9])
    top = np.array([0.9, 0.4, 0.9, 0.6, 0.5, 0.9, 0.9, 0.6], dtype=np.float32)
    choice = Choice("adablock", (("threshold", 0.5),))
    assert adablock(positions, best, top, 16, (7, 9), choice) == 12
    assert adablock(positions, best, top, 16, (7,), choice) == 13
    assert adablock(positions, best, top, 14, (), choice) == 14
    assert adablock(positions, best, top, 14, (7, 9), Choice("adablock", (("threshold", 0.7),))) == 14


def test_a_window_confines_what_is_fixed_until_it_is_full(model: TinyModel) -> None:
    texts = {}
    for theta in (0.0, 2.0):
        values = {"selector.threshold": 0.0, "planner.threshold": theta}
        asked = request("w", "adablock", values, 8, 16, delimiters=tuple(range(3, 30)))
        one = texts[theta] = run(model, asked)
        fresh = [outcome.denoised for outcome in one.outcomes if outcome.denoised is not None]
        for span, denoised in zip([span for span in one.spans if span.denoise], fresh, strict=True):
            assert span.denoise is not None
            first, end = span.denoise.window
            end = denoised.window_end or end
            # With a threshold of 0 the whole window is fixed, and nothing outside.
            assert denoised.positions == tuple(range(first, end))
    plain = generate(model, request("w", "threshold", {}, 8, 16), SIZE, MASK, above(0.0))
    assert texts[2.0].output == plain.tokens
    assert texts[2.0].forwards < texts[0.0].forwards
    none = request("w", "adablock", {"selector.threshold": 0.0, "planner.threshold": 0.0}, 8, 16)
    assert run(model, none).output == plain.tokens


def identity_filter(size: int, limit: float, steepness: float = 1e4) -> Filter:
    """sigmoid(steepness (confidence - limit)): it lets pass what is surer than the limit."""
    eye = np.eye(size, dtype=np.float32)
    return Filter(eye, np.zeros(size, np.float32), steepness * eye, np.full(size, -limit * steepness, np.float32))


def test_learn2pd_with_a_filter_that_compares_is_the_threshold(model: TinyModel) -> None:
    asked = request("l", "learn2pd", {"threshold": 0.5}, 9, 14, parts={"stopper": "eos"})
    plain = generate(model, request("l", "threshold", {}, 9, 14), SIZE, MASK, above(0.5))
    one = run(model, asked, identity_filter(SIZE, 0.5))
    assert (one.output, one.fixed) == (plain.tokens, plain.fixed)
    everything = run(model, asked, identity_filter(SIZE, -1.0))
    assert everything.fixed == [3, 4, 4, 4]
    nothing = run(model, request("l", "learn2pd", {"threshold": 1.5}, 9, 14), identity_filter(SIZE, -1.0))
    assert nothing.output == generate(model, asked, SIZE, MASK, low_confidence).tokens


def test_the_filter_sees_the_confidence_of_the_whole_block(model: TinyModel) -> None:
    """A filter that looks at the fixed tokens only: it passes all masks once these are sure together."""
    seen: list[NDArray[np.float32]] = []

    class Spy(Filter):
        def __call__(self, confidences_B: NDArray[np.float32]) -> NDArray[np.float32]:
            seen.append(confidences_B)
            return super().__call__(confidences_B)

    eye = np.eye(SIZE, dtype=np.float32)
    spy = Spy(eye, eye[0], eye, eye[0])
    one = run(model, request("l", "learn2pd", {"threshold": 1.5}, 6, 4, parts={"stopper": "eos"}), spy)
    tokens = [*one.request.prompt, MASK, MASK]
    raw = dense(model, tokens, block_causal(8, SIZE))
    expected = [row_of(raw[at], at, MASK).confidence for at in range(4, 8)]
    np.testing.assert_allclose(seen[0], expected, rtol=1e-4)


def test_a_filter_is_read_from_beside_the_checkpoint(tmp_path: Path, model: TinyModel) -> None:
    generator = torch.Generator().manual_seed(0)
    w1, b1, w2, b2 = (torch.randn(shape, generator=generator).numpy() for shape in [(6, 4), (6,), (4, 6), (4,)])
    assert load_filter(tmp_path) is None
    save_file({"w1": w1, "b1": b1, "w2": w2, "b2": b2}, tmp_path / FILTER_FILE)
    learnt = load_filter(tmp_path)
    assert learnt is not None
    x = torch.rand(4, generator=generator)
    hidden = torch.relu(torch.from_numpy(w1) @ x + torch.from_numpy(b1))
    expected = torch.sigmoid(torch.from_numpy(w2) @ hidden + torch.from_numpy(b2))
    np.testing.assert_allclose(learnt(x.numpy()), expected.numpy(), atol=1e-6)
    asked = request("l", "learn2pd")
    make_worker(model, diffusion=BLOCKS, learnt=learnt).prepare(asked)
    with pytest.raises(ValueError, match="blocks of 4; this checkpoint has none"):
        make_worker(model, diffusion=BLOCKS).prepare(asked)
    with pytest.raises(ValueError, match="this checkpoint has one for blocks of 8"):
        make_worker(model, diffusion=BLOCKS, learnt=identity_filter(8, 0.5)).prepare(asked)
    for wrong, message in [
        ({"w1": w1, "b1": b1, "w2": w2}, "a filter is w1"),
        ({"w1": w1, "b1": b1, "w2": w1, "b2": b2}, "a filter is w1"),
        ({"w1": w1, "b1": b1 * np.inf, "w2": w2, "b2": b2}, "not finite"),
    ]:
        save_file(wrong, tmp_path / FILTER_FILE)
        with pytest.raises(ValueError, match=message):
            load_filter(tmp_path)
    (tmp_path / FILTER_FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_filter(tmp_path)


def test_auto_reports_the_masks_that_are_left_with_their_likeliest_tokens(model: TinyModel) -> None:
    asked = request("a", "auto", {"threshold": 0.9}, 9, 14)
    one = run(model, asked)
    tokens = [*asked.prompt, MASK, MASK, MASK]
    for span, outcome in zip(one.spans, one.outcomes, strict=True):
        if outcome.denoised is None or span.denoise is None:
            continue
        if MASK not in tokens:
            tokens += [MASK] * SIZE
        raw = dense(model, tokens, block_causal(len(tokens), SIZE))
        left = [at for at, token in enumerate(tokens) if token == MASK and at not in outcome.denoised.positions]
        rows = [row_of(raw[at], at, MASK) for at in left]
        assert [(at, token) for at, token, _ in outcome.denoised.guesses] == [(row.position, row.best) for row in rows]
        assert [sure for _, _, sure in outcome.denoised.guesses] == pytest.approx(
            [r.confidence for r in rows], rel=1e-3
        )
        for position, token in zip(outcome.denoised.positions, outcome.tokens, strict=True):
            tokens[position] = token
    plain = run(model, request("a", "threshold", {"threshold": 0.9}, 9, 14))
    assert plain.output == one.output
    assert not any(outcome.denoised and outcome.denoised.guesses for outcome in plain.outcomes)


def test_a_span_brings_its_own_threshold(model: TinyModel) -> None:
    driver = BlockDriver(make_worker(model, diffusion=BLOCKS), fused=True)
    driver.threshold = 0.5
    (one,) = driver.generate([request("a", "auto", {"threshold": 0.9}, 9, 14)])
    assert one.output == generate(model, request("a", "threshold", {}, 9, 14), SIZE, MASK, above(0.5)).tokens
