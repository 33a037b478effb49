"""A small Llama-shaped model that denoises canvases: served through `Worker` and `FullDiffusion`, and its dense oracle.

The oracle is float64, without pages, spans, caches or `Ops`, and its samplers are the published loops of LLaDA and
Dream, written down once more. The driver is the least scheduler that canvases need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.reference import ReferenceOps
from scheduler import sequence
from scheduler.decoding.full_diffusion import FullDiffusion
from scheduler.policies import make_diffusion
from scheduler.types import (
    Admission,
    DiffusionModel,
    Outcome,
    Request,
    Sampling,
    Span,
    StepPlan,
    TokenLogprob,
    Topology,
)
from server.models.registry import Model, build_model, parse_config
from server.worker.attention_probe import AttentionProbe
from server.worker.denoising.learn2pd import Filter
from server.worker.grammar import GrammarCompiler
from server.worker.info import WorkerInfo
from server.worker.kv_pool import KVPool
from server.worker.sequences import make_sequences
from server.worker.worker import Worker
from tests.tiny import tiny_config, tiny_tensors

VOCAB, MASK, EOS, SIZE = 40, 39, 2, 4
PAGE_SIZE = 8


class Weights:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def take(self, name: str) -> Tensor:
        return self._tensors[name]


@dataclass
class Tiny:
    """The model and its tensors. sharpness: of the head, so that some rows are sure."""

    model_type: str = "qwen3"
    shift: int = 0
    sharpness: float = 3.0
    seed: int = 0
    tensors: dict[str, Tensor] = field(init=False)
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = tiny_config(self.model_type, vocab_size=VOCAB, hidden_size=32, head_dim=8, intermediate_size=48)
        self.tensors = dict(tiny_tensors(self.config, self.seed))
        self.tensors["lm_head.weight"] *= self.sharpness

    @property
    def diffusion(self) -> DiffusionModel:
        return DiffusionModel(MASK, SIZE, Topology.BIDIRECTIONAL, self.shift)

    def build(self) -> Model:
        weights = Weights(dict(self.tensors))
        return build_model(parse_config(self.config), weights, ReferenceOps(), torch.device("cpu"))

    def worker(self, num_pages: int = 96, learnt: Filter | None = None) -> Worker:
        """Over a pool full of NaN: a key that nobody wrote shows."""
        model, ops, device = self.build(), ReferenceOps(), torch.device("cpu")
        pool = KVPool(ops, model.config, num_pages, PAGE_SIZE, torch.float32, device, poison=True)
        info = WorkerInfo(
            256, VOCAB, num_pages, PAGE_SIZE, 0, pool.num_bytes, "float32", "cpu", "reference", (EOS,),
            diffusion=self.diffusion, num_parameters=0,
        )  # fmt: skip
        sequences = make_sequences(16, 256, num_pages, PAGE_SIZE)
        grammars = GrammarCompiler(None, VOCAB, (EOS,))
        attention = AttentionProbe(model, ops, MASK, device)
        return Worker(model, ops, pool, sequences, grammars, info, 16, 256, device, learnt=learnt, attention=attention)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float64 [L, V]: the row that answers for each position, every row seeing every other; mask id excluded."""
        logits = dense(self.config, self.tensors, tokens)
        logits[:, MASK] = -math.inf
        return torch.cat((logits[:1], logits[:-1])) if self.shift else logits


def dense(config: dict[str, Any], tensors: dict[str, Tensor], tokens: Sequence[int]) -> Tensor:
    """Raw logits, float64 [L, V], of a bidirectional forward over `tokens`: Llama, or Qwen3 with its norms of heads."""
    size, length = config["head_dim"], len(tokens)
    angles = torch.outer(torch.arange(length).double(), 1e4 ** -(torch.arange(0, size, 2).double() / size))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def take(name: str) -> Tensor:
        return tensors[name].double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * take(name)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x = take("model.embed_tokens.weight")[torch.tensor(tokens)]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = ((h @ take(f"{at}.self_attn.{n}_proj.weight").T).view(length, -1, size) for n in "qkv")
        if config["model_type"] == "qwen3":
            q, k = norm(q, f"{at}.self_attn.q_norm.weight"), norm(k, f"{at}.self_attn.k_norm.weight")
        group = q.shape[1] // k.shape[1]
        q, k, v = turn(q), turn(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weights = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
        x = x + mixed @ take(f"{at}.self_attn.o_proj.weight").T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = h @ take(f"{at}.mlp.gate_proj.weight").T, h @ take(f"{at}.mlp.up_proj.weight").T
        x = x + (torch.nn.functional.silu(gate) * up) @ take(f"{at}.mlp.down_proj.weight").T
    return norm(x, "model.norm.weight") @ take("lm_head.weight").T


Choice = Callable[[dict[int, Tensor], int, int], list[int]]
"""({masked position: its probabilities}, step of the block, masks at its start) -> positions to fix."""


def confidence(probs: Tensor) -> float:
    return float(probs.max())


def entropy(probs: Tensor) -> float:
    return -float((probs[probs > 0] * probs[probs > 0].log()).sum())


def margin(probs: Tensor) -> float:
    best = probs.topk(2).values
    return float(best[0] - best[1])


def surest(score: Callable[[Tensor], float], rows: dict[int, Tensor], count: int) -> list[int]:
    return sorted(rows, key=lambda p: (-score(rows[p]), p))[:count]


def oracle(tiny: Tiny, asked: Request, choose: Choice) -> tuple[list[int], int]:
    """All tokens of the canvas and the number of forwards: a dense forward over everything for each step."""
    decoding = asked.decoding
    assert decoding is not None
    size = decoding.block_size or SIZE
    length = decoding.gen_length or -(-asked.max_tokens // size) * size
    start = len(asked.prompt)
    canvas, forwards = [*asked.prompt, *[MASK] * length], 0
    for lo in range(start, start + length, size):
        step = 0
        while any(token == MASK for token in canvas[lo : lo + size]):
            logits = tiny.logits(canvas)
            rows = {p: logits[p].softmax(0) for p in range(lo, lo + size) if canvas[p] == MASK}
            for position in choose(rows, step, size):
                canvas[position] = int(rows[position].argmax())
            step, forwards = step + 1, forwards + 1
    return canvas[start:], forwards


@dataclass
class Told:
    """What became of one request."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    forwards: int = 0
    rows: int = 0
    reason: str | None = None


class CanvasDriver:
    """Every request runs in every step. twice: each step is run again, and must give the same."""

    def __init__(self, tiny: Tiny, twice: bool = False, learnt: Filter | None = None) -> None:
        self.tiny, self.worker, self.twice = tiny, tiny.worker(learnt=learnt), twice
        self.step = self.next_id = 0
        self.released: list[int] = []

    def run(self, requests: Sequence[Request], preempt: Callable[[int], Sequence[int]] = lambda step: ()) -> list[Told]:
        """preempt: numbers of the requests that lose their pages before a step."""
        seqs = [sequence.Sequence(r, (0, i), 0.0, [*r.prompt, *r.output]) for i, r in enumerate(requests)]
        for seq in seqs:
            seq.decoding = FullDiffusion(seq, 256, self.tiny.diffusion)
        told = [Told(request) for request in requests]
        free, owned = list(range(self.worker.info.num_pages)), dict[int, list[int]]()
        alive = set(range(len(seqs)))
        while alive:
            self.step += 1
            for number in set(preempt(self.step)) & alive:
                if seqs[number].seq_id:
                    self.released.append(seqs[number].seq_id)
                    free += owned.pop(number)
                    seqs[number].seq_id = 0
                    seqs[number].decoding.restart()
            admitted, pages = [], []
            for number in sorted(alive):
                seq = seqs[number]
                if seq.seq_id == 0:
                    self.next_id += 1
                    seq.seq_id = self.next_id
                    owned[number] = [free.pop(0) for _ in range(-(-seq.decoding.reach // PAGE_SIZE))]
                    admitted.append(Admission(seq.seq_id, seq.request, tuple(seq.tokens)))
                    pages.append((seq.seq_id, tuple(owned[number])))
            order = sorted(alive)
            spans = tuple(seqs[number].decoding.next_span(1) for number in order)
            plan = StepPlan(self.step, spans, tuple(admitted), tuple(pages), tuple(self.released))
            self.released = []
            outcomes = self.worker.run(plan).outcomes
            if self.twice:
                assert self.worker.run(plan).outcomes == outcomes, "a step that is run again gives something else"
            for number, span, outcome in zip(order, spans, outcomes, strict=True):
                self._take(seqs[number], told[number], span, outcome)
                if seqs[number].finish_reason is not None:
                    alive.discard(number)
                    self.released.append(seqs[number].seq_id)
                    free += owned.pop(number)
        return told

    @staticmethod
    def _take(seq: sequence.Sequence, told: Told, span: Span, outcome: Outcome) -> None:
        assert outcome.error is None, outcome.error
        news = seq.decoding.absorb(span, outcome)
        told.tokens += news.tokens
        told.logprobs += news.logprobs
        told.spans.append(span)
        told.outcomes.append(outcome)
        if news.decoding is not None:
            told.forwards += news.decoding.forwards
            told.rows += news.decoding.rows
        told.reason = seq.finish_reason


def request(
    policy: str = "low_confidence",
    cache: str = "none",
    values: dict[str, float] | None = None,
    prompt: int = 7,
    max_tokens: int = 12,
    planner: str | None = None,
    stopper: str | None = None,
    selector: str | None = None,
    seed: int = 5,
    temperature: float = 0.0,
    stop_ids: tuple[int, ...] = (),
    **settings: Any,
) -> Request:
    parts = {"cache": cache, "planner": planner, "stopper": stopper, "selector": selector}
    chosen = {part: name for part, name in parts.items() if name is not None}
    decoding = make_diffusion(policy, Topology.BIDIRECTIONAL, chosen, values, **settings)
    sampling = Sampling(temperature=temperature, seed=seed, logprobs=0)
    tokens = tuple(3 + (7 * i + 5 * prompt) % (VOCAB - 4) for i in range(prompt))
    return Request(f"{policy}-{cache}-{seed}", tokens, max_tokens, sampling, stop_ids, decoding=decoding)


def again(asked: Request, number: int, **changes: Any) -> Request:
    return replace(asked, id=f"{asked.id}-{number}", **changes)
