"""The reference of diffusion, written a second time and plainly: dense forwards over whole token strings, and loops.

No pages, no spans, no `Ops`, none of the reader's code. Source: diffusion reference, 3 (LLaDA), 4 (selectors), 7.1 and
7.2 (block-causal loops).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scheduler.types import Request
from tests.server.worker.tiny_model import HEAD_DIM, HEADS, KV_HEADS, TinyModel


def dense(model: TinyModel, tokens: Sequence[int], seen: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits float64 [L, V] of a forward over all of `tokens`; seen: bool [L, L], row sees key; positions for RoPE."""
    length, half = len(tokens), HEAD_DIM // 2
    x = model.table[torch.tensor(tokens)].double()
    angles = model.cos_sin[torch.arange(length) if positions is None else positions].double()
    cos, sin = angles[:, None, :half], angles[:, None, half:]

    def norm(v: Tensor) -> Tensor:
        return v / torch.sqrt((v * v).mean(-1, keepdim=True) + 1e-6)

    def turn(v: Tensor) -> Tensor:
        return torch.cat((v[..., :half] * cos - v[..., half:] * sin, v[..., half:] * cos + v[..., :half] * sin), dim=-1)

    for qkv_weight, out_weight in zip(model.qkv, model.out, strict=True):
        heads = (norm(x) @ qkv_weight.double().T).view(length, -1, HEAD_DIM)
        q, k, v = turn(heads[:, :HEADS]), turn(heads[:, HEADS : HEADS + KV_HEADS]), heads[:, HEADS + KV_HEADS :]
        k, v = k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(HEAD_DIM)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ out_weight.double().T
    return norm(x) @ model.head.double().T


def block_causal(length: int, size: int) -> Tensor:
    block = torch.arange(length) // size
    return block[None, :] <= block[:, None]


@dataclass
class Row:
    """A mask that may be fixed, and what it would become."""

    position: int
    token: int
    confidence: float
    margin: float
    entropy: float
    logprob: float
    best: int


Rule = Callable[[list[Row], int, int], list[Row]]
"""(rows, step in the block, masks that the block began with) -> the rows to fix."""
Choose = Callable[[Tensor, list[int], int, int], Row]
"""(logits [V], tokens with masks, position, step) -> what the position would become."""


def row_of(logits: Tensor, position: int, mask_id: int) -> Row:
    logits = logits.clone()
    logits[mask_id] = float("-inf")
    probs = logits.softmax(0)
    best = probs.topk(2)
    token = int(probs.argmax())
    entropy = -float((probs[probs > 0] * probs[probs > 0].log()).sum())
    margin = float(best.values[0] - best.values[1])
    return Row(position, token, float(probs[token]), margin, entropy, float(probs[token].log()), token)


def low_confidence(rows: list[Row], step: int, masks: int) -> list[Row]:
    return sorted(rows, key=lambda row: -row.confidence)[:1]


def leftmost(rows: list[Row], step: int, masks: int) -> list[Row]:
    return rows[:1]


def static(steps: int) -> Rule:
    """LLaDA's and SDAR's quota: masks over steps, the remainder in the first ones."""

    def rule(rows: list[Row], step: int, masks: int) -> list[Row]:
        quota = masks // steps + (step < masks % steps)
        return sorted(rows, key=lambda row: -row.confidence)[:quota]

    return rule


def above(threshold: float) -> Rule:
    def rule(rows: list[Row], step: int, masks: int) -> list[Row]:
        surest = max(rows, key=lambda row: row.confidence)
        return [row for row in rows if row.confidence >= threshold or row is surest]

    return rule


@dataclass
class Text:
    """Output tokens, and how many rows were fixed in each denoise forward."""

    tokens: list[int]
    fixed: list[int]
    logprobs: dict[int, float]


def generate(
    model: TinyModel,
    asked: Request,
    size: int,
    mask_id: int,
    rule: Rule,
    shift: int = 0,
    choose: Choose | None = None,
) -> Text:
    """Block after block, each filled by `rule`, every forward dense and uncached over all blocks so far.

    choose  makes a row of its logits, the tokens so far, its position and the step; None = the likeliest token
    """
    choose = choose or (lambda logits, tokens, position, step: row_of(logits, position, mask_id))
    tokens, prompt_len, fixed = list(asked.prompt), len(asked.prompt), list[int]()
    logprobs: dict[int, float] = {}
    while len(tokens) - prompt_len < asked.max_tokens:
        lo = len(tokens) // size * size
        tokens += [mask_id] * (lo + size - len(tokens))
        masks, step = tokens.count(mask_id), 0
        while mask_id in tokens:
            end = len(tokens)
            places = [place for place in range(lo, end) if tokens[place] == mask_id]
            if shift and places[0] == lo:
                # Fast-dLLM v2: the pass that writes the finished block gives the next block's first token.
                logits = dense(model, tokens[:lo], block_causal(lo, size))
                rows = [choose(logits[lo - 1], tokens, lo, step)]
                chosen = rows
            else:
                logits = dense(model, tokens, block_causal(end, size))
                rows = [choose(logits[place - shift], tokens, place, step) for place in places]
                chosen = rule(rows, step, masks)
            for row in chosen:
                tokens[row.position] = row.token
                logprobs[row.position] = row.logprob
            fixed.append(len(chosen))
            step += 1
    return Text(tokens[prompt_len : prompt_len + asked.max_tokens], fixed, logprobs)


def rules() -> dict[str, tuple[str, dict[str, float], int | None, Rule]]:
    """Some policies with parameters and steps, and the plain rule that each must equal."""
    return {
        "sequential": ("sequential", {}, None, leftmost),
        "low_confidence": ("low_confidence", {}, None, low_confidence),
        "static": ("low_confidence", {}, 2, static(2)),
        "threshold": ("threshold", {"threshold": 0.5}, None, above(0.5)),
        "all": ("threshold", {"threshold": 0.0}, None, above(0.0)),
    }


class Canvas:
    """A bidirectional forward, float64, that keeps K and V of each position as it was last computed."""

    def __init__(self, model: TinyModel, length: int) -> None:
        self.model = model
        self.kv = [torch.full((2, length, HEADS, HEAD_DIM), float("nan"), dtype=torch.float64) for _ in model.qkv]

    def logits(self, tokens: Sequence[int], places: Sequence[int]) -> dict[int, Tensor]:
        """{position: logits [V]} of some positions, whose K and V are computed anew; the others are as they were."""
        model, at, half = self.model, torch.tensor(places), HEAD_DIM // 2
        x = model.table[torch.tensor([tokens[place] for place in places])].double()
        angles = model.cos_sin[at].double()
        cos, sin = angles[:, None, :half], angles[:, None, half:]

        def norm(v: Tensor) -> Tensor:
            return v / torch.sqrt((v * v).mean(-1, keepdim=True) + 1e-6)

        def turn(v: Tensor) -> Tensor:
            return torch.cat(
                (v[..., :half] * cos - v[..., half:] * sin, v[..., half:] * cos + v[..., :half] * sin), dim=-1
            )

        for kv, qkv_weight, out_weight in zip(self.kv, model.qkv, model.out, strict=True):
            heads = (norm(x) @ qkv_weight.double().T).view(len(places), -1, HEAD_DIM)
            q, k, v = turn(heads[:, :HEADS]), turn(heads[:, HEADS : HEADS + KV_HEADS]), heads[:, HEADS + KV_HEADS :]
            kv[0, at], kv[1, at] = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
            weights = (torch.einsum("ihd,jhd->hij", q, kv[0]) / math.sqrt(HEAD_DIM)).softmax(-1)
            x = x + torch.einsum("hij,jhd->ihd", weights, kv[1]).flatten(1) @ out_weight.double().T
        return dict(zip(places, norm(x) @ model.head.double().T, strict=True))


def fill_canvas(model: TinyModel, asked: Request, size: int, mask_id: int, rule: Rule, dual: bool, shift: int) -> Text:
    """LLaDA's semi-autoregressive loop over a canvas; dual: only a block's first step computes all rows."""
    prompt_len, length = len(asked.prompt), len(asked.prompt) + asked.max_tokens
    tokens, canvas, fixed = list(asked.prompt) + [mask_id] * asked.max_tokens, Canvas(model, length), list[int]()
    logprobs: dict[int, float] = {}
    for lo in range(prompt_len, length, size):
        step = 0
        while mask_id in tokens[lo : lo + size]:
            rows_of = range(length) if step == 0 or not dual else range(lo - shift, lo + size)
            logits = canvas.logits(tokens, list(rows_of))
            places = [place for place in range(lo, lo + size) if tokens[place] == mask_id]
            chosen = rule([row_of(logits[place - shift], place, mask_id) for place in places], step, size)
            for row in chosen:
                tokens[row.position] = row.token
                logprobs[row.position] = row.logprob
            fixed.append(len(chosen))
            step += 1
    return Text(tokens[prompt_len:], fixed, logprobs)
