"""Llama 2, 3 and 3.x, and everything published under their `model_type`: biases are optional, RoPE may be scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.config import Fields, ModelConfig, common_config


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    attention_bias = fields.boolean("attention_bias")
    return common_config(raw, qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=fields.boolean("mlp_bias"))
