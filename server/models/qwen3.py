"""Qwen3 (dense): per-head RMSNorm on q and k, explicit head_dim, no qkv bias unless stated.

The embedded checkpoints have this shape too; their `mask_token_id` and `block_size` add a second way of decoding to
the same forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.config import ModelConfig, common_config, layer_windows, with_defaults

DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = with_defaults(raw, DEFAULTS)
    bias = fields.boolean("attention_bias")
    return common_config(fields.raw, windows=layer_windows(fields), qkv_bias=bias, output_bias=bias, qk_norm=True)
