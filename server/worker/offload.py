"""K and V in host memory: which layers', how much of it, and how keys travel (`offloaded_layers.py` says when).

The device keeps, of each page: labels of all layers, K and V of the layers that stay, and of one layer more, the buffer
that the others share. On a CPU both memories are the same one: nothing is saved, and the text is what a GPU's would be.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.hosted import Fetches, Pages
from kernels.ops import Ops
from kernels.sparse import DENSE_LAYERS
from scheduler.types import AttentionMethod
from server.models.config import ModelConfig
from server.worker.memory import show
from server.worker.sparse_config import SparseConfig

HOST_SHARE = 0.5
"""Part of the free host memory for pages unless told otherwise."""
OWN_MODEL_DRAFTERS = ("layer_subset", "sparse_attention")
"""Drafters that run the model's own layers over the pool, in an order that keys are not fetched in."""


@dataclass(frozen=True)
class PartShape:
    """`KVShape` of some of a model's layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_position: int


class OffloadPlan:
    """A configuration checked against its model, before the pool is there.

    hosted  numbers of the layers on the host: all but the first DENSE_LAYERS, whose rows read everything, and the last
    """

    def __init__(self, config: SparseConfig, model: ModelConfig, ops: Ops, drafters: Sequence[str]) -> None:
        """Raises ValueError for what cannot be."""
        if config.methods != (AttentionMethod.DOUBLE_SPARSITY,):
            raise ValueError(
                f"kv-offload fetches keys that double_sparsity foretells, but sparse-attention is "
                f"{','.join(config.methods)}; name that method alone"
            )
        self.hosted = range(DENSE_LAYERS, model.num_layers - 1)
        if not self.hosted:
            raise ValueError(
                f"kv-offload is set, but of this model's {model.num_layers} layers the first {DENSE_LAYERS} and the "
                "last stay on the device: none is left"
            )
        if not isinstance(ops, Fetches):
            raise ValueError(f"kv-offload is set, but the back end {ops.name} cannot fetch keys")
        if refused := [name for name in drafters if name in OWN_MODEL_DRAFTERS]:
            raise ValueError(f"kv-offload is set, but drafters names {', '.join(refused)}, which need all K and V here")
        self._model, self._asked = model, config.offload_bytes

    @property
    def device_shape(self) -> PartShape:
        """What stays, and the buffer."""
        return self._part(self._model.num_layers - len(self.hosted) + 1)

    @property
    def host_shape(self) -> PartShape:
        return self._part(len(self.hosted))

    def _part(self, num_layers: int) -> PartShape:
        return PartShape(num_layers, self._model.num_kv_heads, self._model.head_dim, self._model.max_position)

    def limit(
        self, sizes: tuple[int, int], page_size: int, host_page_bytes: int, free: int, asked: int | None
    ) -> tuple[int, int]:
        """(pages, longest sequence) of the device's pool, cut to what the host has room for.

        host_page_bytes  of one page over the layers on the host
        free   bytes of host memory that are free
        asked  longest sequence that the user wants, None = any
        Raises ValueError if that does not fit, or not one page does.
        """
        num_pages, model_len = sizes
        host_bytes = int(free * HOST_SHARE) if self._asked is None else self._asked
        fitting = min(num_pages, host_bytes // host_page_bytes)
        if fitting < 1 or (asked is not None and fitting * page_size < asked):
            raise ValueError(
                f"kv-offload-memory is {show(host_bytes)} = {host_bytes // host_page_bytes} pages of {page_size} "
                f"tokens, but one request of {asked or page_size} tokens needs "
                f"{show(-(-(asked or page_size) // page_size) * host_page_bytes)}; raise it or lower max-model-len"
            )
        return fitting, min(model_len, fitting * page_size)


class SideStream(Protocol):
    """Where copies run beside the layers."""

    def run(self, copy: Callable[[], None]) -> None:
        """After all that was launched; what is launched next does not wait for it."""
        ...

    def wait(self) -> None:
        """What is launched from now on waits for all that ran here."""
        ...


class NoStream:
    """A CPU's: each thing after the other."""

    def run(self, copy: Callable[[], None]) -> None:
        copy()

    def wait(self) -> None:
        pass


class CudaStream:
    """A second stream of the current device."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(self, copy: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copy()
            self._done.record(self._stream)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)


class SharedBuffer:
    """`offloaded_layers.KeyBuffer`: one layer's pages on the device, for each layer on the host in turn."""

    def __init__(self, ops: Fetches, pages: Pages, side: SideStream) -> None:
        self._ops, self._pages, self._side = ops, pages, side
        self._on_its_way: Tensor | None = None

    def pages(self, own: Pages) -> Pages:
        return self._pages

    def begin(self, own: Pages, places_M: Tensor) -> None:
        # Kept until it has arrived: memory that is freed now may be written by the next launch.
        self._on_its_way = places_M
        self._side.run(lambda: self._ops.copy_keys(own, self._pages, places_M))

    def arrive(self) -> None:
        self._side.wait()
        self._on_its_way = None

    def keep(self, own: Pages, places_M: Tensor) -> None:
        self._ops.copy_keys(self._pages, own, places_M)

    def fetch(self, own: Pages, places_M: Tensor) -> None:
        self._ops.copy_keys(own, self._pages, places_M)


class PinnedPages:
    """Host pages that a device reads and writes over the bus; they stay so as long as this object.

    They are registered where they lie: torch's own pinned memory comes in powers of two, twice what is asked for at
    worst.
    """

    def __init__(self, layers: Sequence[Pages]) -> None:
        for pages in (part for layer in layers for part in layer):
            storage = pages.untyped_storage()
            status = int(_driver().cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0))
            if status:
                raise OSError(f"{show(storage.nbytes())} of host memory cannot be pinned (CUDA error {status})")
            # The memory outlives its registration, so the finalizer holds it.
            weakref.finalize(self, _unregister, storage).atexit = False


def _unregister(storage: torch.UntypedStorage) -> None:
    _driver().cudaHostUnregister(storage.data_ptr())


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
