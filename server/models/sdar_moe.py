"""SDAR with experts: what sdar.py is to Qwen3, to Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models import qwen3_moe
from server.models.config import ModelConfig
from server.models.diffusion import denoising
from server.models.sdar import BLOCK, MASK


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    return denoising(qwen3_moe.read_config(raw), raw, mask_token_id=MASK, block_size=BLOCK)
