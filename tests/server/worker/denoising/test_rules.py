"""Sampling rules inside a block: noise, penalties on both sides, bans, grammars, the end; against plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.reference import gumbel_noise
from scheduler.types import DiffusionModel, EosRule, Grammar, GrammarKind, Request
from server.worker.sampling import NOT_FINITE
from tests.server.worker.denoising.block_driver import BlockDriver, Running
from tests.server.worker.denoising.oracle import Choose, Row, above, generate, low_confidence, row_of
from tests.server.worker.denoising.worlds import BLOCKS, MASK, SIZE, VOCAB, causal, request, sharp_model
from tests.server.worker.tiny_model import EOS, TinyModel, make_worker

NEG_INF = float("-inf")


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return sharp_model()


def run(model: TinyModel, *asked: Request, fused: bool = True) -> list[Running]:
    return BlockDriver(make_worker(model, num_pages=300, diffusion=BLOCKS), fused, twice=True).generate(asked)


def drawn(asked: Request) -> Choose:
    """Temperature and top_k with the noise of the key (seed, sample, position, step), confidence raw or filtered."""
    sampling, decoding = asked.sampling, asked.decoding
    assert decoding is not None
    filtered = decoding.filtered

    def choose(logits: Tensor, tokens: list[int], position: int, step: int) -> Row:
        logits = logits.clone()
        logits[MASK] = NEG_INF
        tempered = logits / sampling.temperature
        if sampling.top_k:
            tempered[tempered < tempered.topk(sampling.top_k).values[-1]] = NEG_INF
        word = torch.tensor([sampling.sample_index + ((step + 1) << 16)])
        at = torch.tensor([position - len(asked.prompt)])
        noise = gumbel_noise(VOCAB, torch.tensor([sampling.seed]), word, at)[0]
        token = int((tempered + noise).argmax())
        confidence = float((tempered if filtered else logits).softmax(0)[token])
        return Row(position, token, confidence, 0.0, 0.0, float(logits.log_softmax(0)[token]), int(logits.argmax()))

    return choose


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("limit", [0.2, 0.6, 1.1])
@pytest.mark.parametrize("length", [5, 8])
def test_drawn_tokens_and_their_confidence_equal_the_plain_loop(
    model: TinyModel, length: int, limit: float, filtered: bool
) -> None:
    warm: dict[str, Any] = {"temperature": 0.8, "top_k": 6, "seed": 77, "sample_index": 5, "logprobs": 0}
    asked = request("warm", "threshold", {"threshold": limit}, length, filtered=filtered, **warm)
    (one,) = run(model, asked)
    expected = generate(model, asked, SIZE, MASK, above(limit), choose=drawn(asked))
    assert one.output == expected.tokens
    assert one.fixed == expected.fixed
    assert one.logprobs == {at: pytest.approx(value, abs=1e-4) for at, value in expected.logprobs.items()}


def test_what_confidence_is_of_makes_a_difference(model: TinyModel) -> None:
    texts = []
    for filtered in (False, True):
        asked = request("warm", "threshold", {"threshold": 0.5}, 8, filtered=filtered, temperature=0.4, seed=3)
        texts.append(run(model, asked)[0].fixed)
    assert sum(texts[1][:2]) > sum(texts[0][:2])


def test_samples_differ_by_index_and_repeat_by_seed(model: TinyModel) -> None:
    def texts(seed: int) -> list[list[int]]:
        asked = [request("n", "low_confidence", temperature=1.2, seed=seed, sample_index=i) for i in range(4)]
        return [one.output for one in run(model, *asked)]

    assert texts(1) == texts(1)
    assert len({tuple(text) for text in [*texts(1), *texts(2)]}) == 8


def penalised(asked: Request) -> Choose:
    sampling, num_prompt = asked.sampling, len(asked.prompt)

    def choose(logits: Tensor, tokens: list[int], position: int, step: int) -> Row:
        logits = logits.clone()
        for token, bias in sampling.logit_bias:
            logits[token] += bias
        for token in range(VOCAB):
            count = tokens[num_prompt:].count(token)
            if token in tokens and token != MASK:
                logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
            if token != MASK:
                logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        if position - num_prompt < sampling.min_tokens:
            logits[EOS] = NEG_INF
        return row_of(logits, position, MASK)

    return choose


@pytest.mark.parametrize("length", [5, 8])
@pytest.mark.parametrize("limit", [0.3, 1.1])
def test_penalties_count_the_fixed_tokens_on_both_sides(model: TinyModel, length: int, limit: float) -> None:
    rules: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.9,
        "presence_penalty": 0.4,
        "min_tokens": 9,
    }
    asked = request("rare", "threshold", {"threshold": limit}, length, logit_bias=((EOS, 40.0), (9, 3.0)), **rules)
    (one,) = run(model, asked)
    assert one.output == generate(model, asked, SIZE, MASK, above(limit), choose=penalised(asked)).tokens
    assert EOS not in one.output[:9]
    assert EOS in one.output


def test_an_end_may_be_banned_or_come_last(model: TinyModel) -> None:
    bias = ((EOS, 9.0),)
    asked = {
        rule: request(rule.value, "low_confidence", {}, 8, 12, eos=rule, logit_bias=bias, stop_ids=(EOS,))
        for rule in EosRule
    }
    free, never, last = (run(model, asked[rule])[0] for rule in EosRule)
    assert EOS in free.output
    assert EOS not in never.output
    # In each block all other tokens come before the first end.
    order = [token for outcome in last.outcomes for token in outcome.tokens]
    assert EOS in order
    for start in range(0, 12, SIZE):
        block = order[start : start + SIZE]
        assert block == sorted(block, key=lambda token: token == EOS)
    assert order != [token for outcome in free.outcomes for token in outcome.tokens]


def contains(text: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(text[at : at + len(word)]) == word for at in range(len(text)))


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        ("threshold", {"threshold": 0.0}),
        ("threshold", {"threshold": 0.4}),
        ("random", {}),
        ("low_confidence", {}),
        ("llada2_edit", {"threshold": 0.2, "edit_threshold": 0.2, "max_post_edits": 3}),
        ("wino", {"wide": 0.2}),
    ],
)
def test_a_bad_word_never_comes_together_in_whatever_order_its_tokens_are_fixed(
    model: TinyModel, policy: str, values: dict[str, float]
) -> None:
    words, found = list[tuple[int, ...]](), 0
    for length in (5, 6, 8, 9):
        text = run(model, request("bad", policy, values, length, 14, seed=4))[0].output
        words = [tuple(text[at : at + size]) for size, at in [(1, 3), (2, 0), (2, 6), (3, 2), (3, 9), (4, 8)]]
        asked = request("bad", policy, values, length, 14, bad_words=tuple(words), seed=4)
        (one,) = run(model, asked)
        assert one.error is None
        assert len(one.output) == 14
        assert not [word for word in words if contains(one.output, word)]
        found += one.output != text
    assert found == 4


def test_a_grammar_is_followed_from_left_to_right(tokenizer_file: Path) -> None:
    vocab = 300
    model, diffusion = TinyModel(vocab, 2), DiffusionModel(vocab - 1, SIZE)
    worker = make_worker(model, tokenizer_file=tokenizer_file, diffusion=diffusion)
    grammar = Grammar(GrammarKind.CHOICE, '["maybe true", "nonsense"]')
    asked = request("lark", "sequential", {}, 6, 12, grammar=grammar, stop_ids=(EOS,), steps=2)
    worker.prepare(asked)
    (one,) = BlockDriver(worker, fused=True, twice=True).generate([asked])
    text = one.output[: one.output.index(EOS)] if EOS in one.output else one.output
    assert Tokenizer.from_file(str(tokenizer_file)).decode(text) in ("maybe true", "nonsense")
    # Two steps were asked for, but only the leftmost mask can be read.
    assert set(one.fixed) == {1}
    wrong = request("any", "threshold", {}, grammar=grammar)
    with pytest.raises(ValueError, match="selector is threshold, but must be sequential"):
        worker.prepare(wrong)
    (failed,) = BlockDriver(worker).generate([wrong])
    assert "left to right" in str(failed.error)


class Broken(TinyModel):
    """Its rows of a sequence that brings `marker` are not finite."""

    def __init__(self, model: TinyModel, marker: int) -> None:
        self.__dict__.update(model.__dict__)
        self.marker = marker

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        hidden_TH = super().forward(tokens_T, rows, kv)
        marked = rows.row_seq[tokens_T == self.marker]
        hidden_TH[torch.isin(rows.row_seq, marked)] = float("nan")
        return hidden_TH


def test_rows_that_are_not_finite_fail_their_own_sequence_only(model: TinyModel) -> None:
    neighbours = [request("other", "threshold", {"threshold": 0.4}, 9, temperature=0.7, seed=1), causal("ar", 9)]
    clean = [one.output for one in run(model, *neighbours)]
    seen = {token for asked in neighbours for token in asked.prompt} | {token for text in clean for token in text}
    marker = next(token for token in range(3, VOCAB) if token not in seen)
    bad = Request("bad", (4, 5, 6, 7, marker), 9, decoding=neighbours[0].decoding)
    failed, *found = run(Broken(model, marker), bad, *neighbours)
    assert failed.error == NOT_FINITE
    assert [one.output for one in found] == clean


def test_constraints_that_leave_nothing_fail_their_own_sequence(model: TinyModel) -> None:
    bad = request("none", "threshold", {}, allowed_token_ids=(5,), bad_words=((5,),))
    good = request("good", "threshold", {})
    failed, one = run(model, bad, good)
    assert "no token is allowed at output position 0 by ALLOWED, BAD_WORDS" in str(failed.error)
    assert one.output == run(model, good)[0].output


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_memory_for_few_rows_gives_the_same_text(model: TinyModel, rows: int) -> None:
    asked = [request("a", "threshold", {"threshold": 0.4}, 9, logprobs=2), request("b", "wino", {"wide": 0.2}, 6)]
    wide = run(model, *asked)
    worker = make_worker(model, diffusion=BLOCKS, logits_bytes=rows * 4 * VOCAB)
    narrow = BlockDriver(worker, fused=True).generate(asked)
    for a, b in zip(wide, narrow, strict=True):
        assert a.output == b.output
        assert a.logprobs == {at: pytest.approx(value, abs=1e-5) for at, value in b.logprobs.items()}


def test_the_text_is_that_of_the_greedy_loop_where_nothing_is_asked(model: TinyModel) -> None:
    asked = request("plain", "low_confidence")
    assert run(model, asked)[0].output == generate(model, asked, SIZE, MASK, low_confidence).tokens
