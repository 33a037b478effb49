"""Further models of one server (`--also-serve`): how they are named, and what the engine is told of each.

They run under the first model's settings, but for those that are about its own files and its own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from server.engine.config import EngineConfig, SpeculationConfig

OWN_DRAFTERS = ("draft_model", "layer_subset", "diffusion", "sparse_attention")
"""Drafters that are set for one model, or that not every model has."""


@dataclass(frozen=True, slots=True)
class AlsoServed:
    """name: in the API and in the engine; model: a folder, hub id or embedded model."""

    name: str
    model: str


def name_of(model: str) -> str:
    """As the API calls a model by default. A folder is called by its last part: paths are nobody's business."""
    return Path(model).name if Path(model).is_dir() else model


def read_also(entry: str) -> AlsoServed:
    """`NAME=MODEL`, or `MODEL` alone. Raises ValueError."""
    name, is_named, model = entry.partition("=")
    if not is_named:
        name, model = name_of(entry), entry
    if not name.strip() or not model.strip():
        raise ValueError(f"also-serve is {entry!r}: expected NAME=MODEL, or a MODEL alone")
    return AlsoServed(name.strip(), model.strip())


def check_models(names: Sequence[str], others: Sequence[AlsoServed], shares: Sequence[int]) -> None:
    """Raises ValueError for a name of two models, and for shares that are not one a model. names: of the first one."""
    all_names = [*names, *(other.name for other in others)]
    twice = [name for name in all_names if all_names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is the name of two models; give one another: also-serve NAME=MODEL")
    if shares and len(shares) != 1 + len(others):
        raise ValueError(f"kv-shares has {len(shares)} parts, but models are {1 + len(others)}")


def with_others(first: EngineConfig, others: Sequence[AlsoServed], shares: Sequence[int]) -> EngineConfig:
    """The engine's configuration with all models in it.

    shares  of the KV memory, one for each model, the first one first; () = equal ones. Of an explicit size each gets
            its part. Otherwise each gets its part of what those before it have left: weights are loaded in between.
    """
    if not others:
        return first
    shares = shares or (1,) * (1 + len(others))
    sized = [
        replace(
            first,
            kv_cache_bytes=None if first.kv_cache_bytes is None else first.kv_cache_bytes * share // sum(shares),
            kv_share=share / sum(shares[index:]),
        )
        for index, share in enumerate(shares)
    ]
    also = tuple(
        replace(
            config,
            name=other.name,
            model=other.model,
            random_weights=None,
            kv_cache_scales=None,
            revision=None,
            max_model_len=None,
            denoise_block_size=None,
            speculation=_speculation(config.speculation),
            attention=config.attention.without_files(),
        )
        for config, other in zip(sized[1:], others, strict=True)
    )
    return replace(sized[0], also=also)


def _speculation(first: SpeculationConfig) -> SpeculationConfig:
    """The same without what was set for the first model: its draft model, its layers, its file."""
    drafters = first.drafters and tuple(name for name in first.drafters if name not in OWN_DRAFTERS)
    mode = "off" if drafters == () else first.mode
    return replace(first, mode=mode, drafters=drafters, draft_model=None, layer_subset=None, store_file=None)
