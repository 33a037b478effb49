"""A subset of a model's layers is the model that has no other layers, over the pages of the whole one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.reference import ReferenceOps
from server.models.layers import Decoder
from server.models.loading import load_model
from tests.server.models.paged import PagedRunner
from tests.tiny import write_tiny_checkpoint

TOKENS = tuple(range(5, 30))


def load(folder: Path) -> Decoder:
    model = load_model(folder, ReferenceOps(), torch.float32, torch.device("cpu"))
    assert isinstance(model, Decoder)
    return model


def without_layer(folder: Path, layer: int, path: Path) -> Path:
    """The checkpoint with one layer taken out and those after it moved up."""
    path.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = [i - (i > layer) for i in config["mlp_only_layers"] if i != layer]
    (path / "config.json").write_text(json.dumps(config))
    kept = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found is None:
            kept[name] = tensor
        elif (index := int(found[1])) != layer:
            kept[f"model.layers.{index - (index > layer)}.{found[2]}"] = tensor
    save_file(kept, path / "model.safetensors")
    return path


@pytest.mark.parametrize(("model_type", "layer"), [("qwen3", 1), ("llama", 2), ("qwen3_moe", 1)])
def test_a_subset_of_layers_is_the_model_without_the_others(tmp_path: Path, model_type: str, layer: int) -> None:
    sparse: dict[str, Any] = {"mlp_only_layers": [0]} if model_type == "qwen3_moe" else {}
    folder = write_tiny_checkpoint(tmp_path / "whole", model_type, num_hidden_layers=3, **sparse)
    whole = load(folder)
    part = whole.subset([i for i in range(3) if i != layer])
    (found,) = PagedRunner(part, ReferenceOps(), 1, 32).run([(0, 0, TOKENS)])
    other = load(without_layer(folder, layer, tmp_path / "part"))
    (expected,) = PagedRunner(other, ReferenceOps(), 1, 32).run([(0, 0, TOKENS)])
    assert torch.equal(found, expected)


def test_all_layers_are_the_model_and_a_subset_leaves_it_as_it_was(tmp_path: Path) -> None:
    whole = load(write_tiny_checkpoint(tmp_path / "whole", num_hidden_layers=3))
    (before,) = PagedRunner(whole, ReferenceOps(), 1, 32).run([(0, 0, TOKENS)])
    (same,) = PagedRunner(whole.subset(range(3)), ReferenceOps(), 1, 32).run([(0, 0, TOKENS)])
    (less,) = PagedRunner(whole.subset([0]), ReferenceOps(), 1, 32).run([(0, 0, TOKENS)])
    (after,) = PagedRunner(whole, ReferenceOps(), 1, 32).run([(0, 0, TOKENS)])
    assert torch.equal(before, same)
    assert torch.equal(before, after)
    assert not torch.equal(before, less)
