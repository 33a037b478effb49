"""Files of calibration: what is read from them, and what is refused at start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.sparse import Method, Role
from scheduler.types import AttentionMethod, AttentionOffer
from server.models.checkpoint import checkpoint_hash
from server.worker.attention_calibration import Calibration, load_tidal
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.sparse_config import SparseConfig
from server.worker.worker import Worker
from tests.tiny import write_tiny_checkpoint

QUEST, LABELS, TIDAL = AttentionMethod.QUEST, AttentionMethod.DOUBLE_SPARSITY, AttentionMethod.TIDAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers, 2 kv heads of 16."""
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path, "llama", num_hidden_layers=4)
    return path


def channels_file(path: Path, model_hash: str, channels: Tensor | None = None) -> str:
    if channels is None:
        channels = torch.arange(16).flip(0).to(torch.int16).repeat(4, 2, 1)
    save_file({"channels": channels}, path, {"model_hash": model_hash})
    return str(path)


def worker(folder: Path, config: SparseConfig, **options: Any) -> Worker:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 1 << 20, "num_threads": 1}
    return build_worker(WorkerConfig(str(folder), attention=config, **(settings | options)), progress=False)


def test_a_worker_keeps_what_its_methods_need_and_pays_for_it(folder: Path, tmp_path: Path) -> None:
    file = channels_file(tmp_path / "c.safetensors", checkpoint_hash(folder))
    built = worker(folder, SparseConfig((QUEST, LABELS, TIDAL), (file,), num_channels=3), page_size=16)
    sparse = built._pool.sparse
    assert sparse is not None
    assert built.info.attention == (AttentionOffer(QUEST, 112), AttentionOffer(LABELS, 69), AttentionOffer(TIDAL, 69))
    assert [layer.bounds is None for layer in sparse.layers] == [True, True, False, False]
    assert sparse.layers[2].channels is not None
    assert sparse.layers[2].channels.tolist() == [[15, 14, 13]] * 2
    assert [layer.roles[Method.TIDAL] for layer in sparse.layers] == [Role.DENSE, Role.DENSE, Role.LIST, Role.FOLLOW]
    # Metadata comes out of the same memory: fewer pages, no more bytes.
    plain = build_worker(WorkerConfig(str(folder), "float32", "cpu", kv_cache_bytes=1 << 20, page_size=16), False)
    assert built.info.num_pages < plain.info.num_pages
    assert built.info.kv_bytes <= plain.info.kv_bytes


def test_labels_of_4_bits_leave_room_for_more_pages(folder: Path, tmp_path: Path) -> None:
    file = channels_file(tmp_path / "c.safetensors", checkpoint_hash(folder))
    asked = SparseConfig((LABELS,), (file,), num_channels=16)
    plain, coded = (worker(folder, config, page_size=16) for config in (asked, replace(asked, label_dtype="int4")))
    assert coded._pool.sparse is not None
    layer = coded._pool.sparse.layers[2]
    assert layer.labels is not None
    assert layer.labels.dtype == torch.uint8
    assert layer.label_scales is not None
    # 4 layers of K and V, and 2 of labels: 64 bytes of float32, or 8 of codes and 2 of a scale.
    keys = 2 * 16
    for built, label_bytes in ((plain, 64), (coded, 10)):
        bytes_of_page = keys * (4 * 2 * 64 + 2 * label_bytes)
        assert built.info.num_pages == (1 << 20) // bytes_of_page
        assert built.info.kv_bytes == built.info.num_pages * bytes_of_page


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SparseConfig((LABELS,)), "give their file with attention-calibration"),
        (SparseConfig((TIDAL,), ("none.json",)), "there is no file"),
        (SparseConfig((TIDAL,), ("a.txt",)), "expected a .safetensors file or a .json file"),
    ],
)
def test_files_that_lack_are_said_at_start(folder: Path, config: SparseConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worker(folder, config)


def test_channels_of_another_checkpoint_or_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    own = checkpoint_hash(folder)
    other = channels_file(tmp_path / "other.safetensors", "0" * 64)
    narrow = channels_file(tmp_path / "narrow.safetensors", own, torch.zeros(4, 2, 8, dtype=torch.int16))
    twice = channels_file(tmp_path / "twice.safetensors", own, torch.zeros(4, 2, 16, dtype=torch.int16))
    good = channels_file(tmp_path / "good.safetensors", own)
    for files, num, message in (
        ((other,), None, "is of the checkpoint 000"),
        ((narrow,), None, r"expected int16 \[4, 2, 16\]"),
        ((twice,), None, "not an order"),
        ((good,), 17, "must be between 1 and the head size 16"),
        ((good, narrow), None, "two files of channels"),
    ):
        with pytest.raises(ValueError, match=message):
            worker(folder, SparseConfig((LABELS,), files, num))


def test_models_that_these_methods_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "mistral", sliding_window=16)
    with pytest.raises(ValueError, match="sliding window"):
        worker(tmp_path, SparseConfig((QUEST,)))


def test_layers_of_tidal(tmp_path: Path) -> None:
    def found(value: object) -> tuple[int, tuple[int, ...]]:
        path = tmp_path / "layers.json"
        path.write_text(json.dumps(value))
        return load_tidal(Calibration((str(path),), "mine"), 12)

    assert load_tidal(Calibration((), None), 32) == (2, (13,))
    assert load_tidal(Calibration((), None), 4) == (2, ())
    assert found({"selection_layer": 3, "reselection_layer": 7}) == (3, (7,))
    assert found({"selection_layer": 2, "reselection_layer": None, "model_hash": "mine"}) == (2, ())
    for value, message in (
        ({"selection_layer": 1, "reselection_layer": None}, r"selection_layer is 1, not in \[2, 12\)"),
        ({"selection_layer": 4, "reselection_layer": 4}, r"reselection_layer is 4, not in \(4, 12\)"),
        ({"selection_layer": 2, "reselection_layer": 5, "model_hash": "other"}, "calibrate this one"),
        ([1], "is not as expected"),
        ({}, "selection_layer"),
    ):
        with pytest.raises(ValueError, match=message):
            found(value)
