"""The engine's parts put together: worker, scheduler, core. The only module of the server that builds all three.

The loop itself is in runner.py, the step in core.py; neither knows torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import fields, replace

from scheduler.policies import BadPolicy, make_diffusion
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from scheduler.types import (
    Attention,
    AttentionMethod,
    AttentionOffer,
    DiffusionModel,
    PromptMethod,
    SpeculationSettings,
)
from server.engine.config import DENSE, AttentionConfig, EngineConfig, EngineInfo, SpeculationConfig, make_limits
from server.engine.core import EngineCore
from server.engine.several import SeveralCores
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.config import DEFAULT_DRAFTERS, MASK_DRAFTER, SpeculatorConfig
from server.worker.sparse_config import SparseConfig
from server.worker.worker import Worker


def worker_config(config: EngineConfig) -> WorkerConfig:
    names = {field.name for field in fields(WorkerConfig)} & {field.name for field in fields(EngineConfig)}
    values, asked = {name: getattr(config, name) for name in names}, config.attention
    parts = {
        # A sparse pass that drafts reads the keys of all layers: they must be here.
        "speculation": speculator_config(config.speculation, bool(asked.allowed()) and not asked.offload),
        "attention": sparse_config(asked),
        "prompt_attention": prompt_methods(asked),
    }
    return WorkerConfig(**values | parts)


def sparse_config(asked: AttentionConfig) -> SparseConfig | None:
    """What the KV memory is made for; None = dense attention alone."""
    methods = asked.allowed()
    own = (asked.calibration, asked.num_channels, asked.label_dtype, asked.offload, asked.offload_bytes)
    return SparseConfig(methods, *own) if methods else None


def prompt_methods(asked: AttentionConfig) -> tuple[PromptMethod, ...]:
    return tuple(offer.method for offer in asked.for_prompts())


def speculator_config(asked: SpeculationConfig, has_sparse: bool = False) -> SpeculatorConfig | None:
    """What the worker builds; None = no drafter at all. has_sparse: requests may ask for drafts of sparse attention."""
    if asked.mode == "off":
        return None
    drafters = asked.drafters
    if asked.synthetic_acceptance is not None:
        # Alone: beside others that find true drafts, the acceptance would not be the one asked for.
        drafters = ("synthetic",)
    elif drafters is None:
        drafters = DEFAULT_DRAFTERS
        drafters += ("draft_model",) if asked.draft_model is not None else ()
        drafters += ("layer_subset",) if asked.layer_subset is not None else ()
        drafters += ("sparse_attention",) if has_sparse else ()
    names = {field.name for field in fields(SpeculatorConfig)} & {field.name for field in fields(SpeculationConfig)}
    values = {name: getattr(asked, name) for name in names}
    with_masks = asked.drafters is None and asked.synthetic_acceptance is None
    return SpeculatorConfig(**values | {"drafters": drafters, "with_masks": with_masks})


def speculation_settings(
    asked: SpeculationConfig, drafters: tuple[tuple[str, bool], ...], model: DiffusionModel | None = None
) -> SpeculationSettings | None:
    """What the scheduler is told; None = no drafter is there, and nothing is planned for any.

    model  what it can denoise, where it can
    """
    if not drafters:
        return None
    names = dict(drafters)
    settings = SpeculationSettings(asked.policy, asked.max_drafts, asked.table, any(names.values()))
    if MASK_DRAFTER in names and model is not None:
        settings = replace(settings, mask_drafter=MASK_DRAFTER, mask_block=model.block_size)
    return settings


def default_attention(config: AttentionConfig, offers: tuple[AttentionOffer, ...]) -> Attention | None:
    """What a request gets that says nothing. Raises ValueError for a budget that the method cannot work with."""
    if config.default == DENSE:
        return None
    found = Attention(AttentionMethod(config.default), config.budget, correct_every=config.correct_every)
    if (misfit := found.misfit(offers)) is not None:
        raise ValueError(f"attention-{misfit[0]} {misfit[1]}")
    return found


def diffusion_model(config: EngineConfig, found: DiffusionModel | None) -> DiffusionModel | None:
    """How the model denoises here: the checkpoint's facts with the configured default policy.

    Raises ValueError for a policy that this model cannot have. Of several models, one that denoises is enough.
    """
    if config.default_decoding is None or (found is None and (config.also or config.name)):
        return found
    if found is None:
        raise ValueError(f"default-decoding is {config.default_decoding}, but {config.model} cannot denoise")
    try:
        asked = make_diffusion(config.default_decoding, found.topology)
        if (misfit := found.misfit(asked)) is not None:
            raise BadPolicy(*misfit)
    except BadPolicy as error:
        raise ValueError(f"default-decoding: {error}") from error
    return replace(found, policy=config.default_decoding)


def build_cores(
    config: EngineConfig, wake: Callable[[], None] = lambda: None
) -> tuple[EngineCore | SeveralCores, EngineInfo]:
    """A core for each model of the configuration; as `build_core` where it has one."""
    core, facts = build_core(config, wake)
    if not config.also:
        return core, facts
    cores, phases = {config.name: core}, list(facts.phases)
    also = []
    for other in config.also:
        cores[other.name], its_facts = build_core(other, wake)
        also.append(its_facts)
        phases += [(f"{phase} of {other.name}", seconds) for phase, seconds in its_facts.phases]
    facts = replace(facts, also=tuple(also), phases=tuple(phases))
    if config.default_decoding is not None and not any(model.diffusion for model in facts.models):
        raise ValueError(f"default-decoding is {config.default_decoding}, but no model here can denoise")
    return SeveralCores(cores), facts


def build_core(config: EngineConfig, wake: Callable[[], None] = lambda: None) -> tuple[EngineCore, EngineInfo]:
    """Worker, scheduler and core of this process, warmed up; raises what the model or the machine refuses."""
    phases: list[tuple[str, float]] = []
    started_at = time.monotonic()
    worker = build_worker(worker_config(config), progress=config.progress)
    phases.append(("model", time.monotonic() - started_at))
    facts = worker.info
    limits = make_limits(config, facts.model_len, facts.num_pages, facts.page_size)
    cost = StepCost()
    if config.warm_up:
        started_at = time.monotonic()
        cost.seed(worker.profile())
        phases.append(("warm-up", time.monotonic() - started_at))
    core = EngineCore(
        worker,
        Scheduler(
            limits,
            cost,
            speculation=speculation_settings(config.speculation, facts.drafters, facts.diffusion),
            diffusion=diffusion_model(config, facts.diffusion),
            attention=facts.attention,
            prompt_attention=prompt_methods(config.attention),
        ),
        time.monotonic,
        config.grammar_timeout_s,
        wake,
        config.queue_timeout_s,
        worker.plans_ahead,
    )
    return core, describe(config, worker, tuple(phases))


def describe(config: EngineConfig, worker: Worker, phases: tuple[tuple[str, float], ...]) -> EngineInfo:
    facts = worker.info
    limits = make_limits(config, facts.model_len, facts.num_pages, facts.page_size)
    shared = {field.name for field in fields(EngineInfo)}
    known = {field.name: getattr(facts, field.name) for field in fields(facts) if field.name in shared}
    known |= {field.name: getattr(limits, field.name) for field in fields(limits) if field.name in shared}
    known |= {"model": config.model, "max_logprobs": config.max_logprobs, "pid": os.getpid(), "phases": phases}
    asked = config.speculation
    known |= {"max_drafts": asked.max_drafts, "speculation": asked.mode}
    known |= {"synthetic_acceptance": asked.synthetic_acceptance, "name": config.name}
    known |= {"diffusion": diffusion_model(config, facts.diffusion)}
    known |= {"default_attention": default_attention(config.attention, facts.attention)}
    known |= {"attention_budget": config.attention.budget, "attention_correct_every": config.attention.correct_every}
    known |= {"prompt_attention": config.attention.for_prompts()}
    known |= {"default_prompt_attention": config.attention.default_for_prompts()}
    return EngineInfo(**known)
