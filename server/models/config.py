"""What a checkpoint's config.json says, read without transformers and checked before any weight is touched.

A feature of the file that we do not implement is refused by name, never ignored: a model that runs with the wrong mask
or scale gives fluent wrong text. The family files say which fields mean what; this file holds what they share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.models.quantization import refusal
from server.models.rope import Rope, read_rope

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_REFUSED = {
    "attn_logit_softcapping": "attention soft-capping is not supported",
    "final_logit_softcapping": "logit soft-capping is not supported",
    "attention_sinks": "attention sinks are not supported",
}


class CheckpointError(ValueError):
    """The checkpoint cannot be served; the message is for the person who named it."""


@dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts: in the layers of `sparse_layers`, `top_k` of `num_experts` MLPs of `intermediate_size`.

    shared_size  one more MLP of this size that every token goes through; 0 = none
    is_sigmoid   scores are sigmoids, and a bias per expert takes part in the choice
    The others are those of `kernels.routing.Router`.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]
    shared_size: int = 0
    is_sigmoid: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer.

    max_position  longest sequence in tokens, RoPE scaling included
    fused_qkv     the file has q, k and v of a layer as one tensor
    windows       per layer: sliding window in tokens, the token itself included, or None
    dtype         as published, None where the file does not say; of a loaded model: what it runs in
    eos_token_ids config.json's and generation_config.json's together
    mask_token_id, block_size  of checkpoints that denoise
    block_size_is_default  nothing fixes the block size: the model is bidirectional, or its file does not say (the
                   family's usual one is stated then)
    bidirectional  it denoises a whole canvas: every row sees every key; else rows see blocks up to their own
    logit_shift    1: when it denoises, row i answers for token i + 1
    is_causal      it generates token by token, too
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: Rope
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False
    moe: Moe | None = None
    dtype: torch.dtype | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    block_size: int | None = None
    block_size_is_default: bool = False
    bidirectional: bool = False
    logit_shift: int = 0
    is_causal: bool = True

    @property
    def sliding_window(self) -> int | None:
        """The window that all layers share, or None where any layer sees everything."""
        return self.windows[0] if len(set(self.windows)) == 1 else None


@dataclass(frozen=True, slots=True)
class Fields:
    """config.json with checked access: every getter raises CheckpointError naming the field."""

    raw: Mapping[str, Any]

    def get(self, name: str) -> Any:
        return self.raw.get(name)

    def integer(self, name: str, minimum: int = 1, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise CheckpointError(f"config.json: {name} is {value!r}; an integer >= {minimum} is needed")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"config.json: {name} is {value!r}; a positive number is needed")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} is {value!r}; true or false is needed")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of non-negative integers; a single one counts as a list, null as an empty one."""
        value = self.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
            raise CheckpointError(f"config.json: {name} is {value!r}; token or layer numbers are needed")
        return tuple(values)

    def expect(self, only: Mapping[str, Any]) -> None:
        """Refuse an entry that says something else than `only` does; one that is missing or null says nothing."""
        for name, value in only.items():
            if self.get(name) not in (None, value):
                raise CheckpointError(f"config.json: {name} is {self.get(name)!r}; supported: {value!r}")

    def token(self, name: str) -> int | None:
        """An optional token id; of several, the first."""
        ids = self.integers(name)
        return ids[0] if ids else None


def with_defaults(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> Fields:
    """The file with a family's published defaults in place of missing entries; an explicit null stays null."""
    return Fields({**defaults, **raw})


def read_raw(folder: Path) -> dict[str, Any]:
    """config.json as a mapping, with generation_config.json's end-of-text ids joined to its own."""
    raw = _read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        generation = Fields(_read_json(folder / "generation_config.json"))
        raw["eos_token_id"] = list(
            dict.fromkeys(Fields(raw).integers("eos_token_id") + generation.integers("eos_token_id"))
        )
    return raw


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; a checkpoint folder needs one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def common_config(
    raw: Mapping[str, Any],
    *,
    windows: Sequence[int | None] | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    fused_qkv: bool = False,
    partial_rotary: bool = False,
    moe: Moe | None = None,
) -> ModelConfig:
    """A ModelConfig of the fields all families share; the keyword arguments are what a family makes of the rest.

    partial_rotary  the file may say that only the first part of each head is rotated
    """
    fields = Fields(raw)
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    head_dim = fields.integer("head_dim", default=max(1, hidden_size // num_heads))
    _check_heads(num_heads, num_kv_heads, head_dim)
    vocab_size = fields.integer("vocab_size")
    try:
        rope = read_rope(raw, head_dim, fields.integer("max_position_embeddings"), partial_rotary)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None
    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=rope.max_position,
        rope=rope,
        windows=tuple(windows) if windows is not None else (None,) * num_layers,
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        fused_qkv=fused_qkv,
        moe=moe,
        dtype=_read_dtype(raw),
        bos_token_id=fields.token("bos_token_id"),
        eos_token_ids=within_vocab("eos_token_id", fields.integers("eos_token_id"), vocab_size),
        pad_token_id=fields.token("pad_token_id"),
        mask_token_id=fields.token("mask_token_id"),
        block_size=fields.integer("block_size") if fields.get("block_size") is not None else None,
    )


def _check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads is {num_heads}, not a multiple of num_key_value_heads, {num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}; rotary embeddings need an even one")


def layer_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's rule: `use_sliding_window` opens it; `layer_types`, else `max_window_layers`, say which layers slide."""
    num_layers = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window") if fields.boolean("use_sliding_window") else None
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", minimum=0, default=num_layers)
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types must name the kind of each of the {num_layers} layers")
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        raise CheckpointError(f"config.json: layer_types has {unknown}; supported: full_attention, sliding_attention")
    if "sliding_attention" in kinds and window is None:
        raise CheckpointError("config.json: layer_types has sliding_attention, but use_sliding_window is false")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refuse_unsupported(fields: Fields) -> None:
    for name, reason in _REFUSED.items():
        if fields.raw.get(name) not in (None, False):
            raise CheckpointError(f"config.json: {name} is set, but {reason}")
    quantization = fields.get("quantization_config")
    if quantization not in (None, False) and (problem := refusal(quantization)) is not None:
        raise CheckpointError(f"config.json: quantization_config is set, but {problem}")
    activation = fields.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act is {activation!r}; supported: silu")


def _read_dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise CheckpointError(f"config.json: dtype is {name!r}; supported: {', '.join(DTYPES)}")
    return DTYPES[name.removeprefix("torch.")]


def within_vocab(name: str, ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """`ids`, if all are below `vocab_size`; CheckpointError naming the field if not."""
    if any(token >= vocab_size for token in ids):
        raise CheckpointError(f"config.json: {name} is {list(ids)}, but vocab_size is {vocab_size}")
    return ids
