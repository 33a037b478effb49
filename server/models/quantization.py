"""What config.json's `quantization_config` may say: nothing about weights, and fp8 KV as our pages hold it.

Such checkpoints are the original weights with scales beside them (`kv_scales.py`); llm-compressor writes them when its
recipe has a `kv_cache_scheme` alone. Whether the KV is kept in fp8 stays the server's choice (`--kv-cache-dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping

_WEIGHTS = "quantised checkpoints are not supported; load the original weights (see --quantization)"
_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (True, None),
    "dynamic": (False, None),
    "strategy": ("tensor", "attn_head", None),
}


def refusal(value: object) -> str | None:
    """Why a checkpoint with this `quantization_config` is not served; None if nothing but its KV is about codes."""
    if not isinstance(value, Mapping) or value.get("quant_method") != "compressed-tensors":
        return _WEIGHTS
    scheme = value.get("kv_cache_scheme")
    if value.get("config_groups") or not isinstance(scheme, Mapping):
        return _WEIGHTS
    for name, supported in _SUPPORTED.items():
        if scheme.get(name) not in supported:
            return f"its kv_cache_scheme has {name} {scheme.get(name)!r}; supported: {supported[0]!r}"
    return None
