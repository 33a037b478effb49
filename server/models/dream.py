"""Dream: Qwen2.5's layout without a mask: every row sees the whole canvas, and row i answers for token i + 1.

The file states Qwen's 131072 positions; its publishers trained and recommend 2048.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models import qwen2
from server.models.config import CheckpointError, Fields, ModelConfig
from server.models.diffusion import denoising

MASK, END_OF_TEXT, BLOCK = 151666, 151643, 32


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    if Fields(raw).boolean("use_mrope"):
        raise CheckpointError("config.json: use_mrope is set; multimodal rotary embeddings are not supported")
    return denoising(
        qwen2.read_config(raw),
        raw,
        mask_token_id=MASK,
        block_size=BLOCK,
        eos_token_id=END_OF_TEXT,
        bidirectional=True,
        logit_shift=1,
    )
