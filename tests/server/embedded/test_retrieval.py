"""Key-value retrieval: the questions, the rows a model is trained on, and what its guided heads are told."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from server.embedded import pairs
from server.embedded.model import PRESETS, Layer, Shape, TinyModel
from server.embedded.retrieval import (
    MAX_POSITION,
    RETRIEVAL_LAYERS,
    RetrievalSource,
    causal,
    guided_loss,
    retrieval_loss,
)
from server.embedded.train import main

SHAPE = Shape(hidden=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, mlp=32, vocab_size=pairs.VOCAB_SIZE)


def test_a_question_asks_for_a_key_of_its_context_that_is_there_once() -> None:
    tokenizer = pairs.make_tokenizer()
    for question in pairs.draw_questions(random.Random(3), 256, 8):
        words = tokenizer.decode(list(question.prompt)).split()
        keys = words[:-1:4]
        assert len(keys) == len(set(keys)) == 64
        at = words.index(words[-1])
        assert tokenizer.decode(list(question.answer)).split() == words[at + 1 : at + 4]
        assert [word[0] for word in words[:4]] == ["k", "a", "b", "c"]
        assert tokenizer.encode(" ".join(words)).ids == list(question.prompt)


def test_an_answer_is_right_if_it_begins_with_the_whole_value() -> None:
    question = pairs.Question((6,), (4200, 4300, 4400))
    assert pairs.is_right(question, (4200, 4300, 4400, 7))
    assert not pairs.is_right(question, (4200, 4300))
    assert not pairs.is_right(question, (4200, 4300, 4401))


def test_contexts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="context_len is 30, but must be a multiple of 4"):
        pairs.draw_questions(random.Random(0), 30, 1)
    with pytest.raises(ValueError, match="count is 9, but a context of 32 tokens has 8 pairs"):
        pairs.draw_questions(random.Random(0), 32, 9)
    with pytest.raises(ValueError, match="num_pairs is 5000"):
        pairs.draw_pairs(random.Random(0), 5000)


def test_an_unknown_word_is_a_token_of_its_own() -> None:
    assert pairs.make_tokenizer().encode("k0001 hello").ids == [pairs.FIRST_KEY + 1, 5]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, same = RetrievalSource(3, 2, 8, 8), RetrievalSource(3, 2, 8, 8)
    one.batch(0)
    assert torch.equal(one.batch(5).ids, same.batch(5).ids)
    assert torch.equal(one.batch(5).positions, same.batch(5).positions)
    assert not torch.equal(one.batch(5).ids, one.batch(6).ids)
    assert not torch.equal(one.batch(5).ids, RetrievalSource(4, 2, 8, 8).batch(5).ids)


def test_what_asks_is_answered_by_what_stands_behind_the_same_key_in_the_context() -> None:
    batch = RetrievalSource(0, 3, 8, 5).batch(1)
    assert batch.ids.shape == (3, 13 * 4)
    assert batch.asking.tolist() == [place for place in range(32, 52) if place % 4 != 3]
    for row in range(3):
        ids = batch.ids[row].tolist()
        for place, source in zip(batch.asking.tolist(), batch.sources[row].tolist(), strict=True):
            assert ids[place + 1] == ids[source]
            assert ids[place // 4 * 4] == ids[source // 4 * 4]
            assert source < 32
            assert source % 4 == place % 4 + 1


def test_positions_rise_with_gaps_between_pairs_alone_up_to_the_whole_context() -> None:
    positions = torch.cat([RetrievalSource(seed, 4, 16, 16).batch(0).positions for seed in range(20)])
    steps = positions.diff(dim=1)
    within = torch.arange(1, positions.shape[1]) % 4 != 0
    assert (steps[:, within] == 1).all()
    assert (steps >= 1).all()
    assert (steps[:, ~within] == 1).float().mean() > 0.5, "most neighbours are neighbours"
    assert MAX_POSITION // 2 < positions.max() < MAX_POSITION


def test_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="9 questions about 8 pairs"):
        RetrievalSource(0, 1, 8, 9)
    with pytest.raises(ValueError, match="rows of 2049 pairs do not fit"):
        RetrievalSource(0, 1, 2049, 1)


def test_guidance_is_the_cross_entropy_of_attention_with_every_wrong_key_counted_as_often_as_asked() -> None:
    """Against attention in plain loops, from the model's own layers."""
    torch.manual_seed(0)
    model = TinyModel(SHAPE)
    batch = RetrievalSource(0, 1, 4, 3).batch(0)
    loss, guidance = guided_loss(model, batch, crowd=3.0)
    assert loss.item() == pytest.approx(retrieval_loss(model, model, batch).item(), rel=1e-5)

    cos, sin = model.rotary(batch.positions)
    x, expected = model.embed_tokens(batch.ids), 0.0
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        q, k = layer.self_attn.queries_and_keys(layer.input_layernorm(x), cos, sin)
        told = list(zip(batch.asking.tolist(), batch.sources[0].tolist(), strict=True))
        if index == 0:
            told = [(place, place // 4 * 4) for place in range(batch.ids.shape[1])]
        elif index not in RETRIEVAL_LAYERS:
            told = []
        parts = []
        for head in (0, 1):  # the query heads of the first kv head
            for place, meant in told:
                weights = [math.exp((q[0, head, place] @ k[0, 0, key]).item() / 4) for key in range(place + 1)]
                parts.append(-math.log(weights[meant] / (3.0 * sum(weights) - 2.0 * weights[meant])))
        expected += sum(parts) / max(1, len(parts))
        x = layer(x, cos, sin, causal(batch))
    assert guidance.item() == pytest.approx(expected, rel=1e-4)


def test_training_lowers_both_losses_and_resumes_as_if_never_interrupted(tmp_path: Path) -> None:
    command = ["--preset", "braid-tiny-retrieval", "--rows", "2", "--pairs", "4", "--questions", "4", "--threads", "1",
               "--dtype", "float32", "--steps", "10"]  # fmt: skip
    whole = main([*command, "--output", str(tmp_path / "whole")])
    main([*command, "--output", str(tmp_path / "cut"), "--stop-at", "5"])
    resumed = main([*command, "--output", str(tmp_path / "cut"), "--resume"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    state = json.loads((tmp_path / "whole" / "state.json").read_text())
    assert state["sessions"][0]["pairs"] == 4
    source = RetrievalSource(0, 2, 4, 4)
    torch.manual_seed(0)
    start = guided_loss(TinyModel(PRESETS["braid-tiny-retrieval"]), source.batch(100), 8.0)
    end = guided_loss(whole.model, source.batch(100), 8.0)
    assert end[0] < start[0]
    assert end[1] < start[1]
