"""Data and loss of a bidirectional model: prompts with canvases of fixed lengths behind them (LLaDA's objective).

A document is a prompt, its answer and end-of-text up to the canvas's length; every token of it sees every other. The
batch of step `n` is a pure function of (seed, n), as in batches.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from server.embedded import tasks
from server.embedded.model import TinyModel
from server.embedded.objective import Trunk
from server.embedded.tokenizer import END_OF_TEXT, MASK, PAD, token_id

LENGTHS = (16, 24, 32)
"""Canvases a model is trained on; a bidirectional model knows no others."""
TASKS = ("copy", "reverse", "sort", "insert", "remove", "replace")
"""Lists whose answer is one: what a cache or a selector loses shows in them."""
LEAST_NOISE = 0.05
"""Smallest share of masks; it bounds the weight 1 / t of a token."""


@dataclass(frozen=True, slots=True)
class CanvasBatch:
    """Packed rows. ids, docs, positions, noisy_ids int64 [B, L]; weights float32 [B, L], 1 / t of masked tokens."""

    ids: Tensor
    docs: Tensor
    positions: Tensor
    noisy_ids: Tensor
    weights: Tensor

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()


class CanvasSource:
    """Owns the tokenizer; `batch(step)` has no memory. Raises ValueError if a row cannot hold the longest canvas."""

    def __init__(self, tokenizer: Tokenizer, seed: int, num_rows: int, row_len: int) -> None:
        if row_len < 2 * max(LENGTHS):
            raise ValueError(f"row_len is {row_len}, but must be at least {2 * max(LENGTHS)}")
        self._tokenizer, self._seed, self._num_rows, self._row_len = tokenizer, seed, num_rows, row_len
        self._mask, self._end = token_id(tokenizer, MASK), token_id(tokenizer, END_OF_TEXT)
        self._pad = token_id(tokenizer, PAD)
        self._weights = [tasks.WEIGHTS[task] for task in TASKS]

    def batch(self, step: int) -> CanvasBatch:
        """The batch of step `step`."""
        rng = random.Random(f"canvas:{self._seed}:{step}")
        shape = (self._num_rows, self._row_len)
        ids, docs, noisy = torch.full(shape, self._pad), torch.full(shape, -1), torch.full(shape, self._pad)
        positions, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        for row in range(self._num_rows):
            offset = number = 0
            while True:
                prompt, answer = self._draw(rng)
                stop = offset + len(prompt) + len(answer)
                if stop > self._row_len:
                    break
                share = LEAST_NOISE + (1 - LEAST_NOISE) * rng.random()
                hidden = [rng.random() < share for _ in answer]
                ids[row, offset:stop] = torch.tensor(prompt + answer)
                given = [self._mask if hide else token for hide, token in zip(hidden, answer, strict=True)]
                noisy[row, offset:stop] = torch.tensor(prompt + given)
                weights[row, stop - len(answer) : stop] = torch.tensor(hidden) / share
                positions[row, offset:stop] = torch.arange(stop - offset)
                docs[row, offset:stop] = number
                offset, number = stop, number + 1
        return CanvasBatch(ids, docs, positions, noisy, weights)

    def _draw(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of its canvas."""
        while True:
            task = rng.choices(TASKS, weights=self._weights)[0]
            example = tasks.make_example(task, rng)
            prompt = self._tokenizer.encode(example.prompt, add_special_tokens=False).ids
            answer = self._tokenizer.encode(example.answer, add_special_tokens=False).ids
            length = rng.choice(LENGTHS)
            if len(answer) < length and len(prompt) + length <= self._row_len:
                return prompt, answer + [self._end] * (length - len(answer))


def canvas_mask(docs: Tensor) -> Tensor:
    """Each token sees its whole document: docs int64 [B, L] -> bool [B, 1, L, L]. Padding sees padding."""
    return (docs[:, :, None] == docs[:, None, :])[:, None]


def canvas_loss(model: TinyModel, trunk: Trunk, batch: CanvasBatch) -> Tensor:
    """Cross entropy of masked tokens, each weighted by 1 / t of its document, over all canvas tokens' expected weight.

    Source: Nie et al., "Large Language Diffusion Models" (LLaDA, 2025), algorithm 2. Departure: divided by the weights'
    sum, which has the number of canvas tokens as its mean and varies less.
    """
    hidden = trunk(batch.noisy_ids, batch.positions, canvas_mask(batch.docs))
    is_masked = batch.weights > 0
    each = F.cross_entropy(model.logits(hidden[is_masked]).float(), batch.ids[is_masked], reduction="none")
    weights = batch.weights[is_masked]
    return (each * weights).sum() / weights.sum()
