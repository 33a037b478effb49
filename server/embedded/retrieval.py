"""Training rows and objective of the long-context model: pairs, then some of them asked for again (`pairs.py`).

Rows are short, contexts are long. Two things bridge that, so that a few hundred steps on one core teach retrieval among
8,192 keys:

positions  A row's pairs stand at increasing positions with random gaps, anywhere in [0, MAX_POSITION - row length]; a
           pair's own four tokens stay together. Source: Ruoss et al., "Randomized Positional Encodings Boost Length
           Generalization of Transformers" (2023). Departure: gaps are between pairs only, and most of them empty, so
           that neighbours are neighbours in training, too.
guidance   Some heads are told what to attend to, as far as the answer's loss alone would take far longer to find out:
           in the first layer a pair's tokens to its key, in two later ones the token before an answer to the answer.
           Source: Deshpande and Narasimhan, "Guiding Attention for Self-Supervised Learning with Transformers" (2020).
           Departures: cross entropy of the attention in place of a squared distance; and every wrong key counts
           `crowd` times in it, so that heads become as sharp as a context `crowd` times longer asks for.

The batch of step `n` is a pure function of (seed, n).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from server.embedded.model import Attention, Layer, TinyModel
from server.embedded.objective import Trunk
from server.embedded.pairs import FIRST_KEY, FIRST_VALUE, NUM_CHOICES, NUM_KEYS, PAIR_LEN, VALUE_LEN

MAX_POSITION = 8192
GAP_SHARE = 0.3
"""Share of the places between pairs that get a gap; the sizes of gaps differ by orders of magnitude."""
BINDING_LAYER = 0
RETRIEVAL_LAYERS = (2, 3)
"""Behind the two layers that sparse attention leaves dense."""


@dataclass(frozen=True, slots=True)
class RetrievalBatch:
    """Rows of `num_pairs` pairs and as many questions.

    ids, positions  int64 [B, L]
    asking          int64 [A], the places whose next token is an answer, the same in all rows
    sources         int64 [B, A], the place of that token in the context
    """

    ids: Tensor
    positions: Tensor
    asking: Tensor
    sources: Tensor

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    @property
    def answers(self) -> Tensor:
        """int64 [B, A]."""
        return self.ids[:, self.asking + 1]


class RetrievalSource:
    """`batch(step)` has no memory. Raises ValueError if there are not so many keys, or positions."""

    def __init__(self, seed: int, num_rows: int, num_pairs: int, num_questions: int) -> None:
        row_len = (num_pairs + num_questions) * PAIR_LEN
        if not 1 <= num_questions <= num_pairs <= NUM_KEYS:
            raise ValueError(f"{num_questions} questions about {num_pairs} pairs: at most one a pair, {NUM_KEYS} pairs")
        if row_len > MAX_POSITION + PAIR_LEN * num_questions:
            raise ValueError(f"rows of {num_pairs} pairs do not fit into {MAX_POSITION} positions")
        self._seed, self._num_rows, self._num_pairs, self._num_questions = seed, num_rows, num_pairs, num_questions
        places = torch.arange(num_pairs * PAIR_LEN, row_len)
        self._asking = places[places % PAIR_LEN != VALUE_LEN]

    def batch(self, step: int) -> RetrievalBatch:
        """The batch of step `step`."""
        # torch's generator takes 32 bits of a seed: seed and step together are hashed into them.
        generator = torch.Generator().manual_seed(random.Random(f"retrieval:{self._seed}:{step}").getrandbits(32))
        rows, pairs = self._num_rows, self._num_pairs
        keys = torch.stack([torch.randperm(NUM_KEYS, generator=generator)[:pairs] for _ in range(rows)]) + FIRST_KEY
        choices = torch.randint(NUM_CHOICES, (rows, pairs, VALUE_LEN), generator=generator)
        values = choices + FIRST_VALUE + NUM_CHOICES * torch.arange(VALUE_LEN)
        context = torch.cat((keys.unsqueeze(2), values), dim=2)
        asked = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(rows)])[:, : self._num_questions]
        questions = context.gather(1, asked.unsqueeze(2).expand(-1, -1, PAIR_LEN))
        ids = torch.cat((context, questions), dim=1).flatten(1)
        sources = asked.unsqueeze(2) * PAIR_LEN + torch.arange(1, PAIR_LEN)
        return RetrievalBatch(ids, self._positions(ids.shape, generator), self._asking, sources.flatten(1))

    def _positions(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        num_rows, row_len = shape
        drawn = torch.rand(3, num_rows, row_len // PAIR_LEN, generator=generator)
        gaps = drawn[0] ** 4 * (drawn[1] < GAP_SHARE)
        shares = gaps.cumsum(1) / gaps.sum(1, keepdim=True).clamp_min(1e-9)
        begins = (max(0, MAX_POSITION - row_len) * drawn[2, :, :1] * shares).long().repeat_interleave(PAIR_LEN, dim=1)
        return begins + torch.arange(row_len)


def retrieval_loss(model: TinyModel, trunk: Trunk, batch: RetrievalBatch) -> Tensor:
    """Cross entropy of the answers' tokens, in nats a token."""
    return _answer_loss(model, trunk(batch.ids, batch.positions, causal(batch)), batch)


def guided_loss(model: TinyModel, batch: RetrievalBatch, crowd: float) -> tuple[Tensor, Tensor]:
    """The same, and the guidance: the sum over guided layers of the mean cross entropy of their attention.

    crowd  how often each key that is not meant counts, at least 1
    """
    places = torch.arange(batch.ids.shape[1])
    own_key = (places // PAIR_LEN * PAIR_LEN).expand_as(batch.ids)
    mask, (cos, sin) = causal(batch), model.rotary(batch.positions)
    x = model.embed_tokens(batch.ids)
    guidance = x.new_zeros(())
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        if index == BINDING_LAYER:
            scores = _first_scores(layer.self_attn, layer.input_layernorm(x), cos, sin, mask, places)
            guidance = guidance + _attention_loss(scores, own_key, crowd)
        if index in RETRIEVAL_LAYERS:
            scores = _first_scores(layer.self_attn, layer.input_layernorm(x), cos, sin, mask, batch.asking)
            guidance = guidance + _attention_loss(scores, batch.sources, crowd)
        x = layer(x, cos, sin, mask)
    return _answer_loss(model, model.norm(x), batch), guidance


def causal(batch: RetrievalBatch) -> Tensor:
    """bool [1, 1, L, L]: a row is one document."""
    length = batch.ids.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=batch.ids.device).tril()[None, None]


def _answer_loss(model: TinyModel, hidden: Tensor, batch: RetrievalBatch) -> Tensor:
    logits = model.logits(hidden[:, batch.asking])
    return F.cross_entropy(logits.float().flatten(0, 1), batch.answers.flatten())


def _first_scores(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """Scores of the rows at places `rows` (int64 [A]) in the query heads of the first kv head, [B, heads, A, L]."""
    shape = attention.shape
    q, k = attention.queries_and_keys(x, cos, sin)
    q = q[:, : shape.num_heads // shape.num_kv_heads, rows]
    scores: Tensor = q @ k[:, :1].transpose(2, 3) * shape.head_dim**-0.5
    return scores.masked_fill(~mask[:, :, rows], -math.inf)


def _attention_loss(scores: Tensor, meant: Tensor, crowd: float) -> Tensor:
    """Mean of -log p(meant) over heads and rows, every other key counting `crowd` times. meant int64 [B, A]."""
    index = meant[:, None, :, None].expand(-1, scores.shape[1], -1, 1)
    others = scores.scatter(3, index, -math.inf).logsumexp(3, keepdim=True)
    return F.softplus(others + math.log(crowd) - scores.gather(3, index)).mean()
