"""Static scales of fp8 KV pages that a checkpoint carries: under which names, and what they must be.

A scale is what a stored key or value is multiplied by (`Ops.qkv_rope_write`); x / scale is rounded to e4m3. Writers of
checkpoints agree on that and on 448 as the largest code, not on the names: compressed-tensors and llm-compressor have
`self_attn.k_scale`, vLLM's own modules `self_attn.attn.k_scale`, AutoFP8 `k_proj.output_scale`, ModelOpt
`k_proj.k_scale`, and old files one `kv_scale` for both. A scale is of the whole layer, or one for each kv head.

Legend: L layers, K kv heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from server.models.checkpoint import Entry, file_names, read_entries, read_tensor
from server.models.config import CheckpointError, ModelConfig, read_raw
from server.models.registry import MODELS, parse_config

_NAMES = (
    ("self_attn.k_scale", "self_attn.attn.k_scale", "self_attn.k_proj.output_scale", "self_attn.k_proj.k_scale"),
    ("self_attn.v_scale", "self_attn.attn.v_scale", "self_attn.v_proj.output_scale", "self_attn.v_proj.v_scale"),
)
_OF_BOTH = "self_attn.kv_scale"
_DTYPES = ("F64", "F32", "F16", "BF16")


def find_scales(entries: Mapping[str, Entry], config: ModelConfig) -> list[tuple[str, str]] | None:
    """For each layer the names of its tensors for keys and for values; None if the files have none.

    Of several names for one scale the first counts, so that the others are tensors without a place.
    Raises CheckpointError if only some layers, or only keys or values, have one.
    """
    found = [_of_layer(entries, config, layer) for layer in range(config.num_layers)]
    missing = [
        (layer, what) for layer, pair in enumerate(found) for what, name in zip("kv", pair, strict=True) if not name
    ]
    if len(missing) == 2 * config.num_layers:
        return None
    if missing:
        layer, what = missing[0]
        raise CheckpointError(
            f"the checkpoint has scales of fp8 KV for some of its layers, but layer {layer} lacks its {what}_scale; "
            "it must have them for keys and values of all layers, or none"
        )
    return [(key or "", value or "") for key, value in found]


def _of_layer(entries: Mapping[str, Entry], config: ModelConfig, layer: int) -> list[str | None]:
    named: list[str | None] = []
    for candidates in _NAMES:
        ours = [f"model.layers.{layer}.{name}" for name in (*candidates, _OF_BOTH)]
        theirs = file_names(ours, MODELS[config.model_type].names)
        named.append(next((theirs[name] for name in ours if theirs[name] in entries), None))
    return named


def load_scales(folder: Path) -> Tensor | None:
    """float32 [L, 2, K] of a checkpoint folder, keys first; None if it carries none. Raises CheckpointError."""
    config, entries = parse_config(read_raw(folder)), read_entries(folder)
    names = find_scales(entries, config)
    if names is None:
        return None
    rows = [[_read(name, entries[name], config.num_kv_heads) for name in pair] for pair in names]
    return torch.stack([torch.stack(pair) for pair in rows])


def _read(name: str, entry: Entry, num_kv_heads: int) -> Tensor:
    """float32 [K] of one layer's keys or values."""
    sizes = [size for size in entry.shape if size != 1]
    if entry.dtype not in _DTYPES or (sizes and sizes != [num_kv_heads]):
        raise CheckpointError(
            f"{name} is {entry.dtype} {list(entry.shape)}; a scale of fp8 KV is one number, or one for each of the "
            f"{num_kv_heads} kv heads, of type {', '.join(_DTYPES)}"
        )
    scale = read_tensor(entry).float().reshape(-1)
    check_scale_values(name, scale)
    return scale.expand(num_kv_heads).clone()


def check_scale_values(name: str, scale: Tensor) -> None:
    """Raises CheckpointError for what nothing can be divided by."""
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"{name} is {scale.tolist()}; scales of fp8 KV are positive numbers")
