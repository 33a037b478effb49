"""Block-causal requests by name: lengths around a block, ends, preemption at every step, replays, pages, wrong answers.

The random worlds (test_diffusion_worlds.py) compare every text; these examples say which rule each part keeps.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.decoding.block_diffusion import BlockDiffusion
from scheduler.policies import make_diffusion
from scheduler.scheduler import Scheduler
from scheduler.types import (
    DecodingUsage,
    Denoised,
    FinishReason,
    Outcome,
    Read,
    Request,
    Sampling,
    Span,
    StepPlan,
    StepResult,
    Topology,
)
from tests.scheduler.diffusion_worlds import MASK, DiffusionWorld, dual_model
from tests.scheduler.worlds import VOCAB, make_limits

B = 4


def make_world(shift: int = 0, is_dual: bool = True, **limits: object) -> DiffusionWorld:
    return DiffusionWorld(make_limits(**limits), dual_model(B, shift, is_dual))  # type: ignore[arg-type]


def denoising(
    request_id: str = "d", prompt: int = 6, max_tokens: int = 9, policy: str = "threshold", **others: object
) -> Request:
    settings = {name: others.pop(name) for name in ("parts", "values", "steps", "snapshots") if name in others}
    how = make_diffusion(policy, Topology.BLOCK_CAUSAL, **settings)  # type: ignore[arg-type]
    others.setdefault("sampling", Sampling(seed=3, logprobs=0))
    tokens = tuple(1 + n % (VOCAB - 1) for n in range(prompt))
    return Request(request_id, tokens, max_tokens, decoding=how, **others)  # type: ignore[arg-type]


def text_of(request: Request, shift: int = 0) -> tuple[int, ...]:
    world = make_world(shift, is_dual=False)
    world.add(request)
    world.finish()
    return world.stories[request.id].tokens


def spans_of(world: DiffusionWorld) -> list[Span]:
    return [span for plan in world.plans for span in plan.spans]


def usage_of(world: DiffusionWorld, request_id: str = "d") -> DecodingUsage:
    total = DecodingUsage()
    for delta in world.stories[request_id].deltas:
        total += delta.decoding or DecodingUsage()
    return total


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", ["sequential", "threshold", "llada2_edit"])
@pytest.mark.parametrize("prompt", [1, B - 1, B, B + 1, 2 * B - 1, 2 * B])
def test_all_lengths_around_a_block_are_generated_and_a_longer_text_begins_with_the_shorter(
    prompt: int, policy: str, shift: int
) -> None:
    """The last block is denoised whole and cut, so max_tokens is no input of the model."""
    whole = text_of(denoising(prompt=prompt, max_tokens=3 * B, policy=policy), shift)
    assert len(whole) == 3 * B
    assert MASK not in whole
    for max_tokens in (1, B - 1, B, B + 1):
        assert text_of(denoising(prompt=prompt, max_tokens=max_tokens, policy=policy), shift) == whole[:max_tokens]


@pytest.mark.parametrize("policy", ["sequential", "threshold", "llada2_edit"])
@pytest.mark.parametrize("place", range(2 * B))
def test_nothing_follows_a_stop_token_wherever_in_a_block_it_stands(place: int, policy: str) -> None:
    whole = text_of(denoising(prompt=2 * B, max_tokens=3 * B, policy=policy))
    stop = whole[place]
    world = make_world(is_dual=False)
    world.add(denoising(prompt=2 * B, max_tokens=3 * B, policy=policy, stop_ids=(stop,)))
    world.finish()
    story = world.stories["d"]
    assert story.tokens == whole[: whole.index(stop) + 1]
    assert (story.deltas[-1].finish_reason, story.deltas[-1].stop_id) == (FinishReason.STOP, stop)


def test_the_context_ends_with_its_last_whole_block() -> None:
    world = make_world(max_model_len=2 * B + 3)
    world.add(denoising(prompt=3, max_tokens=99))
    world.finish()
    assert len(world.stories["d"].tokens) == 2 * B - 3


def test_a_prompt_is_cut_between_blocks_and_its_last_chunk_denoises_already() -> None:
    world = make_world(max_batched_tokens=2 * B + 1)
    world.add(denoising(prompt=4 * B + 2, max_tokens=3))
    world.finish()
    spans = spans_of(world)
    assert [(span.start, span.kv_len, span.read) for span in spans[:3]] == [
        (0, 2 * B, Read.NOTHING),
        (2 * B, 4 * B, Read.NOTHING),
        (4 * B, 5 * B, Read.DENOISE),
    ]
    other = make_world(max_batched_tokens=3 * B)
    other.add(denoising(prompt=4 * B + 2, max_tokens=3))
    other.finish()
    fused = spans_of(other)[1]
    assert (fused.start, fused.kv_len, fused.read) == (3 * B, 5 * B, Read.DENOISE)
    assert fused.judged == (B + 2, B + 3)
    assert other.stories["d"].tokens == world.stories["d"].tokens
    assert other.stats[1].prefill_tokens == other.stats[1].denoise_tokens == B


def test_a_finished_block_is_committed_with_the_next_ones_first_step_unless_rows_are_short() -> None:
    wide, narrow = make_world(), make_world(max_batched_tokens=2 * B, max_seqs=2)
    for world in (wide, narrow):
        world.add(denoising(prompt=B, max_tokens=4 * B))
        if world is narrow:
            world.add(Request("a", (1,), 60))
        world.finish()
    assert wide.stories["d"].tokens == narrow.stories["d"].tokens
    commits = [
        span for span in spans_of(narrow) if span.mask_block == B and span.read is Read.NOTHING and span.start >= B
    ]
    assert [(span.start, span.kv_len) for span in commits] == [(n * B, n * B + B) for n in (1, 2, 3)]
    together, apart = usage_of(wide), usage_of(narrow)
    assert (together.commit_passes, apart.commit_passes) == (0, 3)
    assert together.forwards == apart.forwards
    assert together.rows == apart.rows
    # The last block is never committed.
    assert together.rows == B * (together.forwards + 3)


def test_with_shift_1_the_pass_that_commits_a_block_gives_the_next_ones_first_token() -> None:
    world = make_world(shift=1)
    world.add(denoising(prompt=2 * B, max_tokens=2 * B, policy="sequential"))
    world.finish()
    spans = spans_of(world)
    carried = [span for span in spans if span.kv_len == (span.denoise.lo if span.denoise else -1)]
    assert [(s.start, s.kv_len, s.judged) for s in carried] == [(0, 2 * B, (2 * B - 1,)), (2 * B, 3 * B, (B - 1,))]
    assert all(
        s.denoise and s.denoise.state == (MASK,) * B and s.denoise.window == (s.kv_len, s.kv_len + 1) for s in carried
    )
    first = spans[1]
    assert first.denoise is not None
    assert (first.denoise.step, first.judged) == (1, (0, 1, 2))
    assert usage_of(world).forwards == len(spans)


def test_a_cached_sub_block_computes_its_own_rows_after_a_first_step_of_the_whole_block() -> None:
    world = make_world()
    world.add(
        denoising(prompt=B, max_tokens=B, policy="fast_dllm_v2_cache", values={"sub_block": 2, "selector.threshold": 2})
    )
    world.finish()
    spans = [span for span in spans_of(world) if span.read is Read.DENOISE]
    whole = [span for span in spans if len(span.tokens) >= B]
    part = [span for span in spans if len(span.tokens) == 2]
    assert len(whole) == 2
    assert part
    for span in part:
        assert span.denoise is not None
        assert (span.start, span.start + 2) == span.denoise.window
        assert (span.kv_len, len(span.denoise.state)) == (2 * B, B)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "policy", ["auto", "threshold", "llada2_edit", "fast_dllm_v2_cache", "adablock", "sdar_static"]
)
def test_a_preemption_before_any_step_changes_no_text(policy: str, shift: int) -> None:
    request = denoising(prompt=2 * B + 1, max_tokens=3 * B, policy=policy)
    right = text_of(request, shift)
    for number in range(1, 40):
        world = make_world(shift, is_dual=False)
        world.add(request)
        for _ in range(number):
            world.step()
        queues = world.scheduler._queues
        if not queues.running:
            return
        queues.preempt_last(world.now)
        world._decoding.clear()
        world.scheduler.check_invariants()
        world.finish()
        assert world.stories["d"].tokens == right
        assert world.stories["d"].deltas[-1].times is not None
    raise AssertionError("the request did not end")


@pytest.mark.parametrize("policy", ["auto", "threshold", "llada2_edit", "fast_dllm_v2_cache", "sdar_dynamic"])
def test_a_request_that_is_sent_again_goes_on_after_what_was_out(policy: str) -> None:
    request = denoising(prompt=B + 1, max_tokens=3 * B, policy=policy)
    world = make_world(is_dual=False)
    world.add(request)
    world.finish()
    out: list[int] = []
    for delta in world.stories["d"].deltas[:-1]:
        out.extend(delta.tokens)
        again = replace(request, output=tuple(out))
        assert text_of(again) == world.stories["d"].tokens[len(out) :]


def test_a_second_request_finds_the_prompts_whole_blocks_and_nothing_of_another_mask() -> None:
    world = make_world(page_size=B)
    world.add(denoising("a", prompt=3 * B + 1, max_tokens=B))
    world.run()
    for name, request, hits in (
        ("b", denoising("b", prompt=3 * B + 1, max_tokens=B), 3 * B),
        ("c", denoising("c", prompt=3 * B, max_tokens=B), 3 * B),
        ("causal", replace(denoising("causal", prompt=3 * B + 1), decoding=None), 0),
        ("salted", denoising("salted", prompt=3 * B + 1, cache_salt="x"), 0),
    ):
        world.add(request)
        world.run()
        assert world.stories[name].deltas[0].cached_tokens == hits, name
    world.finish()
    assert world.stories["b"].tokens == world.stories["a"].tokens


def test_with_shift_1_the_last_row_before_a_block_is_computed_even_if_it_is_cached() -> None:
    world = make_world(shift=1, page_size=B)
    for name, prompt, hits in (("a", 3 * B, 0), ("b", 3 * B, 2 * B), ("c", 3 * B + 1, 3 * B)):
        world.add(denoising(name, prompt=prompt, max_tokens=B))
        world.run()
        assert world.stories[name].deltas[0].cached_tokens == hits, name
    world.finish()


def test_a_block_that_was_cut_is_not_in_the_prefix_cache() -> None:
    world = make_world(page_size=B)
    request = denoising("a", prompt=B, max_tokens=2 * B + 1, policy="sequential")
    world.add(request)
    world.run()
    text = request.prompt + world.stories["a"].tokens
    again = replace(denoising("b"), prompt=(*text, 5, 5, 5, 5))
    world.add(again)
    world.run()
    # Prompt and two whole blocks of output were known; the second was never committed, the third was cut.
    assert world.stories["b"].deltas[0].cached_tokens == 3 * B


def test_snapshots_show_the_block_with_its_masks_and_deltas_only_what_is_final() -> None:
    world = make_world()
    world.add(denoising(prompt=B + 1, max_tokens=B, policy="low_confidence", snapshots=True))
    world.finish()
    deltas = world.stories["d"].deltas
    snapshots = [delta.snapshot for delta in deltas if delta.snapshot is not None]
    assert len(snapshots) == usage_of(world).forwards == len(deltas)
    assert snapshots[0].start == B
    assert [snapshot.tokens.count(MASK) for snapshot in snapshots[:3]] == [2, 1, 0]


WRONG = {
    "nothing": Outcome(1),
    "no progress": Outcome(1, denoised=Denoised()),
    "too few tokens": Outcome(1, (3,), denoised=Denoised((6, 7))),
    "not ascending": Outcome(1, (3, 3), denoised=Denoised((7, 6))),
    "prompt": Outcome(1, (3, 3), denoised=Denoised((5, 6))),
    "outside": Outcome(1, (3, 3), denoised=Denoised((6, 8))),
    "mask id": Outcome(1, (MASK,), denoised=Denoised((6,))),
    "end in the prompt": Outcome(1, (3,), denoised=Denoised((6,), end=5)),
    "window": Outcome(1, (3,), denoised=Denoised((6,), window_end=9)),
}


@pytest.mark.parametrize("outcome", WRONG.values(), ids=WRONG)
def test_an_answer_that_does_not_fit_fails_its_request_and_changes_nothing_else(outcome: Outcome) -> None:
    scheduler = Scheduler(make_limits(), diffusion=dual_model(B))
    assert scheduler.add(denoising(prompt=6, sampling=Sampling()), 0.0) is None
    plan = scheduler.schedule(0.0)
    assert isinstance(plan, StepPlan)
    (seq,) = scheduler._queues.running
    machine = seq.decoding
    assert isinstance(machine, BlockDiffusion)
    before = (list(seq.tokens), machine._block.copy())
    deltas, _ = scheduler.update(plan, _result(plan, outcome), 0.0)
    assert (list(seq.tokens), machine._block) == before
    assert deltas[0].finish_reason is FinishReason.ERROR
    assert deltas[0].fault is not None
    assert deltas[0].fault.status == 500
    scheduler.check_invariants()


def _result(plan: StepPlan, outcome: Outcome) -> StepResult:
    return StepResult(plan.step, (replace(outcome, seq_id=plan.spans[0].seq_id),), 0.01)
