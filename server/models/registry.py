"""Which `model_type` is read by which file, and what a model offers to the worker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.ops import AttentionRows, Ops
from server.models import (
    dream,
    fast_dllm_qwen,
    llada,
    llada2_moe,
    llama,
    mistral,
    qwen2,
    qwen3,
    qwen3_moe,
    sdar,
    sdar_moe,
)
from server.models.config import CheckpointError, ModelConfig, read_raw
from server.models.layers import Decoder, LayerOps
from server.models.packing import Weights
from server.models.rope import rotary_table

ReadConfig = Callable[[Mapping[str, Any]], ModelConfig]


@dataclass(frozen=True, slots=True)
class Family:
    """How a `model_type` is read.

    names  tensors that the checkpoint calls otherwise than we (who call them as Llama's are called): its name -> ours,
           without the last part, `{}` for each number. Names that are not here are the same
    """

    read_config: ReadConfig
    names: Mapping[str, str] = field(default_factory=dict)


MODELS: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(llama.read_config),
        "mistral": Family(mistral.read_config),
        "qwen2": Family(qwen2.read_config),
        "qwen3": Family(qwen3.read_config),
        "qwen3_moe": Family(qwen3_moe.read_config),
        "sdar": Family(sdar.read_config),
        "sdar_moe": Family(sdar_moe.read_config),
        "Fast_dLLM_Qwen": Family(fast_dllm_qwen.read_config),
        "llada": Family(llada.read_config, llada.NAMES),
        "Dream": Family(dream.read_config),
        "llada2_moe": Family(llada2_moe.read_config, llada2_moe.NAMES),
    }
)


class Model(Protocol):
    """What the worker runs."""

    config: ModelConfig
    num_weight_bytes: int

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Write each layer's K and V of all rows into `kv` and return hidden states [T, H], final norm applied."""
        ...

    def logits(self, hidden_JH: Tensor) -> Tensor:
        """float32 [J, V]."""
        ...

    def subset(self, layers: Collection[int]) -> Model:
        """The same weights running only these layers; `forward` takes the pages of all layers all the same."""
        ...

    def through(self, ops: LayerOps) -> Model:
        """The same weights whose layers run through `ops`: a wrapper of the back end that packed them."""
        ...

    def scaled(self, kv_scale_L2K: Tensor) -> Model:
        """The same weights over fp8 pages; kv_scale_L2K: float32 [layers, 2, kv heads] as in `Ops.qkv_rope_write`."""
        ...


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json; CheckpointError if its `model_type` or a feature is not supported."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise CheckpointError(f"config.json: model_type is {model_type!r}; supported: {', '.join(MODELS)}")
    return MODELS[model_type].read_config(raw)


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder."""
    return parse_config(read_raw(folder))


def build_model(
    config: ModelConfig, weights: Weights, ops: Ops, device: torch.device, max_model_len: int | None = None
) -> Model:
    """Assemble a model; its rotary table covers `max_model_len` positions (None = all the model has)."""
    served_len = max_model_len or config.max_position
    if served_len > config.max_position:
        raise CheckpointError(f"max_model_len is {served_len}, but the model's positions end at {config.max_position}")
    return Decoder(config, weights, ops, rotary_table(config.rope, served_len, device))
