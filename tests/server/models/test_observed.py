"""A model that is looked at computes what it computes, and shows the queries and keys that meet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.reference import ReferenceOps
from server.models.loading import load_model
from server.models.observed import ObservedLayers
from tests.server.models.paged import PagedRunner
from tests.tiny import write_tiny_checkpoint


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen3_moe"])
def test_looking_changes_no_logit_and_every_layer_is_shown_once_a_step(tmp_path: Path, model_type: str) -> None:
    ops = ReferenceOps()
    model = load_model(write_tiny_checkpoint(tmp_path, model_type), ops, torch.float32, torch.device("cpu"))
    shown: list[tuple[Tensor, Tensor, float]] = []
    looked_at = model.through(ObservedLayers(ops, lambda q, k, scale: shown.append((q, k, scale))))
    tokens = tuple(range(5, 25))
    (plain,) = PagedRunner(model, ops, 1, 32).run([(0, 0, tokens)])
    (found,) = PagedRunner(looked_at, ops, 1, 32).run([(0, 0, tokens)])
    assert torch.equal(plain, found)
    assert len(shown) == model.config.num_layers
    for q_TQD, k_TKD, scale in shown:
        assert q_TQD.shape == (20, 4, 16)
        assert k_TKD.shape == (20, 2, 16)
        assert scale == 16**-0.5


def test_the_keys_shown_are_those_that_are_stored(tmp_path: Path) -> None:
    ops = ReferenceOps()
    model = load_model(write_tiny_checkpoint(tmp_path, "qwen3"), ops, torch.float32, torch.device("cpu"))
    shown: list[Tensor] = []
    runner = PagedRunner(model.through(ObservedLayers(ops, lambda q, k, scale: shown.append(k))), ops, 1, 32)
    runner.run([(0, 0, tuple(range(5, 25)))])
    for (k_pages, _), k_TKD in zip(runner._kv, shown, strict=True):
        stored = k_pages[runner._tables[0]].transpose(1, 2).flatten(0, 1)[:20]
        assert torch.equal(stored, k_TKD)
