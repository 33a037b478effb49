"""Qwen3 (dense): per-head RMSNorm on q and k, explicit head_dim, no qkv bias unless stated.

The embedded checkpoints have this shape too; their `mask_token_id` and `block_size` add a second way of decoding to
the same forward, and `bidirectional` makes it the only one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.config import ModelConfig, common_config, layer_windows, with_defaults
from server.models.diffusion import denoising

DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = with_defaults(raw, DEFAULTS)
    bias = fields.boolean("attention_bias")
    config = common_config(fields.raw, windows=layer_windows(fields), qkv_bias=bias, output_bias=bias, qk_norm=True)
    if not fields.boolean("bidirectional"):
        return config
    mask, block = fields.integer("mask_token_id", minimum=0), fields.integer("block_size")
    return denoising(config, raw, mask_token_id=mask, block_size=block, bidirectional=True)
