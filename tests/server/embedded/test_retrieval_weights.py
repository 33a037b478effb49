"""The committed retrieval model: it is served, it finds, and its calibration is of these weights."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from scheduler.types import Attention, AttentionMethod
from server.embedded import pairs
from server.embedded.train import HERE
from server.engine.config import AttentionConfig, LabelDtype, SpeculationConfig
from server.engine.offline import Engine

FOLDER = HERE / "braid-tiny-retrieval"
CALIBRATED = HERE / "braid-tiny-retrieval-calibration"
MAX_WEIGHT_BYTES = 4 << 20


def engine_of(max_model_len: int, label_dtype: LabelDtype = "model") -> Engine:
    calibration = (str(CALIBRATED / "channels.safetensors"), str(CALIBRATED / "layers.json"))
    return Engine(
        "braid-tiny-retrieval",
        max_model_len=max_model_len,
        max_queued_tokens=1 << 20,
        num_threads=1,
        speculation=SpeculationConfig(mode="off"),
        attention=AttentionConfig(methods=tuple(AttentionMethod), calibration=calibration, label_dtype=label_dtype),
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engine_of(2048) as engine:
        yield engine


def test_the_weights_are_finite_bfloat16_and_a_few_megabytes() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= MAX_WEIGHT_BYTES
    for name, tensor in load_file(path).items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.isfinite(tensor).all(), name


def test_the_committed_tokenizer_is_the_one_of_the_questions() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab() == pairs.make_tokenizer().get_vocab()
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == pairs.VOCAB_SIZE
    assert config["max_position_embeddings"] == 16_384
    assert "mask_token_id" not in config, "it does not denoise"


def test_asked_in_text_it_finds_keys_among_a_thousand(engine: Engine) -> None:
    questions = pairs.draw_questions(random.Random(0), 1024, 5)
    prompts = [engine.tokenizer.decode(question.prompt) for question in questions]
    found = engine.generate(prompts, max_tokens=3)
    assert [answer.tokens for answer in found] == [question.answer for question in questions]
    value = engine.tokenizer.decode(questions[0].answer)
    assert found[0].text.split() == value.split()


def test_sparse_rows_find_as_much_with_all_keys_most_with_an_eighth_and_less_with_the_fewest(engine: Engine) -> None:
    questions = pairs.draw_questions(random.Random(1), 1024, 10)

    assert found(engine, questions, AttentionMethod.DOUBLE_SPARSITY, 1024) == 10
    assert found(engine, questions, AttentionMethod.TIDAL, 128) >= 9
    assert found(engine, questions, AttentionMethod.DOUBLE_SPARSITY, 69) < 10


def test_pages_chosen_by_labels_hold_the_keys_that_bounds_of_pages_lose() -> None:
    """1/16 of 4,096 keys, as 8 pages of 32."""
    questions = pairs.draw_questions(random.Random(1), 4096, 10)
    with engine_of(4096 + 8, "int4") as engine:
        assert found(engine, questions, AttentionMethod.DOUBLE_SPARSITY_PAGES, 256) == 10
        assert found(engine, questions, AttentionMethod.QUEST, 256) < 10


def found(engine: Engine, questions: Sequence[pairs.Question], method: AttentionMethod, budget: int) -> int:
    prompts = [question.prompt for question in questions]
    answers = engine.generate(prompts, max_tokens=3, attention=Attention(method, budget))
    return sum(map(pairs.is_right, questions, (answer.tokens for answer in answers)))
