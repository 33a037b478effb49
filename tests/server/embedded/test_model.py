"""The training model: the two masks mean what serving will do, and the export is a Qwen3 checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from server.embedded.export import export_model
from server.embedded.model import (
    BLOCK_SIZE,
    PRESETS,
    TinyModel,
    block_causal_mask,
    causal_mask,
    noisy_clean_mask,
)
from server.embedded.train import HERE

LENGTH = 4 * BLOCK_SIZE
MASK_ID = 3


def _model(dtype: torch.dtype) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(PRESETS["test"]).to(dtype)


def _row(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 4096, (1, length))
    return ids, torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]


@pytest.mark.parametrize("block", range(4))
def test_noisy_rows_answer_as_the_masked_block_does_behind_its_clean_prefix(block: int) -> None:
    model = _model(torch.float64)
    ids, docs, positions = _row()
    noisy = torch.where(torch.rand(ids.shape) < 0.6, MASK_ID, ids)
    with torch.no_grad():
        both = model(
            torch.cat((noisy, ids), 1), torch.cat((positions, positions), 1), noisy_clean_mask(docs, positions)
        )
        start, stop = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        served = torch.cat((ids[:, :start], noisy[:, start:stop]), 1)
        alone = model(served, positions[:, :stop], block_causal_mask(docs[:, :stop], positions[:, :stop]))
    torch.testing.assert_close(both[:, start:stop], alone[:, start:stop], rtol=0, atol=1e-12)


def test_clean_rows_do_not_see_the_noise() -> None:
    model = _model(torch.float64)
    ids, docs, positions = _row()
    mask = noisy_clean_mask(docs, positions)
    with torch.no_grad():
        pair = [
            model(torch.cat((noisy, ids), 1), torch.cat((positions, positions), 1), mask)[:, LENGTH:]
            for noisy in (torch.full_like(ids, MASK_ID), ids)
        ]
        alone = model(ids, positions, block_causal_mask(docs, positions))
    assert torch.equal(pair[0], pair[1])
    torch.testing.assert_close(pair[0], alone, rtol=0, atol=1e-12)


def test_packed_documents_do_not_see_each_other() -> None:
    model = _model(torch.float64)
    ids, docs, positions = _row()
    half = LENGTH // 2
    docs[:, half:] = 1
    positions = torch.cat((positions[:, :half], positions[:, :half]), 1)
    with torch.no_grad():
        packed = model(ids, positions, causal_mask(docs, positions))
        alone = model(ids[:, half:], positions[:, half:], causal_mask(docs[:, half:], positions[:, half:]))
    torch.testing.assert_close(packed[:, half:], alone, rtol=0, atol=1e-12)


def test_the_export_has_the_logits_of_transformers_qwen3(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _model(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of one would hide a swapped name
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tokenizer = Tokenizer.from_file(str(HERE / "braid-tiny" / "tokenizer.json"))
    export_model(model, tokenizer, tmp_path, torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(oracle).__name__ == "Qwen3ForCausalLM"
    ids, docs, positions = _row()
    with torch.no_grad():
        ours = model.logits(model(ids, positions, causal_mask(docs, positions)))
        theirs = oracle(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_export_of_a_diverged_model_is_refused(tmp_path: Path) -> None:
    model = _model(torch.float32)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    tokenizer = Tokenizer.from_file(str(HERE / "braid-tiny" / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"norm\.weight has values that are not finite"):
        export_model(model, tokenizer, tmp_path)
