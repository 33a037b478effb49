"""From a `SpeculatorConfig` to a `Speculator`: the table of drafters by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from kernels.ops import Ops
from server.models.registry import Model
from server.worker.drafters.base import Drafter
from server.worker.drafters.config import MASK_DRAFTER, SpeculatorConfig
from server.worker.drafters.diffusion import build_diffusion
from server.worker.drafters.draft_model import DraftModel, build_draft_model
from server.worker.drafters.layer_subset import build_layer_subset
from server.worker.drafters.lookup import LookupDrafter, Store
from server.worker.drafters.sparse_attention import build_sparse_attention
from server.worker.drafters.speculator import Speculator
from server.worker.drafters.stores.adjacency import AdjacencyStore
from server.worker.drafters.stores.grammar import GrammarStore, has_grammar
from server.worker.drafters.stores.history import HistoryStore
from server.worker.drafters.stores.ngram_prob import NgramProbStore
from server.worker.drafters.stores.persistence import Kept, load_stores, save_stores
from server.worker.drafters.stores.prediction import PredictionStore, has_prediction
from server.worker.drafters.stores.suffix import SuffixStore
from server.worker.drafters.stores.trigram import TrigramStore
from server.worker.drafters.synthetic import SyntheticDrafter
from server.worker.info import WorkerInfo
from server.worker.kv_pool import KVPool
from server.worker.sequences import SequenceTable


class Parts(NamedTuple):
    """What a drafter may be made of: the worker's own parts, and

    draft         the loaded model of `draft_model`, if it is among the drafters
    history       the index of the sequences' own tokens, one for all stores that search it
    shared_bytes  memory of one store that is shared between requests
    kept          stores that outlive the process where `store_file` says; their constructors add them
    """

    config: SpeculatorConfig
    model: Model
    ops: Ops
    pool: KVPool
    sequences: SequenceTable
    info: WorkerInfo
    history: HistoryStore
    shared_bytes: int
    kept: list[Kept]
    draft: DraftModel | None = None


DRAFTERS: dict[str, Callable[[Parts], Drafter]] = {
    "prediction": lambda parts: LookupDrafter(PredictionStore(), has_prediction),
    "grammar": lambda parts: LookupDrafter(GrammarStore(), has_grammar),
    "history": lambda parts: LookupDrafter(parts.history),
    "suffix": lambda parts: _suffix(parts),
    "adjacency": lambda parts: _shared(parts, AdjacencyStore(parts.shared_bytes)),
    "ngram_prob": lambda parts: _shared(parts, NgramProbStore(parts.shared_bytes)),
    "trigram": lambda parts: _shared(parts, TrigramStore(parts.shared_bytes)),
    "draft_model": lambda parts: _draft_model(parts),
    "layer_subset": lambda parts: _layer_subset(parts),
    "diffusion": lambda parts: build_diffusion(parts.model, parts.ops, parts.info),
    "sparse_attention": lambda parts: _sparse_attention(parts),
    "synthetic": lambda parts: _synthetic(parts),
}

SHARED = frozenset({"suffix", "adjacency", "ngram_prob", "trigram"})
"""Names of the stores that are shared between requests; `store_bytes` is divided among those in use."""


class _SharedStore(Store, Kept, Protocol):
    pass


def _shared(parts: Parts, store: _SharedStore) -> Drafter:
    parts.kept.append(store)
    return LookupDrafter(store)


def _suffix(parts: Parts) -> Drafter:
    store = SuffixStore(parts.history, parts.shared_bytes)
    parts.kept.append(store)
    return LookupDrafter(store, tend=store.tend)


def _draft_model(parts: Parts) -> Drafter:
    if parts.draft is None:
        raise ValueError("drafters names 'draft_model', but no draft model is given; set draft_model to one")
    config, info = parts.config, parts.info
    return build_draft_model(
        parts.draft, parts.pool, parts.sequences, parts.ops, info.vocab_size, config.max_drafts, config.draft_stop
    )


def _layer_subset(parts: Parts) -> Drafter:
    config, info = parts.config, parts.info
    if config.layer_subset is None:
        raise ValueError("drafters names 'layer_subset', but layer_subset is not set; give uniform:0.5, search or exit")
    # An acceptance head is trained for one draft model's states; these layers stop by what is next best.
    stop = "confidence" if config.draft_stop == "acc_head" else config.draft_stop
    return build_layer_subset(
        parts.model,
        parts.model.config,
        config.layer_subset,
        parts.pool,
        parts.sequences,
        parts.ops,
        info.vocab_size,
        info.model_len,
        config.max_drafts,
        stop,
    )


def _sparse_attention(parts: Parts) -> Drafter:
    info = parts.info
    stop = "confidence" if parts.config.draft_stop == "acc_head" else parts.config.draft_stop
    return build_sparse_attention(
        parts.model, parts.pool, parts.sequences, parts.ops, info.vocab_size, info.model_len, stop
    )


def _synthetic(parts: Parts) -> Drafter:
    config = parts.config
    if config.synthetic_acceptance is None:
        raise ValueError("drafters names 'synthetic', but synthetic_acceptance is not set")
    return SyntheticDrafter(config.synthetic_acceptance, parts.info.vocab_size, config.store_bytes)


def build_speculator(
    config: SpeculatorConfig,
    model: Model,
    ops: Ops,
    pool: KVPool,
    sequences: SequenceTable,
    info: WorkerInfo,
    draft: DraftModel | None = None,
) -> Speculator:
    """Build every drafter that the configuration names. draft: the loaded model of `draft_model`.

    Raises ValueError with a sentence for the user: a name that is unknown or given twice, no names, a drafter that
    lacks what it needs (each constructor says what); OSError if a draft model cannot be read.
    """
    names = config.drafters
    if config.with_masks and MASK_DRAFTER not in names and info.diffusion is not None and info.diffusion.is_dual:
        names += (MASK_DRAFTER,)
    check_names(names)
    shared_bytes = config.store_bytes // max(1, sum(name in SHARED for name in names))
    parts = Parts(config, model, ops, pool, sequences, info, HistoryStore(config.store_bytes), shared_bytes, [], draft)
    drafters = [DRAFTERS[name](parts) for name in names]
    has_window = any(window is not None for window in model.config.windows)
    keep = None
    if config.store_file is not None:
        file = Path(config.store_file)
        load_stores(file, parts.kept, info.vocab_size)
        keep = partial(save_stores, file, parts.kept, info.vocab_size)
    return Speculator(drafters, info.vocab_size, config.draft_tree, has_window, keep)


def check_names(names: tuple[str, ...]) -> None:
    """Raises ValueError unless every name is in the table, once."""
    if not names:
        raise ValueError("drafters is empty; name at least one, or turn speculation off")
    for name in names:
        if name not in DRAFTERS:
            raise ValueError(f"drafters names {name!r}; expected some of {', '.join(sorted(DRAFTERS))}")
        if names.count(name) > 1:
            raise ValueError(f"drafters names {name!r} twice")
