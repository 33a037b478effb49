"""What the tests of denoising share: a tiny model that denoises, requests, and plain statistics of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from scheduler.policies import make_diffusion
from scheduler.types import Admission, DiffusionModel, EosRule, Request, Sampling, Span, StepPlan, Topology
from tests.server.worker.tiny_model import HEAD_DIM, HEADS, KV_HEADS, TinyModel

VOCAB, MASK, SIZE = 40, 39, 4
BLOCKS = DiffusionModel(MASK, SIZE)
SHIFTED = DiffusionModel(MASK, SIZE, shift=1)
CANVAS = DiffusionModel(MASK, SIZE, Topology.BIDIRECTIONAL)


def sharp_model(seed: int = 1) -> TinyModel:
    """Texts of many different tokens and confidences from 0.1 to 1, so that rules and thresholds make a difference."""
    model = TinyModel(VOCAB, seed, sharpness=6.0)
    num_scores = (HEADS + KV_HEADS) * HEAD_DIM
    model.qkv = [torch.cat((2 * weight[:num_scores], weight[num_scores:])) for weight in model.qkv]
    model.out = [4 * weight for weight in model.out]
    return model


def prompt_of(name: str, length: int) -> tuple[int, ...]:
    return tuple(3 + (7 * i + len(name) + ord(name[-1])) % (VOCAB - 4) for i in range(length))


def causal(name: str, length: int = 11, max_tokens: int = 9, **sampling: object) -> Request:
    return Request(name, prompt_of(name, length), max_tokens, Sampling(**{"temperature": 0.0, **sampling}))  # type: ignore[arg-type]


def request(
    name: str,
    policy: str,
    values: Mapping[str, float] | None = None,
    length: int = 11,
    max_tokens: int = 13,
    *,
    parts: Mapping[str, str] | None = None,
    steps: int | None = None,
    filtered: bool = False,
    eos: EosRule = EosRule.FREE,
    delimiters: tuple[int, ...] = (),
    canvas: int | None = None,
    stop_ids: tuple[int, ...] = (),
    **sampling: object,
) -> Request:
    """A greedy request that denoises. canvas: tokens of its canvas, for a bidirectional one."""
    topology = Topology.BLOCK_CAUSAL if canvas is None else Topology.BIDIRECTIONAL
    decoding = make_diffusion(
        policy,
        topology,
        parts,
        values,
        steps=steps,
        filtered=filtered,
        eos=eos,
        delimiters=delimiters,
        gen_length=canvas,
    )
    chosen = Sampling(**{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return Request(name, prompt_of(name, length), canvas or max_tokens, chosen, stop_ids, decoding=decoding)


def plan_of(asked: Request, tokens: Sequence[int], span: Span) -> StepPlan:
    """A first step: the request with these tokens is admitted as sequence 1 and brings the span."""
    admitted = (Admission(1, asked, tuple(tokens)),)
    return StepPlan(1, (span._replace(seq_id=1),), admitted, ((1, (0, 1, 2, 3)),))
