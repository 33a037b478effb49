"""Mistral: Llama whose every layer sees at most `sliding_window` tokens, the token itself included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.config import Fields, ModelConfig, common_config

PUBLISHED_WINDOW = 4096
"""What a file without the field means (the first release); null means no window."""


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    window: int | None = PUBLISHED_WINDOW
    if "sliding_window" in raw:
        window = None if raw["sliding_window"] is None else fields.integer("sliding_window")
    return common_config(raw, windows=(window,) * fields.integer("num_hidden_layers"))
