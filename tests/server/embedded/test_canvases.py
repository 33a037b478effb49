"""Training data and loss of the bidirectional model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from server.embedded.canvases import LENGTHS, CanvasBatch, CanvasSource, canvas_loss, canvas_mask
from server.embedded.export import export_model
from server.embedded.model import PRESETS, TinyModel
from server.embedded.tokenizer import END_OF_TEXT, MASK, token_id
from server.embedded.train import HERE, main
from server.models.config import CheckpointError
from server.models.registry import parse_config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(HERE / "braid-tiny" / "tokenizer.json"))


def documents(batch: CanvasBatch) -> list[tuple[int, slice]]:
    found = []
    for row in range(batch.ids.shape[0]):
        for number in range(int(batch.docs[row].max()) + 1):
            at = (batch.docs[row] == number).nonzero().flatten()
            found.append((row, slice(int(at[0]), int(at[-1]) + 1)))
    return found


def test_a_batch_is_a_function_of_seed_and_step(tokenizer: Tokenizer) -> None:
    one, same = CanvasSource(tokenizer, 3, 2, 96), CanvasSource(tokenizer, 3, 2, 96)
    assert torch.equal(one.batch(5).noisy_ids, same.batch(5).noisy_ids)
    assert not torch.equal(one.batch(5).ids, one.batch(6).ids)


def test_documents_are_prompts_with_whole_canvases_that_alone_are_masked(tokenizer: Tokenizer) -> None:
    batch = CanvasSource(tokenizer, 0, 8, 128).batch(0)
    mask, end = token_id(tokenizer, MASK), token_id(tokenizer, END_OF_TEXT)
    for row, at in documents(batch):
        ids, noisy, weights = batch.ids[row, at].tolist(), batch.noisy_ids[row, at].tolist(), batch.weights[row, at]
        prompt = tokenizer.decode(ids).split("->")[0]
        begin = len(tokenizer.encode(prompt + "->", add_special_tokens=False).ids)
        assert len(ids) - begin in LENGTHS
        assert ids[-1] == end
        assert mask not in noisy[:begin]
        masked = [token == mask for token in noisy]
        assert (weights > 0).tolist() == masked
        assert len(set(weights[weights > 0].tolist())) <= 1, "a document has one level of noise"
        assert all(a == b for a, b, hidden in zip(ids, noisy, masked, strict=True) if not hidden)
        assert batch.positions[row, at].tolist() == list(range(len(ids)))


def test_a_token_sees_its_whole_document_and_no_other() -> None:
    docs = torch.tensor([[0, 0, 0, 1, 1, -1]])
    seen = canvas_mask(docs)[0, 0]
    assert seen[0].tolist() == [True, True, True, False, False, False]
    assert seen[4].tolist() == [False, False, False, True, True, False]


def test_the_loss_weighs_each_masked_token_by_its_documents_noise(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = TinyModel(PRESETS["test"])
    batch = CanvasSource(tokenizer, 0, 2, 96).batch(1)
    hidden = model(batch.noisy_ids, batch.positions, canvas_mask(batch.docs)).detach()
    logs = model.logits(hidden).log_softmax(-1).detach()
    total = weight = 0.0
    for row, column in (batch.weights > 0).nonzero().tolist():
        total -= float(batch.weights[row, column] * logs[row, column, batch.ids[row, column]])
        weight += float(batch.weights[row, column])
    assert canvas_loss(model, model, batch).item() == pytest.approx(total / weight, rel=1e-4)


def test_training_lowers_the_loss_and_what_is_exported_is_bidirectional(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trainer = main(
        ["--preset", "test", "--bidirectional", "--output", str(tmp_path / "run"), "--steps", "30", "--rows", "2",
         "--row-len", "96", "--threads", "1", "--dtype", "float32"]
    )  # fmt: skip
    first, last = trainer.state.losses[0], trainer.state.losses[-1]
    assert last[2] < first[2]
    assert first[1] == 0.0, "there is no causal loss"
    export_model(trainer.model, tokenizer, tmp_path / "out", bidirectional=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    read = parse_config(config)
    assert (read.bidirectional, read.is_causal, read.block_size, read.logit_shift) == (True, False, 8, 0)
    with pytest.raises(CheckpointError, match="mask_token_id"):
        parse_config({key: value for key, value in config.items() if key != "mask_token_id"})


def test_a_row_that_is_too_short_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="row_len is 40"):
        CanvasSource(tokenizer, 0, 1, 40)
