"""A two-layer attention model over `Ops`, and the same model dense: the oracle of the worker's tests.

Random float32 weights. `TinyModel` reads its keys from pages through `ReferenceOps`; `TinyModel.dense_logits` is a
plain causal forward over a whole token string, written without pages, spans or `Ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps
from scheduler.types import Admission, DiffusionModel, Outcome, Read, Request, Span, StepPlan
from server.worker.denoising.learn2pd import Filter
from server.worker.grammar import GrammarCompiler
from server.worker.graphs import GraphedForward
from server.worker.kv_pool import KVPool
from server.worker.proposals import Proposer
from server.worker.sequences import make_sequences
from server.worker.worker import Worker, WorkerInfo

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 32
EOS = 2


@dataclass(frozen=True)
class TinyShape:
    num_layers: int = 2
    num_kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM
    max_position: int = 256


class TinyModel:
    def __init__(self, vocab_size: int, seed: int = 0, sharpness: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

        self.ops = ReferenceOps()
        self.config = TinyShape()
        self.table = random(vocab_size, HIDDEN) * math.sqrt(HIDDEN)
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.qkv = [random(width, HIDDEN) for _ in range(self.config.num_layers)]
        self.out = [random(HIDDEN, HEADS * HEAD_DIM) for _ in range(self.config.num_layers)]
        self.norm = torch.ones(HIDDEN)
        self.head = random(vocab_size, HIDDEN) * sharpness
        angles = torch.outer(torch.arange(256.0), 1e4 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.before_forward: Callable[[Tensor], None] = lambda tokens: None
        self.poisoned_token: int | None = None

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        self.before_forward(tokens_T)
        ops, x = self.ops, self.table[tokens_T]
        for layer, (k_pages, v_pages) in enumerate(kv):
            qkv = ops.rms_norm(x, self.norm, 1e-6) @ self.qkv[layer].T
            q = ops.qkv_rope_write(
                qkv, HEADS, KV_HEADS, HEAD_DIM, self.cos_sin, None, None, 1e-6, k_pages, v_pages, rows
            )
            mixed = ops.paged_attention(q, k_pages, v_pages, rows, HEAD_DIM**-0.5)
            x = x + mixed.flatten(1) @ self.out[layer].T
        if self.poisoned_token is not None:
            x[tokens_T == self.poisoned_token] = float("nan")
        return ops.rms_norm(x, self.norm, 1e-6)

    def logits(self, hidden_JH: Tensor) -> Tensor:
        return hidden_JH @ self.head.T

    def dense_logits(self, tokens: Sequence[int]) -> Tensor:
        """Float32 [len(tokens), V] of a causal forward over the whole string."""
        x = self.table[torch.tensor(tokens)]
        length = len(tokens)
        half = HEAD_DIM // 2
        cos, sin = self.cos_sin[:length, None, :half], self.cos_sin[:length, None, half:]

        def norm(v: Tensor) -> Tensor:
            return v / torch.sqrt((v * v).mean(-1, keepdim=True) + 1e-6)

        def turn(v: Tensor) -> Tensor:
            return torch.cat(
                (v[..., :half] * cos - v[..., half:] * sin, v[..., half:] * cos + v[..., :half] * sin), dim=-1
            )

        for qkv_weight, out_weight in zip(self.qkv, self.out, strict=True):
            heads = (norm(x) @ qkv_weight.T).view(length, -1, HEAD_DIM)
            q, k, v = turn(heads[:, :HEADS]), turn(heads[:, HEADS : HEADS + KV_HEADS]), heads[:, HEADS + KV_HEADS :]
            k, v = k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
            )
            x = x + mixed.transpose(0, 1).flatten(1) @ out_weight.T
        return norm(x) @ self.head.T


def make_worker(
    model: TinyModel,
    page_size: int = 8,
    num_pages: int = 128,
    max_seqs: int = 64,
    tokenizer_file: Path | None = None,
    logits_bytes: int = 64 << 20,
    speculator: Proposer | None = None,
    diffusion: DiffusionModel | None = None,
    learnt: Filter | None = None,
    graphed: Callable[[KVPool], GraphedForward] | None = None,
    plans_ahead: bool = False,
) -> Worker:
    """A worker over a poisoned pool: a key that nobody wrote is NaN. graphed: what runs its steps of few rows."""
    vocab_size = model.head.shape[0]
    device = torch.device("cpu")
    pool = KVPool(model.ops, model.config, num_pages, page_size, torch.float32, device, poison=True, has_spare=True)
    info = WorkerInfo(
        model_len=min(256, num_pages * page_size),
        vocab_size=vocab_size,
        num_pages=num_pages,
        page_size=page_size,
        weight_bytes=0,
        kv_bytes=pool.num_bytes,
        dtype="float32",
        device="cpu",
        ops="reference",
        eos_ids=(EOS,),
        num_parameters=0,
        diffusion=diffusion,
    )
    grammars = GrammarCompiler(tokenizer_file, vocab_size, (EOS,))
    sequences = make_sequences(max_seqs, info.model_len, num_pages, page_size)
    forward = None if graphed is None else graphed(pool)
    return Worker(
        forward or model,
        model.ops,
        pool,
        sequences,
        grammars,
        info,
        max_seqs,
        256,
        device,
        logits_bytes,
        speculator,
        learnt=learnt,
        place=None if forward is None else forward.place,
        plans_ahead=plans_ahead,
    )


class Driver:
    """The least scheduler: every sequence runs at once, prompts in chunks, each with fresh pages of its own."""

    def __init__(self, worker: Worker, chunk: int = 1000) -> None:
        self.worker, self.chunk, self.step = worker, chunk, 0
        self.pages = list(range(worker.info.num_pages))
        self.next_id = 0
        self.outcomes: dict[str, list[Outcome]] = {}

    def plan(self, todo: dict[int, tuple[Request, list[int], int, int]]) -> StepPlan:
        """The next plan for {seq_id: (request, tokens, committed, pages owned)}."""
        size = self.worker.info.page_size
        spans, admitted, new_pages = [], [], []
        for seq_id, (request, tokens, committed, owned) in todo.items():
            if owned == 0:
                admitted.append(Admission(seq_id, request, tuple(tokens)))
            end = min(len(tokens), committed + self.chunk)
            needed = -(-end // size) - owned
            if needed > 0:
                new_pages.append((seq_id, tuple(self.pages.pop() for _ in range(needed))))
            judged = self._judged(request, tokens, committed, end)
            read = Read.SAMPLE if judged else Read.NOTHING
            spans.append(Span(seq_id, tuple(tokens[committed:end]), committed, end, judged=judged, read=read))
        self.step += 1
        return StepPlan(self.step, tuple(spans), tuple(admitted), tuple(new_pages))

    @staticmethod
    def _judged(request: Request, tokens: list[int], start: int, end: int) -> tuple[int, ...]:
        if request.sampling.prompt_logprobs is not None and start < len(request.prompt):
            return tuple(range(end - start))
        return (end - start - 1,) if end == len(tokens) else ()

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Output tokens of each request, run together until max_tokens or a stop id."""
        todo: dict[int, tuple[Request, list[int], int, int]] = {}
        outputs: dict[int, list[int]] = {}
        for request in requests:
            self.next_id += 1
            todo[self.next_id] = (request, [*request.prompt, *request.output], 0, 0)
            outputs[self.next_id] = list(request.output)
        while todo:
            plan = self.plan(todo)
            result = self.worker.run(plan)
            done = []
            for span, outcome in zip(plan.spans, result.outcomes, strict=True):
                request, tokens, _, owned = todo[span.seq_id]
                self.outcomes.setdefault(request.id, []).append(outcome)
                gained = sum(len(pages) for seq_id, pages in plan.new_pages if seq_id == span.seq_id)
                tokens.extend(outcome.tokens)
                outputs[span.seq_id].extend(outcome.tokens)
                todo[span.seq_id] = (request, tokens, span.kv_len, owned + gained)
                stopped = any(token in request.stop_ids for token in outcome.tokens)
                if outcome.error or stopped or len(outputs[span.seq_id]) >= request.max_tokens:
                    done.append(span.seq_id)
            for seq_id in done:
                del todo[seq_id]
            self.step += 1
            self.worker.run(StepPlan(self.step, (), released=tuple(done)))
        return list(outputs.values())
