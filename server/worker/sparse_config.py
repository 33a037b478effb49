"""What a worker is told about sparse attention. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scheduler.types import AttentionMethod


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """What a worker's KV memory is made for.

    methods      those that requests may choose, at least one
    calibration  files of the calibration commands: channels (safetensors) for labels, layers (JSON) for tidal
    num_channels of a label; None = as `kernels.sparse.default_channels` says
    offload      K and V of the middle layers lie in host memory (server/worker/offload.py); double_sparsity alone
    offload_bytes  most of it that pages take; None = a share of what is free
    label_dtype  of labels: the model's, or codes of 4 bits with a scale for each key and head (kernels/label_codes.py)
    """

    methods: tuple[AttentionMethod, ...]
    calibration: tuple[str, ...] = ()
    num_channels: int | None = None
    label_dtype: Literal["model", "int4"] = "model"
    offload: bool = False
    offload_bytes: int | None = None
