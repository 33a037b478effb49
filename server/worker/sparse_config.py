"""What a worker is told about sparse attention. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.types import AttentionMethod


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """What a worker's KV memory is made for.

    methods      those that requests may choose, at least one
    calibration  files of the calibration commands: channels (safetensors) for double_sparsity, layers (JSON) for tidal
    num_channels of a label; None = a quarter of the head size, at least 4: an eighth loses single keys
    """

    methods: tuple[AttentionMethod, ...]
    calibration: tuple[str, ...] = ()
    num_channels: int | None = None
