"""From a loaded model to a worker of a given number of pages: the parts, and how they go together."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.ops import FixedPlans, Ops
from scheduler.types import DiffusionModel, Topology
from server.models.layers import weight_shapes
from server.models.registry import Model
from server.worker.accelerator import Accelerator
from server.worker.attention_probe import AttentionProbe
from server.worker.config import WorkerConfig
from server.worker.denoising.learn2pd import Filter
from server.worker.drafters.build import build_speculator
from server.worker.drafters.diffusion import make_prober
from server.worker.drafters.draft_model import DraftModel
from server.worker.grammar import GrammarCompiler
from server.worker.graphs import MOST_TOKENS, GraphedForward, graph_sizes
from server.worker.info import WorkerInfo
from server.worker.kv_pool import KVPool, pages_for
from server.worker.memory import MemoryReading, Needs, graph_bytes, peak_of
from server.worker.offload import OffloadPlan
from server.worker.offloaded_layers import offloaded
from server.worker.profile import ProfileMemory
from server.worker.sequences import make_sequences
from server.worker.sparse_memory import SparsePlan
from server.worker.transfer import Transfer
from server.worker.warm_up import largest_steps
from server.worker.worker import Worker

logger = logging.getLogger(__name__)


class Assembled(NamedTuple):
    worker: Worker
    graphs: GraphedForward | None
    pool: KVPool


@dataclass(frozen=True)
class Parts:
    """What is loaded once. accelerator: None on a CPU. sizes: of captured steps; () = none are captured."""

    config: WorkerConfig
    model: Model
    folder: Path | None
    ops: Ops
    draft: DraftModel | None
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    page_size: int
    diffusion: DiffusionModel | None
    learnt: Filter | None
    accelerator: Accelerator | None
    sizes: tuple[int, ...] = ()
    sparse: SparsePlan | None = None
    offload: OffloadPlan | None = None

    def assemble(
        self,
        num_pages: int,
        model_len: int,
        make_memory: Callable[[WorkerInfo], ProfileMemory | None] = lambda info: None,
        is_trial: bool = False,
        sizes: Sequence[int] | None = None,
    ) -> Assembled:
        """A worker over a pool of its own. Nothing is captured yet.

        is_trial  it serves nobody: no drafters and no grammars
        sizes     others than the parts'
        """
        config, ops, device = self.config, self.ops, self.device
        sizes = self.sizes if sizes is None else sizes
        has_spare = self.accelerator is not None
        pool = KVPool(
            ops,
            self.model.config,
            num_pages,
            self.page_size,
            self.kv_dtype,
            device,
            has_spare=has_spare,
            sparse=self.sparse,
            offload=self.offload,
        )
        model = self.model if self.offload is None else offloaded(self.model, ops, self.offload, pool.buffer)
        info = describe(self, pool, model_len)
        sequences = make_sequences(config.max_seqs, model_len, num_pages, self.page_size)
        speculator = None
        if config.speculation is not None and not is_trial:
            speculator = build_speculator(config.speculation, model, ops, pool, sequences, info, self.draft)
            info = replace(info, drafters=speculator.drafters)
        graphs = None
        if self.accelerator is not None and sizes:
            plans = ops if isinstance(ops, FixedPlans) else None
            max_pages = sequences.page_table.shape[1]
            capture, transfer = self.accelerator.capture(), Transfer(device)
            graphs = GraphedForward(model, plans, pool, max_pages, sizes, capture, transfer)
        worker = Worker(
            graphs or model,
            ops,
            pool,
            sequences,
            GrammarCompiler(None if is_trial else self._tokenizer_file(), info.vocab_size, info.eos_ids),
            info,
            config.max_seqs,
            config.max_batched_tokens,
            device,
            speculator=speculator,
            profile_memory=make_memory(info),
            prober=make_prober(info),
            learnt=self.learnt,
            attention=self._attention_probe(),
            place=None if graphs is None else graphs.place,
            num_compiled=None if self.accelerator is None else self.accelerator.num_compiled,
            plans_ahead=not is_trial and config.plans_ahead(device.type),
        )
        return Assembled(worker, graphs, pool)

    def _tokenizer_file(self) -> Path | None:
        path = self.folder / "tokenizer.json" if self.folder is not None else None
        return path if path is not None and path.exists() else None

    def _attention_probe(self) -> AttentionProbe | None:
        """For models that have caches which drift."""
        diffusion = self.diffusion
        if diffusion is None or diffusion.topology is not Topology.BIDIRECTIONAL:
            return None
        return AttentionProbe(self.model, self.ops, diffusion.mask_id, self.device)


def captured_sizes(config: WorkerConfig, ops: Ops) -> tuple[int, ...]:
    """Sizes of the steps that are captured on an accelerator; () = none, and the log says why."""
    reason = None
    if config.enforce_eager:
        reason = "enforce_eager is set"
    elif config.attention is not None and config.attention.offload:
        reason = "kv-offload sends for other keys in each step"
    elif config.deterministic:
        reason = "deterministic cuts attention where a step's keys say, and a captured step has room for no more parts"
    elif not isinstance(ops, FixedPlans):
        reason = f"the back end {ops.name} reads a step's rows back to the host"
    if reason is not None:
        logger.info("forwards are not captured in CUDA graphs: %s", reason)
        return ()
    return graph_sizes(min(config.max_graph_tokens or MOST_TOKENS, config.max_batched_tokens))


def measure_needs(parts: Parts, accelerator: Accelerator, before: MemoryReading) -> Needs:
    """What a model's steps and graphs take of a device, tried out on a pool that is just large enough.

    before  of the device before the model was loaded
    """
    loaded = accelerator.read()
    activations, readings = _try_out(parts, accelerator)
    gc.collect()  # graphs hold their forwards in cycles
    after = accelerator.read()
    # Kernels and libraries are loaded by now.
    other = after.total - after.free - after.reserved + before.allocated
    graphs = graph_bytes(readings, len(parts.sizes))
    return Needs(after.total, other, loaded.allocated - before.allocated, activations, graphs)


def _try_out(parts: Parts, accelerator: Accelerator) -> tuple[int, list[MemoryReading]]:
    """Most bytes that a step allocates, and readings before any graph, after the largest and after another one."""
    config = parts.config
    model_len = min(config.max_model_len or parts.model.config.max_position, config.max_batched_tokens)
    num_pages = pages_for(model_len, parts.page_size)
    worker, graphs, _ = parts.assemble(num_pages, model_len, is_trial=True, sizes=parts.sizes[-2:])

    def run() -> None:
        for plan in largest_steps(worker.info, config.max_seqs, config.max_batched_tokens):
            worker.run(plan)

    activations = peak_of(accelerator, run)
    readings = [accelerator.read()]
    if graphs is not None:
        graphs.capture(after_each=lambda: readings.append(accelerator.read()))
    return activations, readings


def describe(parts: Parts, pool: KVPool, model_len: int) -> WorkerInfo:
    model = parts.model
    return WorkerInfo(
        model_len=model_len,
        vocab_size=model.config.vocab_size,
        num_pages=pool.num_pages,
        page_size=pool.page_size,
        weight_bytes=model.num_weight_bytes,
        kv_bytes=pool.num_bytes,
        dtype=str(parts.dtype).removeprefix("torch."),
        device=str(parts.device),
        ops=parts.ops.name,
        eos_ids=tuple(model.config.eos_token_ids),
        diffusion=parts.diffusion,
        attention=() if pool.sparse is None else pool.sparse.offers,
        num_parameters=sum(math.prod(shape) for _, shape in weight_shapes(model.config)),
    )
