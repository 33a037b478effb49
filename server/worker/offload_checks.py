"""A check of K and V in host memory that needs no test library: for `gpu_checks` on a GPU, and on any CPU for the
tests.

The same steps, with the same predicted queries, over a pool on the host and over one that lies where attention reads
it.
"""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.hosted import Fetches, Pages
from kernels.kv_format import fill_with_nan
from kernels.ops import Ops
from kernels.sparse import Method, SparseRows, least_budget
from scheduler.types import AttentionMethod
from server.models.config import ModelConfig
from server.models.registry import Model
from server.worker.batch import HostBatch, place
from server.worker.kv_pool import KVPool
from server.worker.offload import OffloadPlan
from server.worker.offloaded_layers import OffloadedLayers, offloaded
from server.worker.random_steps import Space, random_batches
from server.worker.sparse_config import SparseConfig
from server.worker.sparse_memory import SparsePlan


class OwnPages:
    """A `KeyBuffer` of nothing: attention reads the layer's own pages."""

    def pages(self, own: Pages) -> Pages:
        return own

    def begin(self, own: Pages, places_M: Tensor) -> None:
        pass

    def arrive(self) -> None:
        pass

    def keep(self, own: Pages, places_M: Tensor) -> None:
        pass

    def fetch(self, own: Pages, places_M: Tensor) -> None:
        pass


def offload_check(
    model: Model, ops: Ops, dtype: torch.dtype, device: torch.device, num_steps: int, seed: int = 0
) -> tuple[str, bool]:
    """Random steps, some of their rows sparse; the buffer holds NaN before each, so that a key nobody sent for
    shows."""
    assert isinstance(ops, Fetches)
    space = Space(500, 64, model.config.max_position, model.config.vocab_size)
    config = SparseConfig((AttentionMethod.DOUBLE_SPARSITY,), offload=True)
    offload = OffloadPlan(config, model.config, ops, ())
    sparse = _plan(model.config, offload)
    sizes = (space.num_pages, space.page_size, dtype, device)
    there = KVPool(ops, model.config, *sizes, sparse=sparse, offload=offload)
    here = KVPool(ops, model.config, *sizes, sparse=sparse)
    for mine, other in zip(_parts(here), _parts(there), strict=True):
        mine.normal_()
        other.copy_(mine)
    staying = model.through(OffloadedLayers(ops, offload.hosted, OwnPages()))
    models = (staying, offloaded(model, ops, offload, there.buffer))
    generator, num_different, num_choosing = random.Random(seed), 0, 0
    for host in random_batches(generator, space, num_steps, 256):
        assert there.buffer is not None
        for pages in there.buffer:
            fill_with_nan(pages)
        index, budgets = _choosing(host, generator)
        num_choosing += len(budgets)
        hidden = []
        for its, pool in zip(models, (here, there), strict=True):
            batch = place(host, device, pool.metadata, _rows(index, budgets, model.config.num_kv_heads, device))
            with torch.inference_mode():
                hidden.append(its.forward(batch.tokens, batch.rows, pool.layers))
        if device.type == "cuda":
            torch.cuda.synchronize()  # the host's pages are read by the host
        pairs = [(hidden[0], hidden[1]), *zip(_parts(here), _parts(there), strict=True)]
        num_different += not all(_is_same(mine, other) for mine, other in pairs)
    what = f"{dtype}: {num_steps} steps with keys of the host, {num_choosing} rows of them sparse"
    return f"{what}, {num_different} differ", not num_different and num_choosing > 0


def _plan(model: ModelConfig, offload: OffloadPlan) -> SparsePlan:
    """Labels of random channels."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(model.head_dim, generator=generator) for _ in range(model.num_layers * model.num_kv_heads)]
    channels = torch.stack(orders).view(model.num_layers, model.num_kv_heads, -1).to(torch.int16)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "channels.safetensors"
        save_file({"channels": channels}, path)
        config = SparseConfig((AttentionMethod.DOUBLE_SPARSITY,), (str(path),), offload=True)
        return SparsePlan(config, model, None, offload.hosted)


def _parts(pool: KVPool) -> list[Tensor]:
    """All that a step may write, but the buffer."""
    metadata = [layer.labels for layer in pool.metadata or () if layer.labels is not None]
    return [*(part for layer in pool.layers for part in layer), *metadata]


def _choosing(host: HostBatch, generator: random.Random) -> tuple[list[int], list[int]]:
    """Each row's place among the sparse ones, -1 for none, and the budgets of those: half of the rows of chains."""
    rows, index, budgets = host.rows, [], list[int]()
    for row in range(len(rows.visible)):
        may = rows.tree is None or int(rows.tree[row]) == 0
        index.append(len(budgets) if may and generator.random() < 0.5 else -1)
        if index[-1] >= 0:
            budgets.append(least_budget(Method.DOUBLE_SPARSITY, 64) + generator.randrange(40))
    return index, budgets


def _rows(index: list[int], budgets: list[int], num_kv: int, device: torch.device) -> SparseRows | None:
    if not budgets:
        return None
    methods = np.full(len(budgets), Method.DOUBLE_SPARSITY)
    of_rows = [torch.tensor(values, dtype=torch.int32, device=device) for values in (index, methods, budgets)]
    lists = torch.zeros((len(budgets), num_kv, max(budgets)), dtype=torch.int32, device=device)
    return SparseRows(of_rows[0], of_rows[1], of_rows[2], lists)


def _is_same(mine: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN being NaN."""
    return torch.equal(*(part.cpu().contiguous().view(torch.uint8) for part in (mine, other)))
