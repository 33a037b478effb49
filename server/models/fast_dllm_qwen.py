"""Fast-dLLM v2: Qwen2.5's layout, trained on to denoise blocks of 32; row i answers for token i + 1, as Qwen's did.

Run under a causal mask the weights would still generate token by token; nobody has published what comes out, so here
they denoise only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models import qwen2
from server.models.config import ModelConfig
from server.models.diffusion import denoising

MASK, END_OF_TURN, BLOCK = 151665, 151645, 32


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    return denoising(
        qwen2.read_config(raw),
        raw,
        mask_token_id=MASK,
        block_size=BLOCK,
        eos_token_id=END_OF_TURN,
        logit_shift=1,
        block_size_name="bd_size",
    )
