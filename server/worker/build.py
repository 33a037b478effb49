"""From a `WorkerConfig` to a worker that is ready: threads, back end, weights, KV pool, grammars.

The one place that looks at the machine. Everything it chooses is logged once and shown in `WorkerInfo`.
"""

from __future__ import annotations

import logging
import math
import os
import platform
from dataclasses import replace
from pathlib import Path

import torch

from kernels.ops import Ops
from kernels.select import select_ops
from scheduler.types import DiffusionModel, Topology
from server.models.layers import weight_shapes
from server.models.loading import load_model, random_model, resolve_model
from server.models.registry import Model
from server.worker.attention_calibration import checkpoint_hash
from server.worker.attention_probe import AttentionProbe
from server.worker.config import WorkerConfig
from server.worker.denoising.learn2pd import load_filter
from server.worker.drafters.build import build_speculator
from server.worker.drafters.diffusion import make_prober
from server.worker.drafters.draft_model import DraftModel, load_draft_model
from server.worker.grammar import GrammarCompiler
from server.worker.host_memory import keep_step_buffers, return_free_memory
from server.worker.info import diffusion_model
from server.worker.kv_pool import KVPool, choose_page_size, size_pool
from server.worker.profile import SHAPES
from server.worker.profile_memory import DiskMemory, default_folder
from server.worker.sequences import make_sequences
from server.worker.sparse_memory import SparsePlan
from server.worker.worker import Worker, WorkerInfo

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags (the last is Arm's) of processors that multiply bfloat16 themselves."""


def build_worker(config: WorkerConfig, progress: bool) -> Worker:
    """Load the model and build its worker. progress: show a bar while weights load.

    Raises ValueError or OSError with a sentence for the user when something cannot be loaded or does not fit.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    num_threads = config.num_threads or usable_cores()
    if device.type == "cpu":
        keep_step_buffers()
    ops = select_ops(device, dtype, quantization=config.quantization, num_threads=num_threads)
    # After an operator on two threads, torch's second one spins for milliseconds: on 2 cores that took a step of 8 rows
    # from 11 ms to 17 ms.
    torch.set_num_threads(1 if ops.owns_threads else num_threads)
    model, folder = _load(config, ops, dtype, device, progress)
    return_free_memory()
    draft = _load_draft(config, model, folder, ops, dtype, device, progress)
    diffusion = diffusion_model(model.config, config.denoise_block_size)
    learnt = load_filter(folder) if folder is not None and diffusion is not None else None
    if diffusion is not None and learnt is not None:
        diffusion = replace(diffusion, learnt_block=learnt.block_size)
    page_size = choose_page_size(config.page_size, device, diffusion)
    sparse = _sparse_plan(config, model, folder)
    more_bytes = draft.page_bytes(ops, page_size, dtype, device) if draft is not None else 0
    if sparse is not None:
        more_bytes += sparse.page_bytes(ops, KVPool(ops, model.config, 4, page_size, dtype, device).layers)
    num_pages, model_len = size_pool(
        model.config,
        dtype,
        device,
        page_size,
        config.max_seqs,
        config.max_model_len,
        config.kv_cache_bytes,
        more_bytes,
        config.kv_share,
    )
    pool = KVPool(ops, model.config, num_pages, page_size, dtype, device, sparse=sparse)
    info = _describe(model, ops, pool, model_len, dtype, device, diffusion)
    tokenizer_file = folder / "tokenizer.json" if folder is not None else None
    if tokenizer_file is not None and not tokenizer_file.exists():
        tokenizer_file = None
    grammars = GrammarCompiler(tokenizer_file, info.vocab_size, info.eos_ids)
    sequences = make_sequences(config.max_seqs, model_len, num_pages, page_size)
    speculator = None
    if config.speculation is not None:
        speculator = build_speculator(config.speculation, model, ops, pool, sequences, info, draft)
        info = replace(info, drafters=speculator.drafters)
    return Worker(
        model,
        ops,
        pool,
        sequences,
        grammars,
        info,
        config.max_seqs,
        config.max_batched_tokens,
        device,
        speculator=speculator,
        profile_memory=_profile_memory(config, model, info, num_threads),
        prober=make_prober(info),
        learnt=learnt,
        attention=_attention_probe(model, ops, info, device),
    )


def _sparse_plan(config: WorkerConfig, model: Model, folder: Path | None) -> SparsePlan | None:
    if config.attention is None:
        return None
    # The weights are read once more only where there is something to compare with.
    is_hashed = bool(config.attention.calibration) and folder is not None and config.random_weights is None
    return SparsePlan(config.attention, model.config, checkpoint_hash(folder) if is_hashed and folder else None)


def _attention_probe(model: Model, ops: Ops, info: WorkerInfo, device: torch.device) -> AttentionProbe | None:
    """For models that have caches which drift."""
    diffusion = info.diffusion
    if diffusion is None or diffusion.topology is not Topology.BIDIRECTIONAL:
        return None
    return AttentionProbe(model, ops, diffusion.mask_id, device)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it natively, else float32, unless the user says."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or cpu_flags() & _NATIVE_BF16 else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def cpu_flags() -> set[str]:
    """Instruction sets of the first processor; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def usable_cores() -> int:
    """Physical cores this process may use, no more than its control group's CPU quota; at least 1.

    Two threads on one core share its vector units and gain nothing; a thread beyond the quota stalls every barrier.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in cpus}
    return max(1, min(len(cores), _cpu_quota()))


def _core_of(cpu: int) -> tuple[str, str]:
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package = (folder / "physical_package_id").read_text().strip()
        return package, (folder / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _cpu_quota() -> int:
    """CPUs that the control group grants, rounded up; a large number where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return 1 << 16


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


def _describe(
    model: Model,
    ops: Ops,
    pool: KVPool,
    model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    diffusion: DiffusionModel | None,
) -> WorkerInfo:
    return WorkerInfo(
        model_len=model_len,
        vocab_size=model.config.vocab_size,
        num_pages=pool.num_pages,
        page_size=pool.page_size,
        weight_bytes=model.num_weight_bytes,
        kv_bytes=pool.num_bytes,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        ops=ops.name,
        eos_ids=tuple(model.config.eos_token_ids),
        diffusion=diffusion,
        num_parameters=sum(math.prod(shape) for _, shape in weight_shapes(model.config)),
        attention=() if pool.sparse is None else pool.sparse.offers,
    )


def _profile_memory(config: WorkerConfig, model: Model, info: WorkerInfo, num_threads: int) -> DiskMemory | None:
    """Of everything that the time of a step depends on and that is known here."""
    folder = default_folder()
    if folder is None or not config.remember_profile:
        return None
    conditions: dict[str, str | int] = {
        "shapes": repr(SHAPES),
        "model": repr(model.config),
        "weight_bytes": info.weight_bytes,
        "dtype": info.dtype,
        "quantization": config.quantization or "",
        "device": device_name(info.device),
        "ops": info.ops,
        "threads": num_threads,
        "torch": torch.__version__,
        "pages": info.num_pages,
        "page_size": info.page_size,
        "model_len": info.model_len,
        "max_seqs": config.max_seqs,
        "max_batched_tokens": config.max_batched_tokens,
    }
    return DiskMemory(folder, conditions)


def device_name(device: str) -> str:
    """The GPU's or the processor's name as the driver or the system has it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
