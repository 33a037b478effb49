"""What calibration found out about a checkpoint's attention, read from its files.

- label channels of `double_sparsity`: safetensors with `channels`, int16 [layers, kv heads, head_dim], each row a
  permutation of a key's elements, most important first, and `model_hash` in its metadata. There is no default.
- layers of `tidal`: JSON {"selection_layer": s, "reselection_layer": c or null}, with `model_hash` if it has one.
  Without a file s = 2 and c at 13/32 of the depth, the published choice for 32 layers.
A file of another checkpoint would serve and choose badly, so the hash must be that of the served weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.sparse import DENSE_LAYERS
from server.models.config import ModelConfig


class Calibration:
    """The files given, by kind. Raises ValueError for one of neither kind, and for two of one.

    model_hash  of the served checkpoint; None = its weights are random, and no file can be of it
    """

    def __init__(self, files: tuple[str, ...], model_hash: str | None) -> None:
        self.channels: Path | None = None
        self.layers: Path | None = None
        self._model_hash = model_hash
        for name in files:
            path = Path(name)
            if path.suffix not in (".safetensors", ".json"):
                raise ValueError(f"attention-calibration is {name}: expected a .safetensors file or a .json file")
            kind = "channels" if path.suffix == ".safetensors" else "layers"
            if getattr(self, kind) is not None:
                raise ValueError(f"attention-calibration names two files of {kind}: {getattr(self, kind)} and {name}")
            if not path.is_file():
                raise ValueError(f"attention-calibration: there is no file {name!r}")
            setattr(self, kind, path)

    def check(self, path: Path, model_hash: object) -> None:
        if model_hash != self._model_hash:
            raise ValueError(
                f"attention-calibration {path} is of the checkpoint {model_hash}, but {self._model_hash} is served; "
                "calibrate this one"
            )


def load_channels(calibration: Calibration, model: ModelConfig, count: int) -> Tensor:
    """The first `count` channels of each layer and kv head, int32 [L, K, count]. Raises ValueError."""
    path = calibration.channels
    if path is None:
        raise ValueError(
            "double_sparsity needs the label channels of this model: give their file with attention-calibration"
        )
    if not 1 <= count <= model.head_dim:
        raise ValueError(f"attention-channels is {count}, but must be between 1 and the head size {model.head_dim}")
    try:
        with safe_open(path, framework="pt") as file:
            channels, metadata = file.get_tensor("channels"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"attention-calibration {path} has no channels: {error}") from error
    calibration.check(path, metadata.get("model_hash"))
    shape = (model.num_layers, model.num_kv_heads, model.head_dim)
    if channels.dtype != torch.int16 or tuple(channels.shape) != shape:
        raise ValueError(
            f"attention-calibration {path} has channels {channels.dtype} {list(channels.shape)}, "
            f"expected int16 {list(shape)}"
        )
    if not torch.equal(channels.sort(dim=2).values, torch.arange(model.head_dim, dtype=torch.int16).expand(shape)):
        raise ValueError(f"attention-calibration {path}: channels are not an order of the {model.head_dim} of a key")
    chosen: Tensor = channels[:, :, :count].int().contiguous()
    return chosen


def load_tidal(calibration: Calibration, num_layers: int) -> tuple[int, tuple[int, ...]]:
    """(selection layer, re-selection layers) of `tidal`. Raises ValueError."""
    path = calibration.layers
    if path is None:
        again = round(num_layers * 13 / 32)
        return DENSE_LAYERS, (again,) if again > DENSE_LAYERS + 1 else ()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        first, again = found["selection_layer"], found["reselection_layer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"attention-calibration {path} is not as expected: {error!r}") from error
    if "model_hash" in found:
        calibration.check(path, found["model_hash"])
    if type(first) is not int or not DENSE_LAYERS <= first < num_layers:
        raise ValueError(
            f"attention-calibration {path}: selection_layer is {first!r}, not in [{DENSE_LAYERS}, {num_layers})"
        )
    if again is not None and (type(again) is not int or not first < again < num_layers):
        raise ValueError(
            f"attention-calibration {path}: reselection_layer is {again!r}, not in ({first}, {num_layers})"
        )
    return first, () if again is None else (again,)
