"""Models from checkpoint folders, or of any published shape with random weights.

Peak memory is the packed model plus one layer's largest projection: tensors are read, joined, packed and dropped one
after another. Nothing here runs code that came with a checkpoint.
"""

from __future__ import annotations

import logging
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.ops import Ops
from server.models.checkpoint import Entry, check_against, file_names, read_entries, read_tensor
from server.models.config import CheckpointError, ModelConfig, read_raw
from server.models.kv_scales import find_scales
from server.models.layers import FLOAT32, weight_shapes
from server.models.locate import resolve_model
from server.models.registry import MODELS, Model, build_model, parse_config

__all__ = ["load_model", "random_model", "resolve_model"]

logger = logging.getLogger(__name__)

_UNUSED = ("rotary_emb.inv_freq",)
"""Buffers that old exports carry; we compute them."""

_HEAD = "lm_head.weight"

_SPEC = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
    "head_dim": "head_dim",
    "max_len": "max_position_embeddings",
    "window": "sliding_window",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_mlp": "moe_intermediate_size",
}
_SPECIAL = ("model_type", "tie", "on_device")
_REQUIRED = ("hidden", "layers", "heads", "mlp", "vocab")


def load_model(
    path: Path,
    ops: Ops,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: bool = False,
    max_model_len: int | None = None,
) -> Model:
    """The model of a checkpoint folder (see `resolve_model`).

    dtype          float32, bfloat16 or float16; None = as published, float32 where the file does not say
    progress       a progress bar on stderr, if that is a terminal
    max_model_len  longest sequence served, in tokens; None = all positions. It sizes the rotary table and decides the
                   length-dependent RoPE scalings (rope.py)
    Scales of fp8 KV that the files carry are left where they are (`kv_scales.load_scales`, `Model.scaled`).
    Raises CheckpointError naming the field, tensor or file.
    """
    raw = read_raw(path)
    config = parse_config(raw)
    if raw.get("auto_map"):
        logger.warning("%s: config.json's auto_map is ignored; no code from a checkpoint is run", path)
    entries, shapes = read_entries(path), dict(weight_shapes(config))
    names = file_names((*shapes, _HEAD), MODELS[config.model_type].names)
    unused = (*_UNUSED, names[_HEAD]) if config.tie_word_embeddings else _UNUSED
    scales = [name for pair in find_scales(entries, config) or () for name in pair]
    check_against(entries, {names[name]: shape for name, shape in shapes.items()}, (*unused, *scales))
    config = replace(config, dtype=dtype or config.dtype or torch.float32)
    bar_off = not (progress and sys.stderr.isatty())
    with tqdm(total=len(shapes), desc="weights", unit="tensor", disable=bar_off) as bar:
        weights = CheckpointWeights({name: entries[names[name]] for name in shapes}, config, device, bar.update)
        return build_model(config, weights, ops, device, max_model_len)


class CheckpointWeights:
    """`layers.Weights` of checked safetensors entries, by our names; calls `advance` once per tensor."""

    def __init__(
        self, entries: Mapping[str, Entry], config: ModelConfig, device: torch.device, advance: Callable[[], Any]
    ) -> None:
        self._entries = entries
        self._dtype = config.dtype
        self._device = device
        self._advance = advance

    def take(self, name: str) -> Tensor:
        dtype = torch.float32 if name.endswith(FLOAT32) else self._dtype
        tensor = read_tensor(self._entries[name]).to(device=self._device, dtype=dtype)
        self._advance()
        return tensor


def random_model(
    spec: str,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    max_model_len: int | None = None,
) -> Model:
    """A model of the given shape with seeded random weights, for measuring a machine without a download.

    spec  "hidden=768,layers=12,heads=12,kv_heads=4,mlp=3072,vocab=8192"; optional: model_type (llama), kv_heads
          (= heads), head_dim (hidden / heads), max_len (4096), tie (0 or 1), window; for qwen3_moe also experts,
          top_k, expert_mlp; on_device (0 or 1): drawn by the device, 8e9 weights in a second instead of a minute
    The same spec and seed give the same weights on every machine, whatever the order of loading; with on_device, on
    every machine with such a device.
    Raises CheckpointError naming the entry.
    """
    raw = parse_spec(spec)
    drawn_on = device if raw.pop("on_device") else torch.device("cpu")
    config = replace(parse_config(raw), dtype=dtype)
    weights = RandomWeights(config, device, seed, drawn_on)
    return build_model(config, weights, ops, device, max_model_len)


def parse_spec(spec: str) -> dict[str, Any]:
    """The fields that a checkpoint's config.json would have, and `on_device`. Raises CheckpointError."""
    entries: dict[str, str] = {}
    for part in spec.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise CheckpointError(f"random weights: {part.strip()!r} is not of the form name=value")
        if key not in (*_SPEC, *_SPECIAL):
            known = ", ".join((*_SPEC, *_SPECIAL))
            raise CheckpointError(f"random weights: {key!r} is not known; known are {known}")
        if key in entries:
            raise CheckpointError(f"random weights: {key} is given twice")
        entries[key] = value
    missing = [key for key in _REQUIRED if key not in entries]
    if missing:
        raise CheckpointError(f"random weights: {', '.join(missing)} must be given, as in hidden=768,layers=12,...")
    model_type = entries.pop("model_type", "llama")
    flags = {key: _flag(key, entries.pop(key, "0")) for key in ("tie", "on_device")}
    raw: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": flags["tie"]}
    raw["on_device"] = flags["on_device"]
    raw |= {_SPEC[key]: _integer(key, value) for key, value in entries.items()}
    raw.setdefault("max_position_embeddings", 4096)
    raw.setdefault("head_dim", max(1, raw["hidden_size"] // max(1, raw["num_attention_heads"])))
    if "sliding_window" in raw:
        raw |= {"use_sliding_window": True, "max_window_layers": 0}
    elif model_type == "mistral":
        raw["sliding_window"] = None
    return raw


def _flag(key: str, value: str) -> bool:
    if value not in ("0", "1", "false", "true"):
        raise CheckpointError(f"random weights: {key} is {value!r}; 0 or 1 is needed")
    return value in ("1", "true")


def _integer(key: str, value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise CheckpointError(f"random weights: {key} is {value!r}; an integer >= 1 is needed")
    return number


class RandomWeights:
    """`layers.Weights` drawn per tensor from (seed, name), scaled so that activations keep their size with depth."""

    def __init__(self, config: ModelConfig, device: torch.device, seed: int, drawn_on: torch.device) -> None:
        self._shapes, self._drawn_on = dict(weight_shapes(config)), drawn_on
        self._branch_scale = 1 / math.sqrt(2 * config.num_layers)
        self._dtype = config.dtype
        self._device = device
        self._seed = seed

    def take(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        # torch's CPU generator keeps 32 bits of a seed, so both go into one hash.
        generator = torch.Generator(self._drawn_on).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        scale = 0.02 if name.endswith(".bias") else 1.0 if "embed" in name else shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= self._branch_scale
        tensor = torch.empty(shape, device=self._drawn_on).normal_(0.0, scale, generator=generator)
        return tensor.to(device=self._device, dtype=torch.float32 if name.endswith(FLOAT32) else self._dtype)
