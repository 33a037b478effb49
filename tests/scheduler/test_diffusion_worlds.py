"""Random worlds in which requests denoise, decode and draft side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler.decoding.base import News
from scheduler.decoding.block import Block
from scheduler.decoding.block_diffusion import BlockDiffusion
from scheduler.prefix import PrefixIndex
from scheduler.types import Outcome, Read, Span, TokenLogprob
from tests.scheduler.diffusion_worlds import diffusion_world, num_denoise_spans, play_diffusion

NUM_WORLDS = 240


@pytest.mark.parametrize("part", range(6))
def test_every_request_of_a_random_world_reads_as_if_it_had_run_alone(part: int) -> None:
    num_preempted = num_hits = num_fused = num_denoise = num_drafts = 0
    for seed in range(part, NUM_WORLDS, 6):
        world = diffusion_world(seed)
        try:
            play_diffusion(world, seed)
        except AssertionError as error:
            raise AssertionError(f"world {seed}: {error}") from error
        num_preempted += sum(stats.num_preempted for stats in world.stats)
        num_hits += sum(stats.prefix_hits for stats in world.stats)
        num_drafts += sum(stats.draft_tokens for stats in world.stats)
        num_denoise += sum(map(num_denoise_spans, world.plans))
        spans = [span for plan in world.plans for span in plan.spans]
        num_fused += sum(span.denoise is not None and span.start < span.denoise.lo < span.kv_len for span in spans)
    # Worlds in which nothing happens would prove nothing.
    assert num_preempted > 10
    assert num_hits > 20
    assert num_drafts > 20
    assert num_denoise > 500
    assert num_fused > 50


def _find_a_failing_world(patience: int = 60) -> str | None:
    for seed in range(patience):
        try:
            play_diffusion(diffusion_world(seed), seed)
        except (AssertionError, RuntimeError, KeyError, IndexError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return None


_original_absorb = BlockDiffusion.absorb
_original_restart = BlockDiffusion.restart
_original_next_span = BlockDiffusion.next_span
_original_apply = Block.apply
_original_root = PrefixIndex.root_name


def _skip_the_commit_pass(machine: BlockDiffusion, span: Span, outcome: Outcome) -> News:
    news = _original_absorb(machine, span, outcome)
    machine._seq.num_committed = machine._block.lo
    return news


def _commit_what_was_cut(machine: BlockDiffusion, span: Span, outcome: Outcome) -> News:
    news = _original_absorb(machine, span, outcome)
    machine._seq.num_committed = max(machine._seq.num_committed, len(machine._seq.tokens))
    return news


def _start_the_block_again(machine: BlockDiffusion) -> None:
    _original_restart(machine)
    machine._block.step = 0


def _emit_out_of_order(machine: BlockDiffusion, tokens: list[int], logprobs: list[TokenLogprob]) -> None:
    for token in machine._block.tokens[len(machine._seq.tokens) - machine._block.lo :]:
        machine._seq.tokens.append(token)
        tokens.append(token)


def _forget_the_step(block: Block, *arguments: object) -> None:
    _original_apply(block, *arguments)  # type: ignore[arg-type]
    block.step -= block.step > 2


def _cut_prompts_anywhere(machine: BlockDiffusion, budget: int, num_drafts: int = 0) -> Span:
    span = _original_next_span(machine, budget, num_drafts)
    if span.read is Read.NOTHING and span.kv_len < machine._prompt_end:
        return span._replace(tokens=span.tokens[:-1], kv_len=span.kv_len - 1)
    return span


def _mask_blind(index: PrefixIndex, salt: str, mask_block: int = 1) -> bytes:
    return _original_root(index, salt)


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (BlockDiffusion, "absorb", _skip_the_commit_pass),
        (BlockDiffusion, "absorb", _commit_what_was_cut),
        (BlockDiffusion, "restart", _start_the_block_again),
        (BlockDiffusion, "_release", _emit_out_of_order),
        (BlockDiffusion, "next_span", _cut_prompts_anywhere),
        (Block, "apply", _forget_the_step),
        (PrefixIndex, "root_name", _mask_blind),
    ],
)
def test_a_broken_machine_is_caught_by_the_worlds(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert _find_a_failing_world() is not None
