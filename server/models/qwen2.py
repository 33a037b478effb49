"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and optionally a sliding window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.config import ModelConfig, common_config, layer_windows, with_defaults

DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    return common_config(raw, windows=layer_windows(with_defaults(raw, DEFAULTS)), qkv_bias=True)
