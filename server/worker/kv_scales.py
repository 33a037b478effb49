"""Scales of fp8 KV pages: where a server's come from, and the file that calibration writes.

The file is JSON: `model_hash` (`checkpoint_hash`), `k_scale` and `v_scale` as lists [layers][kv heads], and what they
were made of. A file of another checkpoint would clip or coarsen, so the hash must be that of the served one. Without a
file the checkpoint's own scales count, and without those 1.

Legend: L layers, K kv heads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kernels.kv_format import FP8
from server.models.checkpoint import checkpoint_hash
from server.models.config import ModelConfig
from server.models.kv_scales import load_scales

logger = logging.getLogger(__name__)

_KINDS = ("k_scale", "v_scale")


def check_asked(file: str | None, kv_cache_dtype: str, random_weights: str | None) -> None:
    """Before anything is loaded. Raises ValueError for a file of scales that nothing would read."""
    if file is None:
        return
    if kv_cache_dtype != "fp8":
        raise ValueError(
            f"kv-cache-scales is {file}, but kv-cache-dtype is {kv_cache_dtype}; only fp8 pages have scales: set it to "
            "fp8, or leave the file out"
        )
    if random_weights is not None:
        raise ValueError(f"kv-cache-scales is {file}, but the weights are random, and no file can be of them")
    if not Path(file).is_file():
        raise ValueError(f"kv-cache-scales: there is no file {file!r}")


def choose_scales(file: str | None, kv_dtype: torch.dtype, model: ModelConfig, folder: Path | None) -> Tensor | None:
    """float32 [L, 2, K] for the pages of this model, None = 1 or pages that take none; the log says which.

    file    of calibration, None = the checkpoint's
    folder  of the checkpoint, None = random weights
    Raises ValueError.
    """
    own = load_scales(folder) if folder is not None else None
    if kv_dtype != FP8:
        if own is not None:
            logger.info("%s carries scales of an fp8 KV cache, which this one is not; they are not used", folder)
        return None
    if file is not None and folder is not None:
        logger.info("the fp8 KV cache has the scales of %s", file)
        return read_scales(Path(file), model, checkpoint_hash(folder))
    if own is not None:
        logger.info("the fp8 KV cache has the scales of the checkpoint %s", folder)
        return own
    logger.warning(
        "the fp8 KV cache has scale 1 for all keys and values: the checkpoint%s carries none and kv-cache-scales names "
        "no file; magnitudes beyond 448 are cut off (python -m server.bench.sparse.kv_scales measures scales)",
        "" if folder is None else f" {folder}",
    )
    return None


def read_scales(path: Path, model: ModelConfig, model_hash: str) -> Tensor:
    """float32 [L, 2, K] of a file of this checkpoint. Raises ValueError naming the file and what does not fit."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_int=float)
        told, lists = found["model_hash"], [found[kind] for kind in _KINDS]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"kv-cache-scales {path} is not as expected: {error!r}") from error
    if told != model_hash:
        raise ValueError(
            f"kv-cache-scales {path} is of the checkpoint {told}, but {model_hash} is served; calibrate this one"
        )
    return torch.stack([_read(path, kind, rows, model) for kind, rows in zip(_KINDS, lists, strict=True)], dim=1)


def _read(path: Path, kind: str, rows: object, model: ModelConfig) -> Tensor:
    """float32 [L, K]."""
    if not isinstance(rows, list) or len(rows) != model.num_layers:
        raise ValueError(f"kv-cache-scales {path}: {kind} must have a list for each of the {model.num_layers} layers")
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != model.num_kv_heads:
            raise ValueError(
                f"kv-cache-scales {path}: {kind} of layer {layer} must have a number for each of the "
                f"{model.num_kv_heads} kv heads"
            )
        if not all(isinstance(number, float) for number in row):
            raise ValueError(f"kv-cache-scales {path}: {kind} of layer {layer} is {row}, not numbers")
    scales = torch.tensor(rows, dtype=torch.float64).float()
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError(f"kv-cache-scales {path}: {kind} has numbers that are not positive and finite")
    return scales


def write_scales(path: Path, scale_L2K: Tensor, model_hash: str, made_of: Mapping[str, object]) -> None:
    """made_of: what else a reader of the file should know."""
    lists = {kind: scale_L2K[:, index].tolist() for index, kind in enumerate(_KINDS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model_hash": model_hash, **made_of, **lists}, indent=1) + "\n", encoding="utf-8")
