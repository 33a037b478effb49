"""Turns examples into packed token rows: the batch of step `n` is a pure function of (seed, n), so resuming is exact.

Every document starts at a multiple of the block size and ends in end-of-text tokens up to the next one: its last block
is full, which is how a denoised answer says that it is over.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from server.embedded import functions, tasks
from server.embedded.model import BLOCK_SIZE
from server.embedded.tokenizer import END_OF_TEXT, IM_END, MASK, PAD, token_id

FUNCTION_SHARE = 0.13
"""Share of the drawn documents that are functions; they are longer than the tasks, so about a quarter of the tokens."""
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, a multiple of the block size; the answer is `ids[start:stop]`, what follows is end-of-text filling."""

    ids: list[int]
    start: int
    stop: int
    learn_prompt: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows. The first `num_task_rows` rows hold tasks and functions; the others windows of filler text.

    ids, docs, positions  int64 [B, L]; `docs` separates documents, `positions` count from each document's start
    next_ids              int64 [B, L], the token to predict at each position, IGNORED where there is no causal loss
    noisy_ids             int64 [num_task_rows, L], ids with some maskable ones replaced by the mask token
    """

    ids: Tensor
    docs: Tensor
    positions: Tensor
    next_ids: Tensor
    noisy_ids: Tensor

    @property
    def num_task_rows(self) -> int:
        return self.noisy_ids.shape[0]


def encode_example(tokenizer: Tokenizer, example: tasks.Example) -> Document:
    """Prompt and answer are encoded apart, as a server does that sees only the prompt."""
    prompt = tokenizer.encode(example.prompt, add_special_tokens=False).ids
    answer = tokenizer.encode(example.answer, add_special_tokens=False).ids
    end = token_id(tokenizer, END_OF_TEXT)
    if answer[-1] != token_id(tokenizer, IM_END):
        answer.append(end)
    ids = prompt + answer
    filling = -len(ids) % BLOCK_SIZE
    return Document(ids + [end] * filling, len(prompt), len(ids), learn_prompt=example.task == "function")


def _vary_space(example: tasks.Example, rng: random.Random) -> tasks.Example:
    """Now and then the prompt ends in the space that otherwise opens the answer, as people type it."""
    if example.answer.startswith(" ") and not example.answer.startswith("  ") and rng.random() < 0.05:
        return tasks.Example(example.task, example.prompt + " ", example.answer[1:])
    return example


class BatchSource:
    """Owns the tokenizer, the filler's tokens and the functions' texts; `batch(step)` has no memory."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        filler: Tensor,
        seed: int,
        num_rows: int,
        num_filler_rows: int,
        row_len: int,
        weights: Mapping[str, float] = tasks.WEIGHTS,
    ) -> None:
        """filler: int32 [N], N > row_len; weights: of the tasks.

        Raises ValueError if row_len is not a multiple of the block size.
        """
        if row_len % BLOCK_SIZE:
            raise ValueError(f"row_len is {row_len}, but must be a multiple of the block size {BLOCK_SIZE}")
        self.tokenizer = tokenizer
        self.filler = filler
        self.seed = seed
        self.num_task_rows = num_rows - num_filler_rows
        self.num_filler_rows = num_filler_rows
        self.row_len = row_len
        self.weights = weights
        self.functions = list(functions.parse_functions().values())
        self.mask_id = token_id(tokenizer, MASK)
        self.pad_id = token_id(tokenizer, PAD)

    def _draw(self, rng: random.Random) -> Document:
        while True:
            if rng.random() < FUNCTION_SHARE:
                example = functions.draw_function(self.functions, rng)
            else:
                example = _vary_space(tasks.draw_example(rng, self.weights), rng)
            document = encode_example(self.tokenizer, example)
            if len(document.ids) <= self.row_len:
                return document

    def _task_rows(self, rng: random.Random) -> list[list[Document]]:
        """Fill the rows in order of drawing: a document goes to the first row with room, until one fits nowhere."""
        rows: list[list[Document]] = [[] for _ in range(self.num_task_rows)]
        room = [self.row_len] * self.num_task_rows
        misses = 0
        while misses < 4:
            document = self._draw(rng)
            row = next((r for r in range(len(rows)) if room[r] >= len(document.ids)), None)
            if row is None:
                misses += 1
                continue
            rows[row].append(document)
            room[row] -= len(document.ids)
        return rows

    def batch(self, step: int) -> Batch:
        """The batch of step `step`."""
        rng = random.Random(f"{self.seed}:{step}")
        num_rows = self.num_task_rows + self.num_filler_rows
        ids = torch.full((num_rows, self.row_len), self.pad_id)
        docs = torch.full((num_rows, self.row_len), -1)
        positions = torch.arange(self.row_len).repeat(num_rows, 1)
        next_ids = torch.full((num_rows, self.row_len), IGNORED)
        noisy = torch.full((self.num_task_rows, self.row_len), self.pad_id)
        for row, documents in enumerate(self._task_rows(rng)):
            place_documents(documents, ids[row], docs[row], positions[row], next_ids[row])
            noisy[row] = torch.tensor(_add_noise(documents, self.row_len, self.mask_id, self.pad_id, rng))
        for row in range(self.num_task_rows, num_rows):
            start = rng.randrange(self.filler.numel() - self.row_len - 1)
            window = self.filler[start : start + self.row_len + 1].long()
            ids[row], next_ids[row], docs[row] = window[:-1], window[1:], 0
        return Batch(ids, docs, positions, next_ids, noisy)


def place_documents(documents: Sequence[Document], ids: Tensor, docs: Tensor, pos: Tensor, next_ids: Tensor) -> None:
    """Write `documents` one after another into the given rows ([L] each, in place)."""
    offset = 0
    for number, document in enumerate(documents):
        stop = offset + len(document.ids)
        ids[offset:stop] = torch.tensor(document.ids)
        docs[offset:stop] = number
        pos[offset:stop] = torch.arange(len(document.ids))
        first = 1 if document.learn_prompt else document.start
        next_ids[offset + first - 1 : offset + document.stop - 1] = torch.tensor(document.ids[first : document.stop])
        offset = stop


def _add_noise(documents: Sequence[Document], row_len: int, mask_id: int, pad_id: int, rng: random.Random) -> list[int]:
    """Each block draws its own t ~ U(0, 1) and masks its answer tokens with probability t."""
    noisy: list[int] = []
    for document in documents:
        for begin in range(0, len(document.ids), BLOCK_SIZE):
            level = rng.random()
            for index in range(begin, begin + BLOCK_SIZE):
                hide = index >= document.start and rng.random() < level
                noisy.append(mask_id if hide else document.ids[index])
    return noisy + [pad_id] * (row_len - len(noisy))
