"""Rotary position embedding: the angle of every position, with the published ways of stretching them.

The table is fixed when the model is loaded. Keys already in pages were rotated by it, so a rule that depends on the
length a sequence happens to have now (dynamic NTK, longrope) is decided once, by the length the server allows
(`served_len`): up to the original length the model is the original one, beyond it the stretched one, for every
sequence. transformers decides anew at each forward; the two agree wherever its decision and ours name the same length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """RoPE of a model.

    kind          one of ROPE_TYPES
    theta         base wavelength
    dim           rotated elements of each head
    original_len  positions the unscaled model was trained for
    max_position  positions with scaling: stated, or original_len * factor where the published field is the unscaled one
    scaling       the kind's own numbers, checked
    """

    kind: str
    theta: float
    dim: int
    original_len: int
    max_position: int
    scaling: Mapping[str, Any] = field(default_factory=dict)


def read_rope(raw: Mapping[str, Any], head_dim: int, max_position: int, may_be_partial: bool = False) -> Rope:
    """From config.json: `rope_parameters` (newer) or `rope_scaling` + `rope_theta` (older spelling).

    may_be_partial  the family's heads rotate in part where `partial_rotary_factor` says so; others refuse it
    Raises ValueError naming what is wrong or not supported.
    """
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError("rope_parameters must be one flat object; a different one per layer type is not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # the name of the first Phi-3 files
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; supported: {', '.join(ROPE_TYPES)}")
    dim = _rotated(raw, scaling, head_dim)
    if dim != head_dim and not may_be_partial:
        raise ValueError(
            "partial_rotary_factor is set; heads that rotate in part are not supported for this model_type"
        )
    theta = _number(scaling, "rope_theta", _number(raw, "rope_theta", 10000.0))
    original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    original = max_position if original is None or kind in ("linear", "dynamic") else original
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise ValueError(f"original_max_position_embeddings is {original!r}; an integer >= 1 is needed")
    numbers = _read_scaling(kind, scaling, dim, max_position / original)
    if kind in ("linear", "dynamic", "yarn"):
        # These files state the length before scaling (serving engines agree on the product).
        max_position = max(max_position, int(original * numbers["factor"]))
    return Rope(kind, theta, dim, original, max_position, numbers)


def _rotated(raw: Mapping[str, Any], scaling: Mapping[str, Any], head_dim: int) -> int:
    """Rotated elements of each head: the first `partial_rotary_factor` of them."""
    factor = _number(scaling, "partial_rotary_factor", _number(raw, "partial_rotary_factor", 1.0))
    dim = int(head_dim * factor)
    if not 0 < dim <= head_dim or dim % 2:
        raise ValueError(
            f"partial_rotary_factor is {factor}; of {head_dim} elements it must leave an even number, at least 2"
        )
    return dim


def _read_scaling(kind: str, scaling: Mapping[str, Any], dim: int, stretch: float) -> dict[str, Any]:
    """The numbers `kind` needs; `stretch` = stated / original length, the factor of yarn and longrope by default."""
    if kind == "default":
        return {}
    if kind in ("linear", "dynamic"):
        return {"factor": _number(scaling, "factor")}
    if kind == "llama3":
        bands = {name: _number(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        if bands["high_freq_factor"] <= bands["low_freq_factor"]:
            raise ValueError("rope scaling: high_freq_factor must be greater than low_freq_factor")
        return bands
    numbers: dict[str, Any] = {"factor": _number(scaling, "factor", stretch), "attention_factor": None}
    if scaling.get("attention_factor") is not None:
        numbers["attention_factor"] = _number(scaling, "attention_factor")
    if kind == "yarn":
        for name in ("mscale", "mscale_all_dim"):
            numbers[name] = _number(scaling, name) if scaling.get(name) else None
        numbers |= {"beta_fast": _number(scaling, "beta_fast", 32.0), "beta_slow": _number(scaling, "beta_slow", 1.0)}
        return numbers | {"truncate": scaling.get("truncate", True) is not False}
    for name in ("short_factor", "long_factor"):
        values = scaling.get(name)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise ValueError(
                f"rope scaling: {name} must be a list of {dim // 2} numbers (half of the rotated elements)"
            )
        numbers[name] = [_number({name: value}, name) for value in values]
    return numbers


def _number(place: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = place.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"rope scaling: {name} is {value!r}; a positive number is needed")
    return float(value)


def rotary_table(rope: Rope, served_len: int, device: torch.device) -> Tensor:
    """float32 [served_len, dim]: per position, dim/2 cosines and then dim/2 sines, the attention factor in both."""
    frequencies, scale = _frequencies(rope, served_len)
    angles = torch.outer(torch.arange(served_len, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1).to(device)


def _frequencies(rope: Rope, served_len: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, float32 [dim / 2], and the factor on cosine and sine."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    plain = 1.0 / rope.theta**exponents
    numbers = rope.scaling
    if rope.kind == "linear":
        return plain / numbers["factor"], 1.0
    if rope.kind == "dynamic":
        stretched = max(served_len, rope.original_len) / rope.original_len
        growth = numbers["factor"] * stretched - (numbers["factor"] - 1)
        theta = rope.theta * growth ** (rope.dim / (rope.dim - 2))
        return 1.0 / theta**exponents, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain), _yarn_attention_factor(numbers)
    if rope.kind == "longrope":
        return _longrope(rope, exponents, served_len)
    return plain, 1.0


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended. Source: Llama 3.1's release."""
    low, high, factor = (float(rope.scaling[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = rope.original_len * plain / (2 * math.pi)  # how often the wave turns within the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / factor + kept * plain


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """Blend of plain and stretched frequencies along the pairs. Source: Peng et al., "YaRN" (2023), section 3.2."""
    numbers = rope.scaling

    def pair_with(turns: float) -> float:
        """The (fractional) pair whose wave turns this often within the original length."""
        return rope.dim * math.log(rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_with(numbers["beta_fast"]), pair_with(numbers["beta_slow"])
    if numbers["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = last - first if last != first else 0.001
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return plain / float(numbers["factor"]) * stretched + plain * (1 - stretched)


def _yarn_attention_factor(numbers: Mapping[str, Any]) -> float:
    if numbers["attention_factor"] is not None:
        return float(numbers["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if numbers["factor"] <= 1 else 0.1 * weight * math.log(numbers["factor"]) + 1.0

    if numbers["mscale"] and numbers["mscale_all_dim"]:
        return mscale(numbers["mscale"]) / mscale(numbers["mscale_all_dim"])
    return mscale(1.0)


def _longrope(rope: Rope, exponents: Tensor, served_len: int) -> tuple[Tensor, float]:
    """Per-pair factors, the long list where more than the original length is served. Source: Ding et al. (2024)."""
    numbers = rope.scaling
    factors = torch.tensor(numbers["long_factor" if served_len > rope.original_len else "short_factor"])
    scale = numbers["attention_factor"]
    if scale is None:
        growth = numbers["factor"]
        scale = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(rope.original_len))
    return 1.0 / (factors * rope.theta**exponents), scale
