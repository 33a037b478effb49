"""What the worker is told at start. Data only: the engine builds it from its own configuration."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.types import PromptMethod
from server.worker.drafters.config import SpeculatorConfig
from server.worker.sparse_config import SparseConfig


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One model on one device. None = chosen by `build_worker` when it knows the model and the machine.

    model           a folder, an embedded name or a hub id (`server/models/loading.py`)
    dtype           auto, bfloat16, float16 or float32; auto is bfloat16 where the machine multiplies it natively
    device          auto, cpu or cuda
    random_weights  a shape such as "hidden=768,layers=12,heads=12"; then `model` is not read
    quantization    None, int8 or int4: weight-only, lossy
    kv_cache_dtype  auto (the model's dtype), bfloat16, float16, float32, fp8 or int8; the last two are lossy
    kv_cache_scales  file of `kv_scales.write_scales`, for fp8; None = the checkpoint's scales, or 1
    deterministic   kernels that give a row the same bits whatever rows are beside it, where the back end has a choice
    kv_cache_bytes  size of the KV pool; None = a share of what is free
    gpu_memory_utilization  part of a CUDA device's memory, in (0, 1], for all that this process holds there
    enforce_eager   no forward is captured in a CUDA graph
    max_graph_tokens  rows of the largest captured step; None = `graphs.MOST_TOKENS`, or max_batched_tokens if less
    async_scheduling  auto, on or off: steps are begun before the tokens of the one before are on the host; auto = on
                    a device that computes beside it
    kv_share        part of that share, in (0, 1]: what is left is for the pools of other models
    max_model_len   longest sequence in tokens; None = the model's, or what the pool holds
    max_batched_tokens, max_seqs   what a plan may bring; they size the KV pool and the page table
    seed            of random weights
    num_threads     CPU threads of the forward pass; None = one per core this process may use
    remember_profile  keep the warm-up's step times on disk (XDG cache), so that the next start is faster
    denoise_block_size  tokens of a block, for a checkpoint that can denoise and leaves it open
    speculation     which drafters are built; None = none, and nothing is ever proposed
    attention       sparse attention that requests may choose for their output; None = all of it is dense
    prompt_attention  methods that they may choose for their prompts
    """

    model: str = "braid-tiny"
    dtype: str = "auto"
    device: str = "auto"
    random_weights: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_scales: str | None = None
    deterministic: bool = False
    kv_cache_bytes: int | None = None
    kv_share: float = 1.0
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    max_graph_tokens: int | None = None
    async_scheduling: str = "auto"
    max_model_len: int | None = None
    page_size: int | None = None
    max_batched_tokens: int = 1024
    max_seqs: int = 64
    num_threads: int | None = None
    revision: str | None = None
    download_dir: str | None = None
    seed: int = 0
    denoise_block_size: int | None = None
    speculation: SpeculatorConfig | None = None
    attention: SparseConfig | None = None
    prompt_attention: tuple[PromptMethod, ...] = ()
    remember_profile: bool = True

    def plans_ahead(self, device_type: str) -> bool:
        if self.async_scheduling not in ("auto", "on", "off"):
            raise ValueError(f"async-scheduling is {self.async_scheduling!r}: expected auto, on or off")
        return self.async_scheduling == "on" or (self.async_scheduling == "auto" and device_type != "cpu")
