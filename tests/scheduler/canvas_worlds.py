"""Random worlds of a model that fills canvases and decodes token by token: both kinds of requests in one pool."""

from __future__ import annotations

import random
from dataclasses import replace

from scheduler.fake_worker import FakeWorker
from scheduler.policies import make_diffusion
from scheduler.scheduler import Scheduler
from scheduler.types import (
    Diffusion,
    DiffusionModel,
    FinishReason,
    Limits,
    Outcome,
    Request,
    Span,
    TokenLogprob,
    Topology,
)
from tests.scheduler.canvas_worker import MASK, Keys, Run, read
from tests.scheduler.worlds import VOCAB, World, play, random_limits

CACHES = ("none", "prefix", "dual", "vicinity", "dsb", "dkv_decode", "dkv_greedy", "elastic")


class CanvasWorker(FakeWorker):
    """Canvases' keys lie in the pages, too: a wrong page, or one that somebody shares, changes a text or raises."""

    def __init__(self, limits: Limits, model: DiffusionModel) -> None:
        super().__init__(limits.num_pages, limits.page_size, VOCAB, diffusion=model)
        self._model = model
        self._second: list[list[int | None]] = [[None] * limits.page_size for _ in range(limits.num_pages)]
        self._owner: list[int] = [0] * limits.num_pages

    def _run_span(self, span: Span) -> Outcome:
        known = self._known[span.seq_id]
        if known.request.decoding is None:
            return super()._run_span(span)
        assert span.kv_len <= len(known.pages) * self.page_size, "a canvas without pages"
        keys = Keys()
        places = [(known.pages[i // self.page_size], i % self.page_size) for i in range(span.kv_len)]
        mine = [self._owner[page] == span.seq_id for page, _ in places]
        keys.first = [self._kv[p][o] if own else None for (p, o), own in zip(places, mine, strict=True)]
        keys.second = [self._second[p][o] if own else None for (p, o), own in zip(places, mine, strict=True)]
        context = keys.run(span)
        for (page, offset), first, second in zip(places, keys.first, keys.second, strict=True):
            self._kv[page][offset], self._second[page][offset] = first, second
            self._owner[page] = span.seq_id
        return read(span, known.request, context, self._model.shift)


class CanvasWorld(World):
    def __init__(self, limits: Limits, model: DiffusionModel) -> None:
        super().__init__(limits, Scheduler(limits, None, bytes(32), None, model), 0, None, model)
        self.worker = CanvasWorker(limits, model)
        self.model = model

    def truth(self, request: Request) -> tuple[tuple[int, ...], FinishReason, tuple[TokenLogprob, ...]]:
        if request.decoding is None:
            return super().truth(request)
        run = Run(request, self.model, self.limits.max_model_len).finish()
        assert run.seq.finish_reason is not None
        return run.tokens, run.seq.finish_reason, ()

    def true_logprobs(self, request: Request, tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        if request.decoding is None:
            return super().true_logprobs(request, tokens)
        run = Run(request, self.model, self.limits.max_model_len).finish()
        return tuple(run.logprobs[: len(tokens)])


def random_canvas(rng: random.Random) -> Diffusion:
    cache = rng.choice(CACHES)
    selector = "random" if cache == "dkv_greedy" else rng.choice(("low_confidence", "random", "threshold", "entropy"))
    planner = rng.choice(("fixed", "fixed", "dsb", "masks", "sub_blocks"))
    values: dict[str, float] = {}
    if cache == "vicinity":
        values |= {"margin": rng.randint(0, 3), "warm_up": rng.randint(0, 2)}
    if cache == "dsb":
        values["cache.prefix"] = rng.randint(0, 3)
    if cache.startswith("dkv"):
        values["refresh"] = rng.randint(1, 5)
    if cache == "elastic":
        values["cache.width"] = rng.randint(1, 5)
    if planner == "masks":
        values["planner.width"] = rng.randint(1, 5)
    parts = {"selector": selector, "planner": planner, "cache": cache}
    return make_diffusion(
        "low_confidence", Topology.BIDIRECTIONAL, parts, values,
        steps=rng.choice((None, None, 1, 3)), block_size=rng.choice((None, 2, 5)), snapshots=rng.random() < 0.2,
    )  # fmt: skip


def canvas_world(seed: int) -> CanvasWorld:
    rng = random.Random(f"canvas {seed}")
    limits = random_limits(rng)
    limits = replace(limits, max_batched_tokens=max(limits.max_batched_tokens, 24))
    model = DiffusionModel(MASK, rng.choice((2, 4)), Topology.BIDIRECTIONAL, rng.choice((0, 1)), is_dual=True)
    return CanvasWorld(limits, model)


def play_canvases(world: CanvasWorld, seed: int) -> None:
    rng = random.Random(f"canvases {seed}")
    room = min(world.limits.max_batched_tokens, world.limits.max_model_len)

    def decorate(request: Request) -> Request:
        if rng.random() < 0.4:
            return request
        prompt = request.prompt[: rng.randint(1, 8)]
        asked = replace(
            request,
            decoding=random_canvas(rng),
            sampling=replace(request.sampling, prompt_logprobs=None),
            prompt=prompt,
            output=(),
            max_tokens=rng.randint(1, min(8, room - len(prompt) - 5)),
        )
        if rng.random() < 0.3:
            whole, _, _ = world.truth(asked)
            asked = replace(asked, output=whole[: rng.randrange(max(1, len(whole)))])
        return asked

    play(world, seed, decorate)
