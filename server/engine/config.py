"""What the engine process is told at start (`EngineConfig`) and what it answers (`EngineInfo`).

Data only, no torch: the front end builds the one and shows the other. Nothing here is written to after construction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from scheduler.types import (
    Attention,
    AttentionOffer,
    DiffusionModel,
    Limits,
    PromptAttention,
)
from server.engine.attention import DENSE as DENSE
from server.engine.attention import AttentionConfig as AttentionConfig
from server.engine.attention import LabelDtype as LabelDtype


class EngineState(StrEnum):
    """What the front end may expect of the engine; only READY is a 200 of the readiness probe."""

    LOADING = "loading"
    READY = "ready"
    HUNG = "hung"
    RESTARTING = "restarting"
    DRAINING = "draining"
    DEAD = "dead"


DRAFTERS = (
    *("prediction", "grammar", "suffix", "history", "adjacency", "ngram_prob", "trigram"),
    *("draft_model", "layer_subset", "diffusion", "sparse_attention"),
)
"""Drafters that can be asked for by name."""


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How an engine speculates. It changes how fast a text comes, never the text.

    mode          auto: requests that say nothing get as many drafts as pay; on: all that are offered; off: no drafter
                  is built, and nothing is drafted for anybody
    drafters      names of `DRAFTERS`, in order of preference; None = the lookup drafters that need no setting, and the
                  model drafters that have one
    max_drafts    most drafts of one sequence in one step
    policy, table how the scheduler chooses the number (`scheduler.types.SpeculationSettings`)
    draft_model, draft_stop, draft_tree, layer_subset, store_bytes, store_file
                  of the drafters, as `server/worker/drafters/config.py` has them
    synthetic_acceptance   in (0, 1]: for capacity tests, the drafter `synthetic` alone, right this often
    """

    mode: str = "auto"
    drafters: tuple[str, ...] | None = None
    max_drafts: int = 8
    policy: str = "marginal"
    table: tuple[tuple[int, int], ...] = ()
    draft_model: str | None = None
    draft_stop: str = "confidence"
    draft_tree: bool = False
    layer_subset: str | None = None
    store_bytes: int = 256 << 20
    store_file: str | None = None
    synthetic_acceptance: float | None = None

    def check(self) -> None:
        """Raises ValueError, in the flags' names, for settings that contradict each other."""
        if (self.policy == "table") != bool(self.table):
            raise ValueError("speculation-policy table and speculation-table 1:8,4:4 need each other; one is missing")
        for most, drafts in self.table:
            if most < 1 or drafts > self.max_drafts:
                raise ValueError(
                    f"speculation-table has {most}:{drafts}, but sequences are at least 1 and drafts at most "
                    f"num-speculative-tokens {self.max_drafts}"
                )
        for name in self.drafters or ():
            if name not in DRAFTERS:
                raise ValueError(f"drafters names {name!r}; there are {', '.join(DRAFTERS)}")
        for name, value in (("draft_model", self.draft_model), ("layer_subset", self.layer_subset)):
            flag, is_set = name.replace("_", "-"), value is not None
            if self.drafters is not None and (name in self.drafters) != is_set:
                missing = (
                    f"{flag} is set, but drafters leaves {name} out" if is_set else f"drafters has {name}: set {flag}"
                )
                raise ValueError(missing)
        if self.layer_subset is not None and not re.fullmatch(r"uniform:0?\.\d+|search|exit", self.layer_subset):
            raise ValueError(f"layer-subset is {self.layer_subset!r}: expected uniform:0.5 (a share), search or exit")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine. None = chosen by the engine when it knows the model and the machine.

    name                     of its model in `Request.model`; the first one's is ""
    model ... seed           handed to the worker as they are (`server/worker/build.py`)
    max_queued_requests      None = 4 x max_seqs; max_queued_tokens: None = 8 x context
    tbt_slo_s                target of the time between two tokens of a stream; None = from the undisturbed step
    queue_timeout_s          longest wait for a first step, then 503; None = no limit
    grammar_timeout_s        longest compilation of a structured-output constraint
    step_timeout_s           silence of the loop after which the engine is restarted; readiness fails at a quarter
    default_decoding         policy of requests that denoise and name none; None = the model's own (`auto`)
    denoise_block_size       tokens of a block, for a checkpoint that can denoise and leaves it open
    delta_interval_s         tokens of faster steps are sent together, at most this long after the last message
    kv_share                 of the memory that the pool would take unasked: the others' pools have the rest
    also                     the engine's other models, each with all its settings; those of the process (the step
                             timeout, the delta interval) count where the first has them
    warm_up                  measure a few steps at start, so that the step-time model is right from the first request
    """

    name: str = ""
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
    max_logprobs: int = 20
    seed: int = 0
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    max_prefill_share: float = 0.5
    tbt_slo_s: float | None = None
    enable_prefix_caching: bool = True
    queue_timeout_s: float | None = 30.0
    grammar_timeout_s: float = 5.0
    step_timeout_s: float = 120.0
    delta_interval_s: float = 0.01
    warm_up: bool = True
    progress: bool = True
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    default_decoding: str | None = None
    denoise_block_size: int | None = None
    also: tuple[EngineConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The engine as it runs: the worker's facts and the limits in force. Lengths in tokens, sizes in bytes.

    diffusion   how the model denoises; None = it only generates token by token
    phases      start-up, in order: (name, seconds)
    memory      what holds how many bytes: weights and KV pages; on a GPU all of its memory
    drafters    (name, whether it runs a model step by step), in order of preference; none = nothing is ever drafted
    max_drafts  most drafts of one sequence in one step
    speculation, synthetic_acceptance   as configured (`SpeculationConfig`)
    attention   the sparse methods that requests may choose
    default_attention   what requests get that say nothing
    attention_budget, attention_correct_every   of those that leave them out
    prompt_attention, default_prompt_attention   the same for prompts, with the threshold of who names none
    name, also  of several models: this one's name in `Request.model`, and what there is besides the first
    """

    model: str
    model_len: int
    vocab_size: int
    num_parameters: int
    num_pages: int
    page_size: int
    weight_bytes: int
    kv_bytes: int
    dtype: str
    device: str
    ops: str
    eos_ids: tuple[int, ...]
    max_batched_tokens: int
    max_seqs: int
    max_queued_requests: int
    max_queued_tokens: int
    max_logprobs: int
    tbt_slo_s: float | None
    enable_prefix_caching: bool
    pid: int
    diffusion: DiffusionModel | None = None
    phases: tuple[tuple[str, float], ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    drafters: tuple[tuple[str, bool], ...] = ()
    max_drafts: int = 8
    speculation: str = "off"
    synthetic_acceptance: float | None = None
    attention: tuple[AttentionOffer, ...] = ()
    default_attention: Attention | None = None
    attention_budget: int = 1024
    attention_correct_every: int = 0
    prompt_attention: tuple[PromptAttention, ...] = ()
    default_prompt_attention: PromptAttention | None = None
    name: str = ""
    also: tuple[EngineInfo, ...] = ()

    @property
    def models(self) -> tuple[EngineInfo, ...]:
        """All models of the engine, the first one first."""
        return (self, *self.also)

    def of(self, name: str) -> EngineInfo:
        """The model that `Request.model` calls so. Raises ValueError."""
        for model in self.models:
            if model.name == name:
                return model
        raise ValueError(f"the engine has no model {name!r}")

    @property
    def kv_tokens(self) -> int:
        return self.num_pages * self.page_size


def make_limits(config: EngineConfig, model_len: int, num_pages: int, page_size: int) -> Limits:
    """The scheduler's `Limits` for a worker of this size; what the configuration leaves open is filled in here."""
    queued_requests = config.max_queued_requests
    queued_tokens = config.max_queued_tokens
    max_seqs = min(config.max_seqs, config.max_batched_tokens)
    return Limits(
        max_batched_tokens=config.max_batched_tokens,
        max_seqs=max_seqs,
        max_model_len=model_len,
        num_pages=num_pages,
        page_size=page_size,
        max_prefill_share=config.max_prefill_share,
        max_queued_requests=4 * max_seqs if queued_requests is None else queued_requests,
        max_queued_tokens=8 * model_len if queued_tokens is None else queued_tokens,
        tbt_slo_s=config.tbt_slo_s,
        enable_prefix_caching=config.enable_prefix_caching,
    )
