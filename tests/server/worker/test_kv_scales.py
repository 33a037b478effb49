"""`--kv-cache-scales`: the file, what refuses it, which scales a worker takes, and that its tokens stay its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.ops import Ops
from kernels.reference import ReferenceOps
from scheduler.types import Request, Sampling
from server.models.checkpoint import checkpoint_hash
from server.models.loading import load_model
from server.models.registry import Model
from server.worker import build
from server.worker.assembly import Parts
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.config import SpeculatorConfig
from server.worker.kv_scales import read_scales, write_scales
from server.worker.worker import Worker
from tests.server.worker.tiny_model import Driver
from tests.tiny import VOCAB_SIZE, write_tiny_checkpoint

LARGE = 4096.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """2 layers, 2 kv heads; keys 4,096 times as large as usual, queries as much smaller."""
    monkeypatch.setattr(build, "select_ops", lambda *_, **__: plain())
    return write_large(tmp_path / "model")


def plain() -> Ops:
    return ReferenceOps()


def write_large(path: Path) -> Path:
    folder = write_tiny_checkpoint(path)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        tensors[name] *= LARGE if "k_proj" in name else 1 / LARGE if "q_proj" in name else 1.0
    save_file(tensors, folder / "model.safetensors")
    return folder


def scales(number: float) -> Tensor:
    return torch.tensor([number, 1.0]).view(1, 2, 1).expand(2, 2, 2).clone()


def scales_file(path: Path, folder: Path, scale_L2K: Tensor) -> str:
    write_scales(path, scale_L2K, checkpoint_hash(folder), {"tokens": 1})
    return str(path)


def worker(folder: Path, **options: Any) -> Worker:
    settings: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "kv_cache_dtype": "fp8", "kv_cache_bytes": 1 << 20, "num_threads": 1,
        "remember_profile": False,
    }  # fmt: skip
    return build_worker(WorkerConfig(str(folder), **(settings | options)), progress=False)


def requests() -> list[Request]:
    prompts = [tuple((7 * i + j * j) % (VOCAB_SIZE - 4) + 4 for j in range(3 + 9 * i)) for i in range(5)]
    return [Request(str(i), p, max_tokens=12, sampling=Sampling(temperature=0)) for i, p in enumerate(prompts)]


def test_tokens_with_scales_are_the_same_alone_and_in_a_crowd_and_those_of_small_keys(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = scales_file(tmp_path / "scales.json", folder, scales(LARGE))
    with caplog.at_level(logging.INFO):
        together = Driver(worker(folder, kv_cache_scales=file)).generate(requests())
    assert f"the fp8 KV cache has the scales of {file}" in caplog.text
    alone = Driver(worker(folder, kv_cache_scales=file), chunk=5)
    assert [alone.generate([request])[0] for request in requests()] == together
    small = write_tiny_checkpoint(tmp_path / "small")
    assert Driver(worker(small)).generate(requests()) == together
    assert Driver(worker(folder)).generate(requests()) != together, "at scale 1 the keys are cut off"


def test_the_scales_of_a_checkpoint_are_taken_unless_a_file_is_given(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(LARGE)
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors")
    with caplog.at_level(logging.INFO):
        own = Driver(worker(folder)).generate(requests())
        wide = Driver(worker(folder, kv_cache_dtype="auto")).generate(requests())
    assert "has the scales of the checkpoint" in caplog.text
    assert "carries scales of an fp8 KV cache, which this one is not" in caplog.text
    file = scales_file(tmp_path / "scales.json", folder, scales(LARGE))
    assert Driver(worker(folder, kv_cache_scales=file)).generate(requests()) == own
    coarse = scales_file(tmp_path / "coarse.json", folder, scales(LARGE * 2**14))
    assert Driver(worker(folder, kv_cache_scales=coarse)).generate(requests()) != own
    small = write_tiny_checkpoint(tmp_path / "small")
    assert Driver(worker(small, kv_cache_dtype="auto")).generate(requests()) == wide


def test_without_scales_the_log_says_that_they_are_1(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        worker(folder)
        worker(folder, random_weights="hidden=64,layers=2,heads=4,kv_heads=2,mlp=96,vocab=320")
    said = [record.getMessage() for record in caplog.records if "scale 1 for all keys" in record.getMessage()]
    assert len(said) == 2
    assert str(folder) in said[0]
    assert str(folder) not in said[1], "its weights are not those of the folder that lends the tokenizer"


def test_a_draft_model_has_the_scales_of_its_own_checkpoint(folder: Path, tmp_path: Path) -> None:
    draft = write_large(tmp_path / "draft")
    tensors = load_file(draft / "model.safetensors")
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.self_attn.{kind}_scale": torch.tensor(8.0) for kind in "kv"}
    save_file(tensors, draft / "model.safetensors")
    speculation = SpeculatorConfig(drafters=("draft_model",), draft_model=str(draft))
    seen: list[tuple[Model, float]] = []
    original = Parts.assemble

    def assemble(parts: Any, *arguments: Any, **options: Any) -> Any:
        seen.extend((model, first_scale(model)) for model in (parts.model, parts.draft.model))
        return original(parts, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "assemble", assemble)
        file = scales_file(tmp_path / "scales.json", folder, scales(LARGE))
        built = worker(folder, kv_cache_scales=file, speculation=speculation)
    assert [scale for _, scale in seen] == [LARGE, 8.0]
    assert len(set(map(tuple, Driver(built).generate(requests())))) > 1


def first_scale(model: Any) -> float:
    return float(model._runs[0]._layers.layers[0][0].kv_scale_2K[0, 0])


def test_what_is_written_is_read_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    drawn = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0)) + 1e-3
    file = tmp_path / "deep" / "scales.json"
    write_scales(file, drawn, "abc", {"corpus": "none"})
    config = load_model(folder, ReferenceOps(), None, torch.device("cpu")).config
    assert torch.equal(read_scales(file, config, "abc"), drawn)
    assert json.loads(file.read_text())["corpus"] == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "auto"}, "kv-cache-scales is .* but kv-cache-dtype is auto; only fp8 pages have scales"),
        ({"kv_cache_dtype": "int8"}, "kv-cache-dtype is int8; only fp8"),
        ({"random_weights": "hidden=64,layers=2,heads=4,mlp=96,vocab=320"}, "but the weights are random"),
        ({"kv_cache_scales": "none.json"}, "there is no file 'none.json'"),
    ],
)
def test_a_file_that_nothing_would_read_is_refused(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    file = scales_file(tmp_path / "scales.json", folder, scales(1.0))
    with pytest.raises(ValueError, match=message):
        worker(folder, **({"kv_cache_scales": file} | options))


GOOD: dict[str, Any] = {"k_scale": [[1.0, 2.0], [3, 4.0]], "v_scale": [[1.0, 1.0], [1.0, 1.0]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_hash": "0" * 64}, "is of the checkpoint 0000.* is served; calibrate this one"),
        ({"k_scale": [[1.0, 2.0]]}, "k_scale must have a list for each of the 2 layers"),
        ({"v_scale": [[1.0, 2.0], [1.0]]}, "v_scale of layer 1 must have a number for each of the 2 kv heads"),
        ({"k_scale": [[1.0, True], [1.0, 1.0]]}, "k_scale of layer 0 is .* not numbers"),
        ({"k_scale": [[1.0, 0], [1.0, 1.0]]}, "not positive and finite"),
        ({"k_scale": [[1.0, float("nan")], [1.0, 1.0]]}, "not positive and finite"),
        ({"k_scale": [[1.0, 10**400], [1.0, 1.0]]}, "not positive and finite"),
        ({"k_scale": 3}, "k_scale must have a list"),
        ({"v_scale": None}, "v_scale must have a list"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scales.json"
    file.write_text(json.dumps({"model_hash": checkpoint_hash(folder)} | GOOD | change))
    with pytest.raises(ValueError, match=message):
        worker(folder, kv_cache_scales=str(file))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_hash": "a", "k_scale": []}', "[" * 100_000])
def test_a_file_of_something_else_is_refused(text: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scales.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="is not as expected"):
        worker(folder, kv_cache_scales=str(file))
