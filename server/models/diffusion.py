"""What config.json says of a model that writes by denoising and in no other way.

Its published code keeps the mask's id and the block size now in config.json, now in the code that generates; so each
family states what its publishers use, and the file, where it says something, wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.models.config import CheckpointError, Fields, ModelConfig, within_vocab


def denoising(
    config: ModelConfig,
    raw: Mapping[str, Any],
    *,
    mask_token_id: int,
    block_size: int,
    eos_token_id: int | None = None,
    bidirectional: bool = False,
    logit_shift: int = 0,
    block_size_name: str = "block_size",
) -> ModelConfig:
    """`config` of a model that denoises and does not generate token by token; ids and size where `raw` has none.

    block_size_name  the entry of config.json that has the block size

    Raises CheckpointError if an id is outside the vocabulary, or a layer has a sliding window: nobody has published
    what it means to rows that see keys behind them.
    """
    if any(window is not None for window in config.windows):
        raise CheckpointError(
            "config.json: use_sliding_window is set, but a model that denoises sees whole blocks; a window over them "
            "is not supported"
        )
    mask = config.mask_token_id if config.mask_token_id is not None else mask_token_id
    stated = Fields(raw).integer(block_size_name) if raw.get(block_size_name) is not None else None
    ends = config.eos_token_ids or (() if eos_token_id is None else (eos_token_id,))
    within_vocab("mask_token_id", (mask,), config.vocab_size)
    if mask in ends:
        raise CheckpointError(f"config.json: token {mask} is both mask_token_id and an eos_token_id")
    return replace(
        config,
        mask_token_id=mask,
        block_size=block_size if stated is None else stated,
        block_size_is_default=bidirectional or stated is None,
        eos_token_ids=within_vocab("eos_token_id", ends, config.vocab_size),
        bidirectional=bidirectional,
        logit_shift=logit_shift,
        is_causal=False,
    )
