"""Row statistics against float64 softmax written out, in parts of every size, and the law of the tokens drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.reference import ReferenceOps
from scheduler.types import Request, Sampling
from server.worker.denoising.stats import Asked, Measured, noise_word, read_stats
from server.worker.process_logits import JudgedRow
from server.worker.recipe import make_recipe
from server.worker.sampling import NOT_FINITE

VOCAB, MASK, COUNT = 50, 17, 9


def asked_rows(sampling: Sampling, filtered: bool, given: int = -1) -> list[Asked]:
    recipe = make_recipe(Request("r", (1,), 9, sampling), (2,))
    return [Asked(row, JudgedRow(recipe, [1], row), 3, filtered, given) for row in range(COUNT)]


def logits() -> Tensor:
    return torch.randn(COUNT, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def read(asked: list[Asked], logits_JV: Tensor, at_once: int = 100) -> Measured:
    return read_stats(ReferenceOps(), lambda rows: logits_JV[rows].clone(), asked, MASK, at_once)


def plain(row: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    row = row.double().clone() / temperature
    row[MASK] = float("-inf")
    if top_k:
        row[row < row.topk(top_k).values[-1]] = float("-inf")
    return row.softmax(0)


@pytest.mark.parametrize("at_once", [1, 4, 100])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_numbers_are_those_of_the_distribution(temperature: float, filtered: bool, at_once: int) -> None:
    sampling = Sampling(temperature=temperature, top_k=5 if temperature else 0, seed=4)
    asked, raw = asked_rows(sampling, filtered, given=7), logits()
    stats = read(asked, raw, at_once).stats
    for row in range(COUNT):
        probs = plain(raw[row], temperature, 5) if filtered and temperature else plain(raw[row])
        best = probs.topk(2).values
        assert stats.best[row] == int(probs.argmax())
        assert stats.tokens[row] == stats.best[row] or temperature
        assert stats.confidence[row] == pytest.approx(float(probs[stats.tokens[row]]), rel=1e-5)
        assert stats.top[row] == pytest.approx(float(best[0]), rel=1e-5)
        assert stats.margin[row] == pytest.approx(float(best[0] - best[1]), abs=1e-5)
        assert stats.gap[row] == pytest.approx(float(best[0].log() - best[1].log()), rel=1e-4)
        assert stats.given[row] == pytest.approx(float(probs[7]), rel=1e-5)
        entropy = -float((probs[probs > 0] * probs[probs > 0].log()).sum())
        assert stats.entropy[row] == pytest.approx(entropy, abs=1e-5)


def test_a_row_is_measured_the_same_alone_and_among_others() -> None:
    raw = logits()
    warm, cold = Sampling(temperature=0.9, top_p=0.8, seed=1), Sampling(temperature=0.0)
    mixed = [asked_rows(warm if row % 2 else cold, row % 3 == 0)[row] for row in range(COUNT)]
    together = read(mixed, raw).stats
    for row, one in enumerate(mixed):
        alone = read([one], raw).stats
        found = np.array(together.part(slice(row, row + 1)))
        assert np.array_equal(found, np.array(alone))


def test_rows_that_are_not_finite_are_named_and_leave_the_others_alone() -> None:
    raw, sampling = logits(), Sampling(temperature=0.0)
    clean = read(asked_rows(sampling, False), raw)
    raw[2, 5], raw[6, 1], raw[7] = float("nan"), float("inf"), float("-inf")
    for at_once in (2, 100):
        measured = read(asked_rows(sampling, False), raw, at_once)
        assert measured.errors == dict.fromkeys((2, 6, 7), NOT_FINITE)
        kept = [row for row in range(COUNT) if row not in measured.errors]
        assert np.array_equal(measured.stats.confidence[kept], clean.stats.confidence[kept])
        assert np.array_equal(measured.stats.tokens[kept], clean.stats.tokens[kept])


def test_the_mask_is_never_drawn_and_never_the_best() -> None:
    raw = logits()
    raw[:, MASK] = 100.0
    stats = read(asked_rows(Sampling(temperature=2.0, seed=8), False), raw).stats
    assert MASK not in stats.tokens
    assert MASK not in stats.best


@pytest.mark.parametrize("varied", ["seed", "step", "position", "sample"])
def test_tokens_follow_the_distribution_whatever_the_noise_is_keyed_by(varied: str) -> None:
    """Chi-square over 8000 draws that differ in one part of the key only."""
    num_draws, num_tokens, temperature = 8000, 12, 0.8
    row = torch.randn(num_tokens, generator=torch.Generator().manual_seed(1))
    mask, probs = 4, row.double().clone() / temperature
    probs[mask] = float("-inf")
    expected = probs.softmax(0).numpy() * num_draws
    asked = []
    for draw in range(num_draws):
        at = draw if varied == "sample" else 2
        sampling = Sampling(temperature=temperature, seed=draw if varied == "seed" else 9, sample_index=at)
        recipe = make_recipe(Request("r", (1,), 9, sampling), ())
        judged = JudgedRow(recipe, [1], draw if varied == "position" else 6)
        asked.append(Asked(draw, judged, draw if varied == "step" else 0))
    drawn = read_stats(ReferenceOps(), lambda rows: row.repeat(len(rows), 1), asked, mask, 1 << 20).stats.tokens
    counts = np.bincount(drawn, minlength=num_tokens)
    assert counts[mask] == 0
    kept = expected > 0
    chi = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert chi < 29.6  # 10 degrees of freedom, 0.1 %


def test_no_step_shares_its_noise_with_another_or_with_plain_sampling() -> None:
    words = {noise_word(index, step) for index in range(128) for step in range(64)}
    assert len(words) == 128 * 64
    assert min(words) >= 1 << 16
