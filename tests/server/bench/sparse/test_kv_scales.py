"""Calibration of fp8 KV: greatest magnitudes over all windows, and a file that makes large keys near again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from kernels.kv_format import FP8
from kernels.reference import ReferenceOps
from server.bench.sparse import kv_scales
from server.bench.sparse.passes import Texts, open_model
from server.models.checkpoint import checkpoint_hash
from server.models.registry import Model
from server.worker.kv_scales import read_scales
from tests.server.models.paged import PagedRunner
from tests.tiny import write_tiny_checkpoint

TOKENS = list(range(5, 45))


def measured(folder: Path, texts: list[list[int]]) -> Tensor:
    model, ops = open_model(folder, 40)
    return kv_scales.measure(model, Texts(model.config, ops, 40), texts, tqdm(disable=True))[0]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_magnitudes_are_those_of_another_implementations_cache(model_type: str, tmp_path: Path) -> None:
    window: dict[str, Any] = {"sliding_window": 8} if model_type == "mistral" else {}
    folder = write_tiny_checkpoint(tmp_path, model_type, **window)
    cache = DynamicCache()
    with torch.inference_mode():
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            torch.tensor([TOKENS]), past_key_values=cache, use_cache=True
        )
    expected = torch.stack(
        [torch.stack([x[0].abs().amax((1, 2)) for x in (layer.keys, layer.values)]) for layer in cache.layers]
    )
    assert torch.allclose(measured(folder, [TOKENS]), expected, rtol=1e-4)


def test_the_greatest_of_all_windows_counts_and_nothing_of_an_earlier_text_is_left(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    first, second = list(range(5, 45)), list(range(200, 230))
    apart = torch.maximum(measured(folder, [first]), measured(folder, [second]))
    assert torch.equal(measured(folder, [first, second]), apart)
    assert torch.equal(measured(folder, [second, first]), apart)
    assert not torch.equal(measured(folder, [first]), measured(folder, [second]))


@pytest.mark.parametrize(("model_type", "sees"), [("sdar", 4), ("llada", 40)])
def test_rows_of_a_model_that_denoises_see_their_block_or_everything(
    model_type: str, sees: int, tmp_path: Path
) -> None:
    """A change of the last token reaches the first layer-1 key that sees it, and no earlier one."""
    folder = write_tiny_checkpoint(tmp_path, model_type)
    model, ops = open_model(folder, 40)
    pages = Texts(model.config, ops, 40)

    def second_layer(tokens: list[int]) -> Tensor:
        pages.read(model, tokens)
        return list(pages.stored(40))[1][0].clone()

    differs = (second_layer(TOKENS) != second_layer([*TOKENS[:-1], 7])).flatten(1).any(1)
    assert differs.nonzero().flatten().tolist() == list(range(40 - sees, 40))


def test_a_head_of_zeros_has_scale_1_and_others_their_magnitude_over_448() -> None:
    greatest = torch.tensor([[[0.0, 448.0], [1.0, 4.0]]])
    assert kv_scales.scales_of(greatest, 2.0).tolist() == [
        [[1.0, 2.0], [pytest.approx(2 / 448), pytest.approx(8 / 448)]]
    ]


def test_the_command_writes_what_a_server_reads_and_large_keys_come_near_again(tmp_path: Path) -> None:
    folder, text, file = write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "scales.json"
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        tensors[name] *= 3000.0 if "k_proj" in name else 1 / 3000.0 if "q_proj" in name else 1.0
    save_file(tensors, folder / "model.safetensors")
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    command = [str(folder), "--output", str(file), "--corpus", str(text), "--window", "64", "--tokens", "128"]
    assert kv_scales.main([*command, "--no-progress", "--headroom", "1.5"]) == 0
    found = json.loads(file.read_text())
    assert (found["model_hash"], found["tokens"], found["headroom"]) == (checkpoint_hash(folder), 128, 1.5)
    model, _ = open_model(folder, 64)
    scales = read_scales(file, model.config, checkpoint_hash(folder))

    def logits(model: Model, kv_dtype: torch.dtype) -> Tensor:
        return PagedRunner(model, ReferenceOps(), 1, 40, kv_dtype=kv_dtype).run([(0, 0, TOKENS)])[0]

    exact = logits(model, torch.float32)
    error = (logits(model.scaled(scales), FP8) - exact).norm() / exact.norm()
    clipped = (logits(model, FP8) - exact).norm() / exact.norm()
    assert error < 0.05
    assert clipped > 5 * error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--headroom", "0.5"], "--headroom is 0.5; it must be between 1 and 64"),
        (["--corpus", "nowhere.txt"], "corpus 'nowhere.txt' is neither pairs nor stdlib nor a text file"),
        (["--window", "4096"], "max_model_len is 4096"),
    ],
)
def test_what_cannot_be_calibrated_is_said_and_no_file_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = write_tiny_checkpoint(tmp_path / "model"), tmp_path / "scales.json"
    assert kv_scales.main([str(folder), "--output", str(file), *options]) == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_a_corpus_shorter_than_a_window_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("short")
    command = [str(folder), "--output", str(tmp_path / "s.json"), "--corpus", str(text), "--window", "64"]
    assert kv_scales.main([*command, "--no-progress"]) == 2
    assert "fewer tokens than a window" in capsys.readouterr().err
