"""Tokens that change: WINO's shadows and masks set again, LLaDA2.1's edits, against plain loops over dense forwards."""

from __future__ import annotations

import pytest
import torch

from scheduler.types import DiffusionModel, Read, Request, StepPlan, Topology
from server.worker.worker import Worker
from tests.server.worker.denoising.block_driver import BlockDriver, Running
from tests.server.worker.denoising.oracle import block_causal, dense, row_of
from tests.server.worker.denoising.worlds import MASK, SHIFTED, SIZE, plan_of, request, sharp_model
from tests.server.worker.tiny_model import TinyModel, make_worker


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return sharp_model()


def run(model: TinyModel, asked: Request, fused: bool = True, size: int = SIZE) -> Running:
    (one,) = BlockDriver(worker_of(model, asked, size), fused, twice=True).generate([asked])
    assert one.error is None
    return one


def worker_of(model: TinyModel, asked: Request, size: int = SIZE) -> Worker:
    is_canvas = asked.decoding is not None and asked.decoding.gen_length is not None
    topology = Topology.BIDIRECTIONAL if is_canvas else Topology.BLOCK_CAUSAL
    return make_worker(model, page_size=16, diffusion=DiffusionModel(MASK, size, topology))


def wino(
    model: TinyModel, asked: Request, wide: float, narrow: float, size: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Output, and (masks fixed, masks set again) of each step. Dense, with the shadows behind everything."""
    is_canvas = asked.decoding is not None and asked.decoding.gen_length is not None
    num_prompt, tokens, counts = len(asked.prompt), list(asked.prompt), list[tuple[int, int]]()
    if is_canvas:
        tokens += [MASK] * asked.max_tokens
    while MASK in tokens or len(tokens) < num_prompt + asked.max_tokens:
        if MASK not in tokens:
            tokens += [MASK] * (size - len(tokens) % size)
        first = tokens.index(MASK)
        lo = num_prompt + (first - num_prompt) // size * size if is_canvas else first // size * size
        hi, length = lo + size, len(tokens)
        while MASK in tokens[lo:hi]:
            seen = torch.zeros(length + size, length + size, dtype=torch.bool)
            seen[:length, :length] = True if is_canvas else block_causal(length, size)
            seen[length:, :length] = True
            for i in range(size):
                seen[length + i, lo + i] = False
                seen[length + i, length + i] = True
            positions = torch.tensor([*range(length), *range(lo, hi)])
            logits = dense(model, [*tokens, *[MASK] * size], seen, positions)
            rows = [row_of(logits[at], at, MASK) for at in range(lo, hi) if tokens[at] == MASK]
            rows.sort(key=lambda row: -row.confidence)
            most = min(max(int(0.7 * len(rows)), 5), 20)
            fixed = [row for row in rows if row.confidence > wide][:most] or rows[:1]
            doubts = []
            for at in range(max(lo, num_prompt), hi):
                if tokens[at] != MASK:
                    shadow = logits[length + at - lo].clone()
                    shadow[MASK] = float("-inf")
                    chance = float(shadow.softmax(0)[tokens[at]])
                    if chance < narrow:
                        doubts.append((chance, at))
            again = [at for _, at in sorted(doubts)[: len(fixed) - 1]]
            for row in fixed:
                tokens[row.position] = row.token
            for at in again:
                tokens[at] = MASK
            counts.append((len(fixed), len(again)))
    return tokens[num_prompt : num_prompt + asked.max_tokens], counts


@pytest.mark.parametrize("canvas", [None, 32])
@pytest.mark.parametrize(("wide", "narrow", "size"), [(0.3, 0.9, 4), (0.5, 0.5, 8), (0.6, 0.99, 16), (0.5, 0.9, 16)])
@pytest.mark.parametrize("length", [6, 8, 17])
def test_wino_equals_its_plain_loop(
    model: TinyModel, length: int, wide: float, narrow: float, size: int, canvas: int | None
) -> None:
    asked = request("wino", "wino", {"wide": wide, "narrow": narrow}, length, 20, canvas=canvas)
    one, (expected, counts) = run(model, asked, size=size), wino(model, asked, wide, narrow, size)
    assert one.output == expected
    assert one.fixed == [fixed + again for fixed, again in counts]


def test_the_oracle_masks_tokens_again() -> None:
    again = 0
    for seed in range(3):
        asked = request("wino", "wino", {}, 8, 20)
        again += sum(count for _, count in wino(sharp_model(seed), asked, 0.6, 0.99, 16)[1])
    assert again > 5


@pytest.mark.parametrize("canvas", [None, 16])
def test_masks_fall_in_every_step_and_the_prompt_stays(model: TinyModel, canvas: int | None) -> None:
    asked = request("falls", "wino", {"wide": 0.6, "narrow": 1.0}, 9, 16, canvas=canvas, logprobs=2)
    one = run(model, asked, size=16)
    assert any(MASK in outcome.tokens for outcome in one.outcomes)
    for span, outcome in zip(one.spans, one.outcomes, strict=True):
        if outcome.denoised is None:
            continue
        assert outcome.tokens.count(MASK) < len(outcome.tokens) - outcome.tokens.count(MASK)
        assert len(outcome.logprobs) == len(outcome.tokens)
        assert all(entry.token == token for entry, token in zip(outcome.logprobs, outcome.tokens, strict=True))
        assert min(outcome.denoised.positions) >= len(asked.prompt)
        assert outcome.denoised.positions == tuple(sorted(set(outcome.denoised.positions)))
        assert span.denoise is not None


@pytest.mark.parametrize("canvas", [None, 8])
def test_shadows_change_nothing_that_other_rows_see(model: TinyModel, canvas: int | None) -> None:
    """The same span with shadows and without: the block's own rows give the same, and so do its keys."""
    values = {"wide": 0.3, "narrow": 0.0}
    asked = request("shadow", "wino", values, 9, 7, canvas=canvas, logprobs=30)
    span = run(model, asked).spans[1 if canvas is None else 0]
    assert span.denoise is not None
    assert span.denoise.shadow == SIZE
    num_own = len(span.tokens) - SIZE
    bare = span._replace(
        tokens=span.tokens[:num_own],
        kv_len=span.kv_len - SIZE,
        judged=tuple(at for at in span.judged if at < num_own),
        denoise=span.denoise._replace(shadow=0),
    )
    found = []
    for one in (span, bare):
        worker = worker_of(model, asked)
        known = (*asked.prompt, *span.tokens)[: span.start + num_own]
        if span.start:
            prefill = span._replace(
                tokens=asked.prompt[: span.start],
                start=0,
                kv_len=span.start,
                judged=(),
                read=Read.NOTHING,
                denoise=None,
            )
            worker.run(plan_of(asked, known, prefill))
            (outcome,) = worker.run(StepPlan(2, (one._replace(seq_id=1),))).outcomes
        else:
            (outcome,) = worker.run(plan_of(asked, known, one)).outcomes
        found.append(outcome)
    assert found[0].tokens == found[1].tokens
    for a, b in zip(found[0].logprobs, found[1].logprobs, strict=True):
        assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-5)


def test_a_model_or_a_block_that_cannot_have_shadows_is_named(model: TinyModel) -> None:
    asked = request("no", "wino")
    with pytest.raises(ValueError, match="rows answer for their own position"):
        make_worker(model, diffusion=SHIFTED).prepare(asked)
    with pytest.raises(ValueError, match="blocks of 32 tokens at most; these have 64"):
        worker_of(model, asked, 64).prepare(asked)
    with pytest.raises(ValueError, match="only generates token by token"):
        make_worker(model).prepare(asked)
    span = run(model, request("few", "wino", length=4)).spans[0]
    assert span.denoise is not None
    few = span._replace(denoise=span.denoise._replace(shadow=2))
    with pytest.raises(ValueError, match="has 2 shadows of a block of 4"):
        worker_of(model, asked).run(plan_of(asked, asked.prompt[:4], few))


def edited(model: TinyModel, asked: Request, limit: float, edit: float, most: int) -> tuple[list[int], int]:
    """LLaDA2.1's loop: masks above a limit or the surest; fixed output tokens replaced; then edits alone."""
    num_prompt, tokens, num_edits = len(asked.prompt), list(asked.prompt), 0
    while len(tokens) < num_prompt + asked.max_tokens:
        lo = len(tokens) // SIZE * SIZE
        tokens += [MASK] * (lo + SIZE - len(tokens))
        left = most
        while True:
            was_full = MASK not in tokens
            logits = dense(model, tokens, block_causal(len(tokens), SIZE))
            rows = [row_of(logits[at], at, MASK) for at in range(lo, lo + SIZE)]
            masks = [row for row in rows if tokens[row.position] == MASK]
            best = max(masks, key=lambda row: row.confidence, default=None)
            changes = [row for row in masks if row.confidence >= limit or row is best]
            changes += [
                row
                for row in rows
                if row.position >= num_prompt
                and tokens[row.position] not in (MASK, row.token)
                and row.confidence > edit
            ]
            num_edits += len([row for row in changes if tokens[row.position] != MASK])
            for row in changes:
                tokens[row.position] = row.token
            left -= was_full
            if was_full and (not changes or left == 0):
                break
    return tokens[num_prompt : num_prompt + asked.max_tokens], num_edits


@pytest.mark.parametrize(("limit", "edit"), [(0.3, 0.3), (0.5, 0.9), (0.2, 0.0)])
@pytest.mark.parametrize("length", [6, 8, 11])
@pytest.mark.parametrize("fused", [False, True])
def test_edits_equal_their_plain_loop(model: TinyModel, length: int, limit: float, edit: float, fused: bool) -> None:
    values = {"threshold": limit, "edit_threshold": edit, "max_post_edits": 5.0}
    asked = request("edit", "llada2_edit", values, length, 14)
    assert run(model, asked, fused).output == edited(model, asked, limit, edit, 5)[0]


def test_tokens_are_edited_at_all() -> None:
    assert (
        sum(edited(sharp_model(seed), request("e", "llada2_edit", {}, 6, 16), 0.2, 0.2, 5)[1] for seed in range(4)) > 3
    )
