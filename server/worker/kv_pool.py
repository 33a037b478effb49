"""The K/V memory of one model, indexed by page: how many pages there are, and their tensors.

Which sequence owns which page is the scheduler's business; what a page looks like inside is the back end's
(`Ops.allocate_kv`). This file only sizes and holds. Memory that no row has written may hold anything: a back end that
reads past `visible` is wrong, and `poison` is how the tests find out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import DiffusionModel, Topology
from server.worker.sparse_memory import SparsePlan

CPU_PAGE_SIZE = 32
GPU_PAGE_SIZE = 64
CPU_SHARE = 0.25
"""Share of the available memory a CPU pool takes unless told otherwise."""
CPU_MOST_BYTES = 4 << 30
GPU_SHARE = 0.85
"""Share of the free device memory, after the weights; the rest is for activations and the allocator."""
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
    """Bytes of one page over all layers: K and V."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * page_size * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory this process may still take: free device memory, or what the system and its control group leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
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


def choose_kv_bytes(kv_cache_bytes: int | None, device: torch.device, most_useful: int, kv_share: float = 1.0) -> int:
    """The pool's size in bytes: what the user said, or a share of what is available, never more than is of use.

    most_useful  bytes that hold `max_seqs` sequences of the longest length
    kv_share     this pool's part of what pools may take of the memory that is available now
    """
    if kv_cache_bytes is not None:
        return kv_cache_bytes
    available = available_bytes(device)
    if device.type == "cuda":
        return min(int(available * GPU_SHARE * kv_share), most_useful)
    return min(int(available * CPU_SHARE * kv_share), int(CPU_MOST_BYTES * kv_share), most_useful)


def pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def size_pool(
    config: KVShape,
    dtype: torch.dtype,
    device: torch.device,
    page_size: int,
    max_seqs: int,
    max_model_len: int | None,
    kv_cache_bytes: int | None,
    extra_page_bytes: int = 0,
    kv_share: float = 1.0,
) -> tuple[int, int]:
    """(number of pages, longest sequence in tokens) of a pool.

    extra_page_bytes  what else is kept per page: a draft model's KV under the same page ids
    kv_share  this pool's part of what is available (`choose_kv_bytes`)
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
    pool_bytes = choose_kv_bytes(kv_cache_bytes, device, most_useful, kv_share)
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
        sparse: SparsePlan | None = None,
    ) -> None:
        """An empty pool.

        sparse  what else it keeps, for sparse attention
        poison  fill every page with NaN, so that any read of a key that nobody wrote shows in the logits.
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype, self.device = dtype, device
        self.layers: list[tuple[Tensor, Tensor]] = [
            ops.allocate_kv(num_pages, page_size, config.num_kv_heads, config.head_dim, dtype, device)
            for _ in range(config.num_layers)
        ]
        if poison:
            for k_pages, v_pages in self.layers:
                k_pages.fill_(float("nan"))
                v_pages.fill_(float("nan"))
        self.sparse = None if sparse is None else sparse.memory(ops, self.layers, page_size)

    @property
    def num_bytes(self) -> int:
        """Memory taken, the back end's padding included."""
        pages = sum(pages.untyped_storage().nbytes() for layer in self.layers for pages in layer)
        return pages + (0 if self.sparse is None else self.sparse.num_bytes)
