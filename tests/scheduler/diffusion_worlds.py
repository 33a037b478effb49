"""Random worlds of a dual-mode model: autoregressive, drafting and denoising requests of every policy, in one pool."""

from __future__ import annotations

import random
from dataclasses import replace

from scheduler.policies import POLICIES, make_diffusion
from scheduler.scheduler import Scheduler
from scheduler.types import (
    Diffusion,
    DiffusionModel,
    FinishReason,
    Limits,
    Read,
    Request,
    SpeculationSettings,
    StepPlan,
    TokenLogprob,
    Topology,
)
from tests.scheduler.draft_worlds import RandomDrafter, flat_cost, random_settings, random_speculation
from tests.scheduler.lone_diffusion import Alone, denoise_alone
from tests.scheduler.worlds import VOCAB, World, play, random_limits

MASK = VOCAB


def dual_model(block_size: int = 4, shift: int = 0, is_dual: bool = True) -> DiffusionModel:
    return DiffusionModel(MASK, block_size, shift=shift, is_dual=is_dual, learnt_block=block_size)


class DiffusionWorld(World):
    """A world whose requests may denoise; knows their texts, too."""

    def __init__(
        self,
        limits: Limits,
        model: DiffusionModel,
        seed: int = 0,
        drafter: RandomDrafter | None = None,
        speculation: SpeculationSettings | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        if scheduler is None:
            cost = None if speculation is None else flat_cost()
            scheduler = Scheduler(limits, cost, bytes(32), speculation, model)
        super().__init__(limits, scheduler, seed, drafter, model)
        self.model = model

    def truth(self, request: Request) -> tuple[tuple[int, ...], FinishReason, tuple[TokenLogprob, ...]]:
        if request.decoding is None:
            return super().truth(request)
        alone = self._alone(request)
        return tuple(alone.tokens), alone.reason, ()

    def true_logprobs(self, request: Request, tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        if request.decoding is None:
            return super().true_logprobs(request, tokens)
        return tuple(self._alone(request).logprobs[: len(tokens)])

    def _alone(self, request: Request) -> Alone:
        """`auto` is led by all of its past, so one that is sent again gives the rest of what it would have given."""
        max_len, num_out = self.limits.max_model_len, len(request.output)
        if request.decoding is None or request.decoding.selector.name != "auto" or not num_out:
            return denoise_alone(request, max_len, self.model, VOCAB)
        whole = denoise_alone(replace(request, output=()), max_len, self.model, VOCAB)
        return replace(whole, tokens=whole.tokens[num_out:], logprobs=whole.logprobs[num_out:])


def num_denoise_spans(plan: StepPlan) -> int:
    return sum(span.read is Read.DENOISE for span in plan.spans)


def random_diffusion(rng: random.Random, model: DiffusionModel) -> Diffusion:
    """Any policy that the model can have, some with other parts and numbers."""
    names = [name for name, policy in POLICIES.items() if policy.topology in (None, Topology.BLOCK_CAUSAL)]
    if model.shift:
        names = [name for name in names if POLICIES[name].selector not in ("wino", "learn2pd")]
    if model.is_dual:
        names = [name for name in names if POLICIES[name].selector != "edit"]
    name = rng.choice(names)
    policy = POLICIES[name]
    parts: dict[str, str] = {}
    values: dict[str, float] = {}
    if not policy.cache and rng.random() < 0.4:
        parts["planner"] = rng.choice(("sub_blocks", "dsb", "masks", "adablock"))
    if parts.get("planner") == "sub_blocks" and policy.selector not in ("edit", "wino") and rng.random() < 0.5:
        parts["cache"] = "sub_block"
    planner = parts.get("planner", policy.planner)
    if planner == "sub_blocks":
        values["sub_block"] = rng.choice((1, 2, 3))
    if planner == "dsb":
        values |= {"first": rng.randint(1, 3), "most": rng.choice((0, 1, 3))}
    if planner == "masks":
        values["planner.width"] = rng.randint(1, 3)
    if policy.selector == "edit":
        values["max_post_edits"] = rng.choice((0, 1, 3))
    return make_diffusion(
        name,
        Topology.BLOCK_CAUSAL,
        parts,
        values,
        steps=rng.choice((None, None, 1, 2, 3)),
        snapshots=rng.random() < 0.2,
    )


def random_model(rng: random.Random) -> DiffusionModel:
    return dual_model(rng.choice((1, 2, 4, 8)), rng.choice((0, 0, 1)), is_dual=rng.random() < 0.75)


def diffusion_world(seed: int) -> DiffusionWorld:
    rng = random.Random(f"diffusion {seed}")
    limits, model = random_limits(random.Random(seed)), random_model(rng)
    size = model.block_size
    pages = max(size, limits.page_size // size * size)
    fewest = -(-limits.max_model_len // pages) + 1
    limits = replace(
        limits,
        page_size=pages,
        max_batched_tokens=max(limits.max_batched_tokens, 2 * size),
        num_pages=fewest + rng.choice((0, 1, fewest // 2, 3 * fewest)),
    )
    if rng.random() < 0.5:
        return DiffusionWorld(limits, model)
    return DiffusionWorld(limits, model, 0, RandomDrafter(rng, branches=rng.random() < 0.7), random_settings(rng))


def play_diffusion(world: DiffusionWorld, seed: int) -> None:
    rng = random.Random(f"policies {seed}")

    def decorate(request: Request) -> Request:
        request = random_speculation(rng, request)
        if world.model.is_dual and rng.random() < 0.4:
            return request
        sampling = replace(request.sampling, prompt_logprobs=None)
        asked = replace(
            request,
            decoding=random_diffusion(rng, world.model),
            sampling=sampling,
            max_tokens=max(1, request.max_tokens),
            output=(),
            prompt=request.prompt[: max(1, world.limits.max_model_len - 2 * world.model.block_size - 1)],
        )
        if rng.random() < 0.2:
            whole, _, _ = world.truth(asked)
            asked = replace(asked, output=whole[: rng.randrange(max(1, len(whole)))])
        return asked

    play(world, seed, decorate)
