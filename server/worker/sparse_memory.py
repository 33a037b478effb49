"""Sparse attention of a worker's KV memory: which methods it is made for, and what it keeps for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.ops import Ops
from kernels.sparse import Method, Role, SparseLayer, default_channels, least_budget, roles_of_layers
from scheduler.types import AttentionMethod, AttentionOffer
from server.models.config import ModelConfig
from server.worker.attention_calibration import Calibration, load_channels, load_tidal
from server.worker.sparse_config import SparseConfig

METHODS = {
    AttentionMethod.QUEST: Method.QUEST,
    AttentionMethod.DOUBLE_SPARSITY: Method.DOUBLE_SPARSITY,
    AttentionMethod.TIDAL: Method.TIDAL,
    AttentionMethod.DOUBLE_SPARSITY_PAGES: Method.DOUBLE_SPARSITY_PAGES,
}


@dataclass(frozen=True, eq=False)
class SparseMemory:
    """One pool's. `layers` is what each layer's attention gets beside its pages; only `Ops` looks inside.

    is_drafting  its rows are drafts of requests whose text is dense (`Attention.lossless`)
    is_ahead     rows follow lists that were made ahead in some layers (`offloaded_layers.py`), so all of them need one
    """

    layers: tuple[SparseLayer, ...]
    methods: tuple[AttentionMethod, ...]
    num_kv_heads: int
    page_size: int
    is_drafting: bool = False
    is_ahead: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def offers(self) -> tuple[AttentionOffer, ...]:
        return tuple(AttentionOffer(name, least_budget(METHODS[name], self.page_size)) for name in self.methods)


class SparsePlan:
    """A configuration checked against its model, before the pool is there."""

    def __init__(
        self, config: SparseConfig, model: ModelConfig, weights_hash: str | None, ahead: Collection[int] = ()
    ) -> None:
        """weights_hash: of the served checkpoint, None for random weights. ahead: numbers of the layers in which a list
        made before is followed. Raises ValueError for what cannot be."""
        check_model(model)
        self.methods, self._num_kv = config.methods, model.num_kv_heads
        self._int4_labels = config.label_dtype == "int4"
        calibration = Calibration(config.calibration, weights_hash)
        self._channels: Tensor | None = None
        if any(method.has_labels for method in config.methods):
            num_channels = config.num_channels or default_channels(model.head_dim, self._int4_labels)
            self._channels = load_channels(calibration, model, num_channels)
        first, again = load_tidal(calibration, model.num_layers)
        self._is_ahead = bool(ahead)
        self._roles = [
            (quest, Role.FOLLOW if number in ahead else double_sparsity, tidal, pages)
            for number, (quest, double_sparsity, tidal, pages) in enumerate(
                roles_of_layers(model.num_layers, first, again)
            )
        ]

    def layers(self, ops: Ops, pages: Sequence[tuple[Tensor, Tensor]]) -> tuple[SparseLayer, ...]:
        """Metadata memory for these pages. A layer that is dense for every row keeps none."""
        made = []
        for number, ((k_pages, _), roles) in enumerate(zip(pages, self._roles, strict=True)):
            chooses = roles[Method.QUEST] is Role.CHOOSE
            has_bounds = chooses and AttentionMethod.QUEST in self.methods
            channels = self._channels[number].to(k_pages.device) if chooses and self._channels is not None else None
            made.append(ops.allocate_sparse(k_pages, roles, has_bounds, channels, self._int4_labels))
        return tuple(made)

    def page_bytes(self, ops: Ops, pages: Sequence[tuple[Tensor, Tensor]]) -> int:
        """What the metadata adds to each page, measured on a small pool's `pages`."""
        return sum(layer.num_bytes for layer in self.layers(ops, pages)) // pages[0][0].shape[0]

    def memory(self, ops: Ops, pages: Sequence[tuple[Tensor, Tensor]], page_size: int) -> SparseMemory:
        return SparseMemory(self.layers(ops, pages), self.methods, self._num_kv, page_size, is_ahead=self._is_ahead)


def check_model(model: ModelConfig) -> None:
    """Raises ValueError for a model whose attention these methods do not fit."""
    if model.bidirectional:
        raise ValueError("sparse attention is asked for, but this model denoises whole texts and has no decode rows")
    if any(window is not None for window in model.windows):
        raise ValueError("sparse attention is asked for, but this model has a sliding window, which bounds its keys")
