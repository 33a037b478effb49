"""SDAR (dense): Qwen3's weights and layout, trained on to denoise blocks; rows see all blocks up to their own.

Released with blocks of 4 (also 8 to 64); not every file says which, and what ends a text stands in
generation_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models import qwen3
from server.models.config import ModelConfig
from server.models.diffusion import denoising

MASK, BLOCK = 151669, 4


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    return denoising(qwen3.read_config(raw), raw, mask_token_id=MASK, block_size=BLOCK)
