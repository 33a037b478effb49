"""From a `WorkerConfig` to a worker that is ready: threads, back end, weights, KV pool, grammars.

The one place that looks at the machine (`machine.py`) and loads. What it chooses is shown in `WorkerInfo`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kernels.ops import Ops
from kernels.select import select_ops
from server.models.checkpoint import checkpoint_hash
from server.models.loading import load_model, random_model, resolve_model
from server.models.registry import Model
from server.worker.accelerator import Accelerator, CudaAccelerator
from server.worker.assembly import Parts, captured_sizes, measure_needs
from server.worker.config import WorkerConfig
from server.worker.denoising.learn2pd import load_filter
from server.worker.drafters.draft_model import DraftModel, load_draft_model
from server.worker.host_memory import keep_step_buffers, return_free_memory
from server.worker.info import WorkerInfo, diffusion_model
from server.worker.kv_pool import KVPool, available_bytes, choose_kv_dtype, choose_page_size, page_bytes, size_pool
from server.worker.kv_scales import check_asked, choose_scales
from server.worker.machine import choose_device, choose_dtype, device_name, usable_cores
from server.worker.memory import ON_HOST, Ledger, MemoryReading, kv_budget, ledger, show
from server.worker.offload import OffloadPlan
from server.worker.profile import SHAPES, ProfileMemory
from server.worker.profile_memory import DiskMemory, default_folder
from server.worker.sparse_memory import SparsePlan, check_model
from server.worker.warm_up import run_kernels
from server.worker.worker import Worker

logger = logging.getLogger(__name__)


Remember = Callable[[WorkerInfo], ProfileMemory | None]


def build_worker(config: WorkerConfig, progress: bool, accelerator: Accelerator | None = None) -> Worker:
    """Load the model and build its worker.

    progress     show bars while weights load and graphs are captured
    accelerator  in place of the CUDA device's own, for tests
    Raises ValueError or OSError with a sentence for the user when something cannot be loaded or does not fit.
    """
    check_asked(config.kv_cache_scales, config.kv_cache_dtype, config.random_weights)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    num_threads = config.num_threads or usable_cores()
    if device.type == "cpu":
        keep_step_buffers()
    elif accelerator is None:
        accelerator = CudaAccelerator()
    before = accelerator.read() if accelerator is not None else None
    ops = select_ops(device, dtype, config.quantization, num_threads, config.deterministic)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype, ops)
    # After an operator on two threads, torch's second one spins for milliseconds: on 2 cores that took a step of 8 rows
    # from 11 ms to 17 ms.
    torch.set_num_threads(1 if ops.owns_threads else num_threads)
    model, folder = _load(config, ops, dtype, device, progress)
    return_free_memory()
    weights_folder = folder if config.random_weights is None else None
    model = _scaled(model, config.kv_cache_scales, kv_dtype, weights_folder)
    draft = _load_draft(config, model, folder, ops, dtype, device, progress)
    if draft is not None:
        draft = replace(draft, model=_scaled(draft.model, None, kv_dtype, draft.folder))
    diffusion = diffusion_model(model.config, config.denoise_block_size)
    learnt = load_filter(folder) if folder is not None and diffusion is not None else None
    if diffusion is not None and learnt is not None:
        diffusion = replace(diffusion, learnt_block=learnt.block_size)
    offload = _offload_plan(config, model, ops)
    parts = Parts(
        config,
        model,
        folder,
        ops,
        draft,
        dtype,
        kv_dtype,
        device,
        choose_page_size(config.page_size, device, diffusion),
        diffusion,
        learnt,
        accelerator,
        captured_sizes(config, ops) if accelerator is not None else (),
        _sparse_plan(config, model, folder, dtype, kv_dtype, () if offload is None else offload.hosted),
        offload,
    )
    remember = partial(_profile_memory, parts, num_threads)
    if accelerator is None or before is None:
        return _on_host(parts, remember)
    return _on_accelerator(parts, accelerator, before, remember, progress)


def _scaled(model: Model, file: str | None, kv_dtype: torch.dtype, folder: Path | None) -> Model:
    scale_L2K = choose_scales(file, kv_dtype, model.config, folder)
    return model if scale_L2K is None else model.scaled(scale_L2K)


def _size(parts: Parts, device_bytes: int | None = None) -> tuple[int, int]:
    config, draft = parts.config, parts.draft
    ops, size, kv_dtype = parts.ops, parts.page_size, parts.kv_dtype
    more_bytes = draft.page_bytes(ops, size, kv_dtype, parts.device) if draft is not None else 0
    if parts.sparse is not None:
        few = KVPool(ops, parts.model.config, 4, size, kv_dtype, parts.device)
        more_bytes += parts.sparse.page_bytes(ops, few.layers)
    offload = parts.offload
    sizes = size_pool(
        parts.model.config if offload is None else offload.device_shape,
        parts.kv_dtype,
        parts.page_size,
        config.max_seqs,
        config.max_model_len,
        config.kv_cache_bytes,
        more_bytes,
        config.kv_share,
        device_bytes,
    )
    if offload is None:
        return sizes
    host_bytes = page_bytes(offload.host_shape, size, kv_dtype)
    return offload.limit(sizes, size, host_bytes, available_bytes(), config.max_model_len)


def _on_host(parts: Parts, remember: Remember) -> Worker:
    if parts.offload is not None:
        logger.warning("kv-offload on a CPU: both memories are the same one, so nothing is saved, and keys are copied")
    worker, _, pool = parts.assemble(*_size(parts), remember)
    info = worker.info
    worker.info = replace(info, memory=(("weights", info.weight_bytes), ("KV pages", info.kv_bytes), *_of_host(pool)))
    return worker


def _of_host(pool: KVPool) -> Ledger:
    return ((ON_HOST, pool.host_bytes),) if pool.host_bytes else ()


def _sparse_plan(
    config: WorkerConfig,
    model: Model,
    folder: Path | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    ahead: Collection[int],
) -> SparsePlan | None:
    if config.prompt_attention:
        check_model(model.config)
    if kv_dtype != dtype and (config.attention is not None or config.prompt_attention):
        raise ValueError(
            f"kv-cache-dtype is {config.kv_cache_dtype}, but sparse attention chooses keys by pages of the model's "
            "dtype; leave one of them out"
        )
    if config.attention is None:
        return None
    # The weights are read once more only where there is something to compare with.
    is_hashed = bool(config.attention.calibration) and folder is not None and config.random_weights is None
    weights_hash = checkpoint_hash(folder) if is_hashed and folder else None
    return SparsePlan(config.attention, model.config, weights_hash, ahead)


def _offload_plan(config: WorkerConfig, model: Model, ops: Ops) -> OffloadPlan | None:
    if config.attention is None or not config.attention.offload:
        return None
    drafters = () if config.speculation is None else config.speculation.drafters
    return OffloadPlan(config.attention, model.config, ops, drafters)


def _on_accelerator(
    parts: Parts, accelerator: Accelerator, before: MemoryReading, remember: Remember, progress: bool
) -> Worker:
    """Measure, divide the memory, run every kernel once, capture. before: the device before anything was loaded."""
    config = parts.config
    needs = measure_needs(parts, accelerator, before)
    budget = kv_budget(needs, config.gpu_memory_utilization, config.kv_cache_bytes)
    worker, graphs, pool = parts.assemble(*_size(parts, budget), remember)
    run_kernels(worker.run, parts.ops, pool, worker.info, config.max_seqs, config.max_batched_tokens)
    if graphs is not None:
        uncaptured = accelerator.read().free
        graphs.capture(progress)
        needs = replace(needs, graphs=max(0, uncaptured - accelerator.read().free))
    held = (*ledger(needs, pool.num_bytes), *_of_host(pool))
    logger.info("device memory: %s", ", ".join(f"{what} {show(size)}" for what, size in held))
    worker.info = replace(worker.info, memory=held)
    return worker


def _load(
    config: WorkerConfig, ops: Ops, dtype: torch.dtype, device: torch.device, progress: bool
) -> tuple[Model, Path | None]:
    """The model and the folder of its tokenizer; random weights borrow the tokenizer of `model`."""
    if config.random_weights is None:
        folder = resolve_model(config.model, config.revision, config.download_dir)
        return load_model(folder, ops, dtype, device, progress, config.max_model_len), folder
    model = random_model(config.random_weights, ops, dtype, device, config.seed, config.max_model_len)
    try:
        return model, resolve_model(config.model, config.revision, config.download_dir)
    except (ValueError, OSError) as error:
        logger.warning("random weights without a tokenizer, so structured output is refused: %s", error)
        return model, None


def _load_draft(
    config: WorkerConfig,
    model: Model,
    folder: Path | None,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
) -> DraftModel | None:
    """The draft model, if one is asked for: before the pool is sized, because its keys are paid from the same memory.

    Raises ValueError if its vocabulary is another than the model's.
    """
    asked = config.speculation
    if asked is None or "draft_model" not in asked.drafters:
        return None
    if asked.draft_model is None:
        raise ValueError("drafters names 'draft_model', but no draft model is given; set draft_model to one")
    return load_draft_model(
        asked.draft_model,
        folder,
        model.config.vocab_size,
        ops,
        dtype,
        device,
        config.max_model_len,
        progress,
        download_dir=config.download_dir,
    )


def _profile_memory(parts: Parts, num_threads: int, info: WorkerInfo) -> DiskMemory | None:
    """Of everything that the time of a step depends on and that is known here."""
    config, folder = parts.config, default_folder()
    if folder is None or not config.remember_profile:
        return None
    conditions: dict[str, str | int] = {
        "shapes": repr(SHAPES),
        "model": repr(parts.model.config),
        "weight_bytes": info.weight_bytes,
        "dtype": info.dtype,
        "quantization": config.quantization or "",
        "kv_cache_dtype": config.kv_cache_dtype,
        "deterministic": int(config.deterministic),
        "device": device_name(info.device),
        "ops": info.ops,
        "captured": repr(parts.sizes),
        "offloaded": int(parts.offload is not None),
        "threads": num_threads,
        "torch": torch.__version__,
        "pages": info.num_pages,
        "page_size": info.page_size,
        "model_len": info.model_len,
        "max_seqs": config.max_seqs,
        "max_batched_tokens": config.max_batched_tokens,
    }
    return DiskMemory(folder, conditions)
