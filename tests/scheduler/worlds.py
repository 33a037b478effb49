"""Random worlds: a scheduler, a fake worker that knows the right text, and a script of arrivals and aborts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from scheduler.fake_worker import FakeDrafter, FakeWorker, features_of, output_logprobs, run_alone
from scheduler.scheduler import Scheduler
from scheduler.speculation import MAX_TREE_NODES
from scheduler.types import (
    Delta,
    DiffusionModel,
    FinishReason,
    Limits,
    Outcome,
    Read,
    Request,
    Sampling,
    SpeculationMode,
    StepPlan,
    StepResult,
    StepStats,
    TokenLogprob,
)

VOCAB = 23
MAX_STEPS = 20_000


def make_limits(
    max_batched_tokens: int = 64,
    max_seqs: int = 8,
    max_model_len: int = 256,
    num_pages: int = 128,
    page_size: int = 4,
    **others: float | None,
) -> Limits:
    return Limits(max_batched_tokens, max_seqs, max_model_len, num_pages, page_size, **others)  # type: ignore[arg-type]


def make_request(request_id: str, prompt: tuple[int, ...] | int = 5, max_tokens: int = 4, **others: object) -> Request:
    tokens = tuple(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    return Request(request_id, tokens, max_tokens, **others)  # type: ignore[arg-type]


@dataclass
class Story:
    """What a client has seen of one request."""

    request: Request
    deltas: list[Delta] = field(default_factory=list)
    is_aborted: bool = False

    @property
    def is_alive(self) -> bool:
        return not self.is_aborted and not (self.deltas and self.deltas[-1].finish_reason is not None)

    @property
    def is_corrected(self) -> bool:
        """So many tokens are out that the rows of some must be computed again before the next one's."""
        attention, num_output = self.request.attention, len(self.request.output) + len(self.tokens)
        every = 0 if attention is None else attention.correct_every
        return every > 0 and num_output > 1 and (num_output - 1) % every == 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.tokens)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return tuple(entry for delta in self.deltas for entry in delta.logprobs)


class World:
    """Scheduler + fake worker + clients. `step` checks the rules seen from outside, `finish` the texts."""

    def __init__(
        self,
        limits: Limits,
        scheduler: Scheduler | None = None,
        seed: int = 0,
        drafter: FakeDrafter | None = None,
        diffusion: DiffusionModel | None = None,
    ) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits, root=bytes(32), diffusion=diffusion) if scheduler is None else scheduler
        self.worker = FakeWorker(limits.num_pages, limits.page_size, VOCAB, drafter, diffusion)
        self.rng = random.Random(seed)
        self.elapsed_of: Callable[[int], float] = lambda rows: 0.01 + 0.0001 * rows
        self.now = 0.0
        self.stories: dict[str, Story] = {}
        self.plans: list[StepPlan] = []
        self.stats: list[StepStats] = []
        self.is_flying = False
        self.plans_ahead: Callable[[], bool] = lambda: False
        self._ahead: tuple[StepPlan, tuple[Outcome, ...]] | None = None
        self._decoding: dict[int, Story] = {}

    def add(self, request: Request) -> None:
        fault = self.scheduler.add(request, self.now)
        assert fault is None, fault
        self.stories[request.id] = Story(request)

    def abort(self, request_id: str) -> None:
        self.stories[request_id].is_aborted = True
        pages = self.scheduler.stats().pages_used
        self.scheduler.abort(request_id)
        if self.is_flying or self._ahead is not None:
            assert self.scheduler.stats().pages_used == pages, "pages were freed under a step in flight"
        self.scheduler.check_invariants()

    def step(self, between: Callable[[], None] = lambda: None, spoil: str | None = None) -> StepPlan | None:
        """One step. `between` runs while it is in flight; `spoil` names a request whose outcome becomes an error."""
        flight = self._ahead or self._launch(self.scheduler.schedule(self.now))
        if flight is None:
            assert not self.scheduler.has_work
            return None
        plan, outcomes = flight
        self._check_decodes(plan)
        decoded = [out for out in outcomes if out.tokens and out.denoised is None]
        owners = {out.seq_id: self.stories[self.worker.request_of(out.seq_id).id] for out in decoded}
        self.is_flying = True
        between()
        self._ahead = self._launch(self.scheduler.schedule_ahead(self.now) if self.plans_ahead() else None)
        self.is_flying = False
        if spoil is not None:
            outcomes = tuple(self._spoiled(outcome, spoil) for outcome in outcomes)
        elapsed = self.elapsed_of(features_of(plan).tokens)
        self.now += elapsed
        draft_s = 1e-4 * sum(span.num_drafts > 0 for span in plan.spans) + 1e-3 * plan.draft_depth
        result = StepResult(plan.step, outcomes, elapsed + draft_s, draft_s)
        deltas, stats = self.scheduler.update(plan, result, self.now)
        self.scheduler.check_invariants()
        self._check_stats(plan, deltas, stats)
        for delta in deltas:
            self._receive(delta)
        self._decoding = {seq_id: story for seq_id, story in owners.items() if story.is_alive}
        self.plans.append(plan)
        self.stats.append(stats)
        return plan

    def _launch(self, plan: StepPlan | None) -> tuple[StepPlan, tuple[Outcome, ...]] | None:
        """A plan and what the worker makes of it, before anybody is told."""
        self.scheduler.check_invariants()
        if plan is None:
            return None
        assert plan.spans, "a step without spans"
        assert plan.num_tokens <= plan.budget <= self.limits.max_batched_tokens, "R1: budget exceeded"
        self._check_drafts(plan)
        return plan, self.worker.run(plan)

    def _check_decodes(self, plan: StepPlan) -> None:
        """R1: who decoded in the step before decodes in this one, unless it ended, lost its pages or is corrected."""
        due = {seq_id for seq_id, story in self._decoding.items() if story.is_alive and not story.is_corrected}
        placed = {span.seq_id for span in plan.spans}
        refused = due - placed - set(plan.released)
        assert not refused, f"R1: decodes {sorted(refused)} were refused"
        num_admitted = len(plan.admitted)
        assert not (num_admitted and due & set(plan.released)), "a step that preempted has admitted"

    def _check_drafts(self, plan: StepPlan) -> None:
        """No request gets more drafts than it allows; who switched speculation off is not even asked for any."""
        admitted = {admission.seq_id: admission.request for admission in plan.admitted}
        for span in plan.spans:
            request = admitted.get(span.seq_id) or self.worker.request_of(span.seq_id)
            if request.decoding is not None:
                assert not span.num_drafts, "drafts for a request that denoises"
                continue
            most_tokens = min(self.limits.max_model_len, len(request.prompt) + request.max_tokens)
            assert span.kv_len + span.num_drafts <= most_tokens, "drafts beyond the end of the text"
            asked = request.speculation
            limit = 0 if asked.mode is SpeculationMode.OFF else MAX_TREE_NODES - 1
            limit = limit if asked.max_tokens is None else min(limit, asked.max_tokens)
            num_drafts = len(span.tokens) - 1 if span.read is Read.VERIFY else 0
            assert max(num_drafts, span.num_drafts) <= limit, "more drafts than the request allows"
            assert asked.tree is not False or not span.parents, "a tree for a request that wants none"

    def _spoiled(self, outcome: Outcome, request_id: str) -> Outcome:
        is_it = self.worker.request_of(outcome.seq_id).id == request_id
        return Outcome(outcome.seq_id, error="spoiled") if is_it else outcome

    def _check_stats(self, plan: StepPlan, deltas: list[Delta], stats: StepStats) -> None:
        assert stats.decode_tokens + stats.prefill_tokens + stats.draft_tokens + stats.denoise_tokens == plan.num_tokens
        verified = [span for span in plan.spans if span.read is Read.VERIFY]
        assert stats.draft_tokens == sum(len(span.tokens) - 1 for span in verified)
        assert stats.accepted_tokens <= sum(tally.accepted for tally in stats.drafts) <= stats.draft_tokens
        assert stats.generated_tokens == sum(len(delta.tokens) for delta in deltas)
        assert stats.step == plan.step
        assert stats.pages_used + stats.pages_cached <= stats.pages_total
        assert stats.recomputed_tokens <= stats.prefill_tokens
        assert stats.corrected_tokens <= stats.prefill_tokens
        assert stats.prefix_hits <= stats.prefix_queries

    def _receive(self, delta: Delta) -> None:
        story = self.stories[delta.request_id]
        assert not story.is_aborted, "a delta after an abort"
        assert not story.deltas or story.deltas[-1].finish_reason is None, "a delta after the end"
        assert (delta.cached_tokens is not None) == (not story.deltas), "cached_tokens belongs to the first delta"
        assert (delta.times is not None) == (delta.finish_reason is not None), "times belong to the last delta"
        if delta.speculation is not None:
            assert delta.speculation.accepted <= len(delta.tokens), "drafts were accepted that gave no token"
            assert delta.speculation.drafted >= delta.speculation.accepted
        story.deltas.append(delta)

    def run(self) -> None:
        for _ in range(MAX_STEPS):
            if self.step() is None:
                return
        raise AssertionError("the world does not end (forward progress)")

    def run_until_decoding(self, request_id: str) -> None:
        while not self.stories[request_id].deltas:
            self.step()

    def finish(self) -> None:
        """Run to the end and compare every text with the request run alone (R4, R5, R8)."""
        self.run()
        for story in self.stories.values():
            self.check_story(story)
        stats = self.scheduler.stats()
        assert stats.pages_used == 0, "pages are left"
        assert stats.num_running == stats.num_waiting == 0

    def truth(self, request: Request) -> tuple[tuple[int, ...], FinishReason, tuple[TokenLogprob, ...]]:
        """New output tokens, finish reason and prompt logprobs of the request when it runs alone."""
        return run_alone(request, self.limits.max_model_len, VOCAB)

    def true_logprobs(self, request: Request, tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        """Of new output `tokens`, the first of the truth's."""
        return output_logprobs(request, tokens)

    def check_story(self, story: Story) -> None:
        tokens, reason, logprobs = self.truth(story.request)
        seen = tuple(entry for delta in story.deltas for entry in delta.prompt_logprobs)
        last = story.deltas[-1] if story.deltas else None
        if story.is_aborted or (last is not None and last.finish_reason is FinishReason.ERROR):
            assert story.tokens == tokens[: len(story.tokens)], "an aborted request saw a wrong token"
            assert seen == logprobs[: len(seen)]
            assert story.logprobs == self.true_logprobs(story.request, story.tokens)
            return
        assert last is not None, f"{story.request.id} was never answered"
        assert story.tokens == tokens, f"{story.request.id} is not what it is when run alone"
        assert last.finish_reason is reason
        is_stopped = reason is FinishReason.STOP and tokens[-1:] != () and tokens[-1] in story.request.stop_ids
        assert last.stop_id == (tokens[-1] if is_stopped else None)
        assert seen == logprobs
        assert story.logprobs == self.true_logprobs(story.request, tokens)


def random_limits(rng: random.Random) -> Limits:
    page_size = rng.choice((1, 2, 4, 8))
    max_model_len = rng.choice((16, 48, 96))
    fewest = -(-max_model_len // page_size)
    max_seqs = rng.randint(1, 9)
    return Limits(
        max_batched_tokens=rng.choice((max_seqs, max_seqs + 3, 24, 64)) if max_seqs <= 24 else 64,
        max_seqs=max_seqs,
        max_model_len=max_model_len,
        num_pages=fewest + rng.choice((0, 1, fewest // 2, 4 * fewest)),
        page_size=page_size,
        watermark_pages=rng.choice((0, 1, 3)),
        max_prefill_share=rng.choice((0.1, 0.5, 1.0)),
        tbt_slo_s=rng.choice((None, 0.0101, 0.02, 10.0)),
        enable_prefix_caching=rng.random() < 0.8,
    )


def random_request(rng: random.Random, number: int, limits: Limits, families: list[tuple[int, ...]]) -> Request:
    """Often a sibling of others: the same prompt start, few salts, few priorities."""
    family = rng.choice(families)
    most = limits.max_model_len - 1
    prompt = (family[: rng.randint(1, len(family))] + tuple(rng.choices(range(3), k=rng.randint(0, 6))))[:most]
    max_tokens = rng.choice((0, 1, 2, rng.randint(1, limits.max_model_len)))
    request = Request(
        id=f"r{number}",
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=Sampling(
            seed=rng.randrange(4),
            sample_index=rng.randrange(3),
            logprobs=0 if number % 3 == 0 else None,
            prompt_logprobs=rng.choice((None, None, None, 0)),
        ),
        stop_ids=tuple(rng.sample(range(VOCAB), k=rng.choice((0, 0, 1, 4)))),
        priority=rng.choice((0, 0, 0, -1, 5)),
        cache_salt=rng.choice(("", "", "tenant", "t")),
    )
    if rng.random() < 0.15 and max_tokens > 1:
        return _resubmitted(rng, request, limits)
    return request


def _resubmitted(rng: random.Random, request: Request, limits: Limits) -> Request:
    """The request as it is sent again after an engine crash, with a part of its output out."""
    tokens, _, _ = run_alone(request, limits.max_model_len, VOCAB)
    return replace(request, output=tokens[: rng.randrange(len(tokens))])


def play(world: World, seed: int, decorate: Callable[[Request], Request] = lambda request: request) -> None:
    """One random world: arrivals in bursts, aborts at any moment (in flight too), then everything runs to its end.

    decorate   has the last word on each request
    """
    rng = random.Random(seed)
    limits = world.limits
    families = [tuple(rng.choices(range(VOCAB), k=rng.randint(1, limits.max_model_len - 1))) for _ in range(3)]
    num_requests = rng.randint(1, 24)
    number = 0
    while number < num_requests:
        for _ in range(min(num_requests - number, rng.choice((0, 1, 1, 5)))):
            request = random_request(rng, number, limits, families)
            for sample in range(rng.choice((1, 1, 1, 4))):
                sampling = replace(request.sampling, sample_index=sample) if sample else request.sampling
                # Siblings of a resubmitted request have output of their own, so they arrive as new.
                output = () if sample else request.output
                sibling = replace(request, id=f"{request.id}.{sample}", sampling=sampling, output=output)
                world.add(decorate(sibling))
            number += 1
        if rng.random() < 0.15:
            _abort_one(world, rng)
        world.step(between=(lambda: _abort_one(world, rng)) if rng.random() < 0.15 else lambda: None)
    world.finish()


def _abort_one(world: World, rng: random.Random) -> None:
    if world.stories:
        request_id = rng.choice(sorted(world.stories))
        last = world.stories[request_id].deltas[-1:]
        if not last or last[0].finish_reason is None:
            world.abort(request_id)
        else:
            world.scheduler.abort(request_id)
