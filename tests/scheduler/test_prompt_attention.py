"""Block-sparse prompts in random worlds: chunks end between regions, and no page is read under other settings, behind
other tokens of its region, or by a dense prompt. Broken schedulers must be caught."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from scheduler import chunks, kv_memory, prompt_attention
from scheduler.fake_worker import FakeDrafter, FakeWorker, Known, Truth, next_token, token_logprob
from scheduler.hashing import EMPTY, mix
from scheduler.kv_memory import KVMemory
from scheduler.prefix import PrefixIndex
from scheduler.prompt_attention import chosen_by
from scheduler.scheduler import Scheduler
from scheduler.types import (
    Attention,
    AttentionMethod,
    AttentionOffer,
    Drafts,
    FinishReason,
    Limits,
    Outcome,
    PromptAttention,
    PromptMethod,
    Request,
    Sampling,
    Span,
    Speculation,
    SpeculationMode,
    SpeculationSettings,
    TokenLogprob,
)
from tests.scheduler.draft_worlds import RandomDrafter, random_speculation
from tests.scheduler.worlds import VOCAB, World, make_limits, make_request, play, random_limits

X, PBS = PromptMethod.XATTENTION, PromptMethod.PBS


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions of 8 and 32 rows, so that small worlds have several."""
    monkeypatch.setattr(prompt_attention, "TILE", 8)


def mark(request: Request, index: int, kv: int) -> int:
    """The KV of a row: behind `dense` it hangs on the settings and on all tokens of its region."""
    chosen = chosen_by(request.prompt_attention, len(request.prompt))
    if chosen is None or not chosen.dense <= index < len(request.prompt):
        return kv
    region = chosen.method.region
    for value in (*chosen.name, *request.prompt[index // region * region : (index // region + 1) * region]):
        kv = mix(kv, value)
    return kv


class RegionWorker(FakeWorker):
    """Checks, too, that all KV that a prompt goes on from is its own: a row reads more than the last of it."""

    def _write(self, known: Known, index: int, kv: int) -> None:
        super()._write(known, index, mark(known.request, index, kv))

    def _run_span(self, span: Span) -> Outcome:
        request = self._known[span.seq_id].request
        chosen = chosen_by(request.prompt_attention, len(request.prompt))
        if chosen is not None:
            for cut in (span.start, span.kv_len):
                is_whole = cut <= chosen.dense or cut >= len(request.prompt) or cut % chosen.method.region == 0
                assert is_whole, f"a chunk is cut at {cut}"
        if span.start < len(request.prompt):
            kv = EMPTY
            for index, token in enumerate(request.prompt[: span.start]):
                kv = mark(request, index, mix(kv, token))
                assert self._read(self._known[span.seq_id], index) == kv, f"KV {index} is of another prompt"
        return super()._run_span(span)


class RegionWorld(World):
    def __init__(self, limits: Limits, drafter: FakeDrafter | None = None) -> None:
        speculation = None if drafter is None else SpeculationSettings("marginal", 8)
        methods = tuple(PromptMethod)
        scheduler = Scheduler(limits, root=bytes(32), speculation=speculation, prompt_attention=methods)
        super().__init__(limits, scheduler)
        self.worker = RegionWorker(limits.num_pages, limits.page_size, VOCAB, drafter)

    def truth(self, request: Request) -> tuple[tuple[int, ...], FinishReason, tuple[TokenLogprob, ...]]:
        known, new = [*request.prompt, *request.output], list[int]()
        while len(request.output) + len(new) < request.max_tokens:
            new.append(next_token(request, context(request, known), VOCAB))
            known.append(new[-1])
            if new[-1] in request.stop_ids:
                return tuple(new), FinishReason.STOP, ()
            if len(known) >= self.limits.max_model_len:
                break
        return tuple(new), FinishReason.LENGTH, ()

    def true_logprobs(self, request: Request, tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        if request.sampling.logprobs is None:
            return ()
        known = [*request.prompt, *request.output, *tokens]
        first = len(known) - len(tokens)
        return tuple(token_logprob(context(request, known[:i]), known[i]) for i in range(first, len(known)))


def context(request: Request, tokens: list[int]) -> int:
    kv = EMPTY
    for index, token in enumerate(tokens):
        kv = mark(request, index, mix(kv, token))
    return kv


def wide_limits(seed: int) -> Limits:
    rng = random.Random(seed)
    limits = replace(random_limits(rng), max_model_len=96, enable_prefix_caching=True)
    fewest = -(-96 // limits.page_size)
    return replace(
        limits,
        max_batched_tokens=limits.max_seqs - 1 + rng.choice((32, 40, 64)),
        num_pages=fewest + rng.choice((1, fewest // 2, 4 * fewest)),
    )


def play_one(seed: int) -> World:
    rng = random.Random(-seed)
    drafter = RandomDrafter(rng, branches=seed % 4 == 1) if seed % 2 else None

    def decorate(request: Request) -> Request:
        method = rng.choice((X, X, PBS, None))
        asked = None if method is None else PromptAttention(method, rng.choice((0.5, 0.9)), 32)
        sampling, prompt = replace(request.sampling, prompt_logprobs=None), list(request.prompt)
        # Another token, in the middle of a region, among those that others have in common.
        if len(prompt) > 39 and (token := rng.choice((None, 1, 2))) is not None:
            prompt[37] = token
        request = replace(request, prompt=tuple(prompt), prompt_attention=asked, sampling=sampling)
        return random_speculation(rng, request) if drafter is not None else request

    world = RegionWorld(wide_limits(seed), drafter)
    play(world, seed, decorate)
    return world


def test_every_prompt_of_a_random_world_reads_as_if_it_had_run_alone() -> None:
    num_preempted = num_hits = num_recomputed = 0
    for seed in range(120):
        try:
            world = play_one(seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        num_hits += sum(stats.prefix_hits for stats in world.stats)
        num_recomputed += sum(stats.recomputed_tokens for stats in world.stats)
    assert num_preempted > 20
    assert num_hits > 100
    assert num_recomputed > 100


def _by_pages(index: PrefixIndex, names: list[bytes], tokens: list[int], settings: bytes, region: int) -> None:
    size = index.page_size
    for page in range(len(names), len(tokens) // region * region // size):
        names.append(index.name(names[-1] + settings, tokens[page * size : (page + 1) * size]))


def _without_settings(index: PrefixIndex, names: list[bytes], tokens: list[int], settings: bytes, region: int) -> None:
    _original(index, names, tokens, b"", region)


_original = PrefixIndex.extend_by_regions
BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "pages are named by their own tokens": lambda patch: patch.setattr(PrefixIndex, "extend_by_regions", _by_pages),
    "settings have no part in names": lambda patch: patch.setattr(PrefixIndex, "extend_by_regions", _without_settings),
    "prompts look like dense ones": lambda patch: patch.setattr(kv_memory, "chosen_by", lambda *asked: None),
    "chunks end anywhere": lambda patch: patch.setattr(chunks, "chosen_by", lambda *asked: None),
    "hits end within a region": lambda patch: patch.setattr(
        PromptAttention, "num_shareable", lambda asked, num_tokens, num_prompt: min(num_tokens, num_prompt)
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_schedulers_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[name](monkeypatch)
    for seed in range(120):
        try:
            play_one(seed)
        except (AssertionError, IndexError, KeyError):
            return
    raise AssertionError(f"nobody noticed that {name}")


def test_drafts_leave_a_region_its_rows() -> None:
    """Three sequences are to verify 8 drafts each, in a step of 35 rows that a region needs 32 of."""

    def right(known: Known, most: int, truth: Truth) -> Drafts:
        return Drafts(truth(most), tuple(0.9 ** (j + 1) for j in range(most)), "right")

    world = RegionWorld(make_limits(max_batched_tokens=35, max_seqs=4, max_model_len=250, num_pages=400), right)
    forced = Speculation(SpeculationMode.ON)
    for name in "abc":
        world.add(make_request(name, (ord(name) % VOCAB,), 200, speculation=forced))
    world.run_until_decoding("c")
    while world.stats[-1].draft_tokens <= 20:
        world.step()
    world.add(make_request("prompt", 96, 1, prompt_attention=PromptAttention(PBS, 0.9, 32)))
    for _ in range(4):
        world.step()
    assert world.stories["prompt"].tokens
    assert min(len(world.stories[name].tokens) for name in "abc") < 190, "they were there all the time"
    world.finish()


def test_hits_that_lost_pages_of_a_region_begin_before_it() -> None:
    world = RegionWorld(make_limits(max_batched_tokens=64, page_size=4))
    asked = PromptAttention(X, 0.9, 32)
    world.add(make_request("a", 60, 2, prompt_attention=asked))
    world.run()
    memory: KVMemory = world.scheduler._memory
    names: list[bytes] = []
    memory.index.extend_names(names, list(range(1, 33)), "")
    memory.index.extend_by_regions(names, list(range(1, 61)), asked.name, 8)
    assert len(names) == 14
    pages = memory.index.lookup(names)
    assert len(pages) == 14
    memory.index.evict(pages[11])
    world.add(make_request("b", 60, 2, prompt_attention=asked))
    plan = world.scheduler.schedule(world.now)
    assert plan is not None
    assert plan.spans[0].start == 40


@pytest.mark.parametrize(
    ("changes", "methods", "param", "message"),
    [
        ({}, (PBS,), "attention.prefill", "this server has dense and pbs"),
        ({}, (), "attention.prefill", "this server reads prompts densely"),
        ({"prompt_attention": PromptAttention(X, 0.0, 32)}, (X,), "attention.prefill_threshold", "above 0"),
        ({"prompt_attention": PromptAttention(PBS, 0.9, 40)}, (PBS,), "attention.prefill", "a multiple of 32"),
        ({"sampling": Sampling(prompt_logprobs=0)}, (X,), "prompt_logprobs", "would not be the model's"),
        (
            {"attention": Attention(AttentionMethod.QUEST, 64, lossless=True)},
            (X,),
            "attention.lossless",
            "changes the text",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, object], methods: tuple[PromptMethod, ...], param: str, message: str
) -> None:
    request = make_request("a", 5, 4, **{"prompt_attention": PromptAttention(X, 0.9, 32), **changes})
    offers = (AttentionOffer(AttentionMethod.QUEST, 64),)
    fault = Scheduler(make_limits(), attention=offers, prompt_attention=methods).add(request, 0.0)
    assert fault is not None
    assert (fault.status, fault.param) == (400, param)
    assert message in fault.message


def test_a_budget_or_a_page_that_no_region_fits_is_refused() -> None:
    Scheduler(make_limits(max_batched_tokens=39, max_seqs=8), prompt_attention=(PBS,))
    with pytest.raises(ValueError, match="raise it to 39"):
        Scheduler(make_limits(max_batched_tokens=38, max_seqs=8), prompt_attention=(PBS,))
    with pytest.raises(ValueError, match="must divide 8"):
        Scheduler(make_limits(page_size=3), prompt_attention=(X,))
