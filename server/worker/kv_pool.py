"""The K/V memory of one model, indexed by page: how many pages there are, and their tensors.

Which sequence owns which page is the scheduler's business; what a page looks like inside is the back end's
(`Ops.allocate_kv`). This file only sizes and holds. Memory that no row has written may hold anything: a back end that
reads past `visible` is wrong, and `poison` is how the tests find out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kernels.kv_format import fill_with_nan, slot_bytes
from kernels.ops import Ops
from kernels.sparse import SparseLayer
from scheduler.types import DiffusionModel, Topology
from server.worker.offload import OffloadPlan, PinnedPages
from server.worker.sparse_memory import SparsePlan

logger = logging.getLogger(__name__)

KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
CPU_PAGE_SIZE = 32
GPU_PAGE_SIZE = 64
CPU_SHARE = 0.25
"""Share of the available memory a CPU pool takes unless told otherwise."""
CPU_MOST_BYTES = 4 << 30
_NO_LIMIT = 1 << 50
"""Control groups write huge numbers for "unlimited"."""


def choose_page_size(asked: int | None, device: torch.device, diffusion: DiffusionModel | None) -> int:
    """Tokens of a KV page: what the user said, else the device's usual size, rounded up to whole denoising blocks.

    A block-causal model's finished blocks are final and shared by page, so a page must not end inside one (a
    bidirectional model shares nothing). Raises ValueError if the user's choice is no multiple of the block size.
    """
    usual = GPU_PAGE_SIZE if device.type == "cuda" else CPU_PAGE_SIZE
    if diffusion is None or diffusion.topology is Topology.BIDIRECTIONAL:
        return asked or usual
    block = diffusion.block_size
    if asked is not None and asked % block:
        raise ValueError(
            f"KV pages of {asked} tokens end inside this model's denoising blocks of {block} tokens; make their size "
            f"(page_size, --block-size) a multiple of {block}"
        )
    return asked or -(-usual // block) * block


def choose_kv_dtype(name: str, dtype: torch.dtype, ops: Ops) -> torch.dtype:
    """What KV pages hold. Raises ValueError if this back end cannot hold it, naming what can."""
    if name != "auto" and name not in KV_DTYPES:
        raise ValueError(f"kv_cache_dtype is {name!r}; expected auto, {', '.join(KV_DTYPES)}")
    asked = dtype if name == "auto" else KV_DTYPES[name]
    can = ops.kv_dtypes(dtype)
    if asked not in can:
        names = [known for known, kind in KV_DTYPES.items() if kind in can]
        raise ValueError(
            f"kv_cache_dtype is {name!r}, but the {ops.name} back end holds the KV of a "
            f"{str(dtype).removeprefix('torch.')} model as {' or '.join(names)} only. int8 is held on every CUDA "
            "device with triton, fp8 on those of compute capability 8.9 and above, and both by plain torch, which "
            "serves on a CPU with dtype float16 or without a compiler; bfloat16 and float16 by any of these for a "
            "float32 model"
        )
    if asked in (torch.int8, torch.float8_e4m3fn):
        logger.warning("the KV cache is %s: lossy, the text differs from the one without", name)
    return asked


class KVShape(Protocol):
    """What the pool must know of a model (`server/models/config.py: ModelConfig` has it)."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position(self) -> int: ...


def page_bytes(config: KVShape, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers: K and V, in pages of `dtype` with their scales."""
    return 2 * config.num_layers * config.num_kv_heads * page_size * slot_bytes(config.head_dim, dtype)


def available_bytes() -> int:
    """Memory this process may still take: what the system and its control group leave."""
    return min(_system_available(), _cgroup_available())


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_available() -> int:
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = Path(limit_file).read_text().strip(), int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            return max(0, int(limit) - used)
    return _NO_LIMIT


def choose_kv_bytes(
    kv_cache_bytes: int | None, most_useful: int, kv_share: float = 1.0, device_bytes: int | None = None
) -> int:
    """The pool's size in bytes: what the user said, or a share of what there is, never more than is of use.

    most_useful   bytes that hold `max_seqs` sequences of the longest length
    kv_share      this pool's part of what pools may take of the memory that there is now
    device_bytes  what a device's steps leave (`memory.kv_budget`); None = the pool is in the host's memory
    """
    if kv_cache_bytes is not None:
        return kv_cache_bytes
    if device_bytes is not None:
        return min(int(device_bytes * kv_share), most_useful)
    return min(int(available_bytes() * CPU_SHARE * kv_share), int(CPU_MOST_BYTES * kv_share), most_useful)


def pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def size_pool(
    config: KVShape,
    dtype: torch.dtype,
    page_size: int,
    max_seqs: int,
    max_model_len: int | None,
    kv_cache_bytes: int | None,
    extra_page_bytes: int = 0,
    kv_share: float = 1.0,
    device_bytes: int | None = None,
) -> tuple[int, int]:
    """(number of pages, longest sequence in tokens) of a pool.

    extra_page_bytes  what else is kept per page: a draft model's KV under the same page ids
    kv_share, device_bytes  as in `choose_kv_bytes`
    A length that the user asked for must fit; without one, the model's own length is cut to what fits.
    Raises ValueError if the length is beyond the model's, or does not fit, or not even one page does.
    """
    model_len = max_model_len or config.max_position
    if model_len > config.max_position:
        raise ValueError(
            f"max_model_len is {model_len}, but the model's positions end at {config.max_position}; ask for no more"
        )
    bytes_of_page = page_bytes(config, page_size, dtype) + extra_page_bytes
    most_useful = max_seqs * pages_for(model_len, page_size) * bytes_of_page
    pool_bytes = choose_kv_bytes(kv_cache_bytes, most_useful, kv_share, device_bytes)
    num_pages = pool_bytes // bytes_of_page
    needed = pages_for(model_len, page_size)
    if num_pages < needed and (max_model_len is not None or num_pages < 1):
        raise ValueError(
            f"the KV cache has {pool_bytes} bytes = {num_pages} pages of {page_size} tokens, but one request of "
            f"{model_len} tokens needs {needed} pages = {needed * bytes_of_page} bytes; raise kv_cache_bytes or lower "
            f"max_model_len to at most {num_pages * page_size}"
        )
    return num_pages, min(model_len, num_pages * page_size)


class KVPool:
    """K and V pages of every layer. `layers[i]` is what layer i's attention gets; only `Ops` looks inside."""

    def __init__(
        self,
        ops: Ops,
        config: KVShape,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        poison: bool = False,
        has_spare: bool = False,
        sparse: SparsePlan | None = None,
        offload: OffloadPlan | None = None,
    ) -> None:
        """dtype: of the pages, which need not be the model's.

        poison: fill every page with NaN, so that any read of a key that nobody wrote shows in the logits.

        has_spare: there is a page more, `spare_page`, that nobody is ever given: what is written there is read by none.
            On a device that has use for one, warm-up reads keys that nobody wrote, so all are 0 to begin with
        sparse: what else it keeps, for sparse attention
        offload: which layers' pages lie in host memory; attention reads them in `buffer`, under the same page ids
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype, self.device = dtype, device
        sizes = (num_pages + has_spare, page_size, config.num_kv_heads, config.head_dim, dtype)
        self._hosted = () if offload is None else offload.hosted
        self.layers: list[tuple[Tensor, Tensor]] = [
            ops.allocate_kv(*sizes, torch.device("cpu") if number in self._hosted else device)
            for number in range(config.num_layers)
        ]
        self.buffer = None if offload is None else ops.allocate_kv(*sizes, device)
        self._pinned = PinnedPages(self._of_host()) if self.buffer is not None and device.type == "cuda" else None
        everywhere = self.layers if self.buffer is None else [*self.layers, self.buffer]
        if has_spare:
            for k_pages, v_pages in everywhere:
                k_pages.zero_()
                v_pages.zero_()
        if poison:
            for k_pages, v_pages in everywhere:
                fill_with_nan(k_pages)
                fill_with_nan(v_pages)
        self.sparse = None if sparse is None else sparse.memory(ops, self._where_read(), page_size)

    def _of_host(self) -> list[tuple[Tensor, Tensor]]:
        return [self.layers[number] for number in self._hosted]

    def _where_read(self) -> list[tuple[Tensor, Tensor]]:
        """The pages, all on the device, that attention of each layer reads."""
        read = list(self.layers)
        for number in self._hosted:
            assert self.buffer is not None
            read[number] = self.buffer
        return read

    @property
    def metadata(self) -> Sequence[SparseLayer] | None:
        """`AttentionRows.layers`."""
        return None if self.sparse is None else self.sparse.layers

    @property
    def spare_page(self) -> int:
        """The page behind those of the sequences, in a pool that has one."""
        return self.num_pages

    @property
    def num_bytes(self) -> int:
        """Memory taken on the device, the back end's padding included."""
        shared = 0 if self.buffer is None else _num_bytes([self.buffer])
        sparse = 0 if self.sparse is None else self.sparse.num_bytes
        return _num_bytes(self.layers) - self.host_bytes + shared + sparse

    @property
    def host_bytes(self) -> int:
        """Memory of the layers whose pages lie on the host."""
        return _num_bytes(self._of_host())


def _num_bytes(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(pages.untyped_storage().nbytes() for layer in layers for pages in layer)
