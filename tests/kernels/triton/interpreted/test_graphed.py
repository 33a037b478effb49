"""The worker's captured forwards over the interpreted kernels: fixed plans, padding and inputs together, in a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from kernels.reference import ReferenceOps
from kernels.triton.ops import TritonOps
from scheduler.types import DiffusionModel
from server.models.loading import random_model
from server.worker.batch import place
from server.worker.graphs import GraphedForward
from server.worker.kv_pool import KVPool
from server.worker.random_steps import Space, random_batches
from server.worker.transfer import Transfer

CPU = torch.device("cpu")
SHAPE = "model_type=mistral,hidden=16,layers=1,heads=1,mlp=16,vocab=50,max_len=96,window=20"
SPACE = Space(60, 16, 96, 50, DiffusionModel(3, 4))


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    return run


def test_replayed_steps_equal_plain_torch_on_the_same_rows() -> None:
    triton, twin = TritonOps(num_programs=1), ReferenceOps()
    model, other = (random_model(SHAPE, ops, torch.float32, CPU) for ops in (triton, twin))
    pool, its = (KVPool(twin, model.config, SPACE.num_pages, 16, torch.float32, CPU, has_spare=True) for _ in range(2))
    for layer, same in zip(pool.layers, its.layers, strict=True):
        for pages, copy in zip(layer, same, strict=True):
            copy.copy_(pages.normal_())
            pages[-1] = float("nan")
    graphs = GraphedForward(model, triton, pool, 7, (12,), recorded, Transfer(CPU))
    graphs.capture()
    for host in random_batches(random.Random(1), SPACE, 3, 12):
        with torch.inference_mode():
            alone = place(host, CPU)
            expected = other.forward(alone.tokens, alone.rows, its.layers)
            batch = graphs.place(host)
            assert len(batch.tokens) == 12
            torch.testing.assert_close(
                graphs.forward(batch.tokens, batch.rows, pool.layers), expected, rtol=1e-4, atol=1e-4
            )
    for layer, same in zip(pool.layers, its.layers, strict=True):
        for pages, copy in zip(layer, same, strict=True):
            torch.testing.assert_close(pages[:-1], copy[:-1], rtol=1e-4, atol=1e-4)
