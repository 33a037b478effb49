"""The rejection modes as they run (float32, keyed noise, several steps): their texts follow the target's law.

Each request writes three tokens of a four-token Markov chain in as many steps as its drafts leave; the 64 texts are
compared with their probabilities by a chi-square test. Negative controls show that the same test finds what the rules
forbid. Seeds are fixed: a failure is a change of the code, not chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.reference import ReferenceOps
from scheduler.types import Request, Sampling, VerifyMode
from server.worker.recipe import Recipe, make_recipe
from server.worker.verification import Judgement, draft_stream, verify_sampled

VOCAB, LENGTH, BATCH = 4, 3, 2000
FAILS_BELOW = 1e-4
# Row = the last token. A zero in each, so that a text can be impossible and a draft can be.
TARGET = torch.tensor(
    [[0.15, 0.34, 0.37, 0.14], [0.45, 0.27, 0.18, 0.1], [0.16, 0.44, 0.15, 0.25], [0.0, 0.68, 0.14, 0.18]]
)
DRAFTER = torch.tensor(
    [[0.12, 0.08, 0.5, 0.3], [0.38, 0.2, 0.08, 0.34], [0.72, 0.2, 0.02, 0.06], [0.36, 0.34, 0.0, 0.3]]
)


@pytest.fixture(scope="module")
def ops() -> Ops:
    return ReferenceOps() if find_compiler() is None else CpuOps(num_threads=2)


@dataclass(frozen=True)
class Way:
    """A shape of drafts, how they are drawn and how they are verified.

    drawn   "without" or "with" replacement among siblings, or "best": the likeliest of q, then the next
    noise   (node, draw, node's depth, output position of the span) -> (position, stream) of a node's children
    submit  which drawn drafts are submitted (a chain of one draft only)
    """

    mode: VerifyMode
    parents: tuple[int, ...]
    drawn: str = "without"
    with_q: bool = True
    in_drawn_order: bool = True
    noise: Callable[[int, int, int, int], tuple[int, int]] = lambda node, draw, _, start: (
        start,
        draft_stream(node, draw),
    )
    submit: Callable[[float], bool] = lambda _: True
    children: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        children: dict[int, list[int]] = {}
        for row, parent in enumerate(self.parents[1:], 1):
            children.setdefault(parent, []).append(row)
        object.__setattr__(self, "children", children)


CHAIN = (-1, 0, 1, 2)
TREE = (-1, 0, 0, 0, 1, 1, 2)
WAYS = {
    "chain, drawn": Way(VerifyMode.REJECTION, CHAIN),
    "chain, fixed": Way(VerifyMode.REJECTION, CHAIN, drawn="best", with_q=False),
    "chain, drawn but verified as fixed": Way(VerifyMode.REJECTION, CHAIN, with_q=False),
    "block, drawn": Way(VerifyMode.BLOCK, CHAIN),
    "block, fixed": Way(VerifyMode.BLOCK, CHAIN, drawn="best", with_q=False),
    "tree, fixed": Way(VerifyMode.REJECTION, TREE, drawn="best", with_q=False),
    "tree, without replacement": Way(VerifyMode.REJECTION, TREE),
    "tree, with replacement": Way(VerifyMode.REJECTION, TREE, drawn="with"),
}


def written(ops: Ops, way: Way, num: int) -> np.ndarray:
    """How often each text of three tokens was written, int64 [VOCAB] * LENGTH, by requests with seeds 0 to num - 1."""
    counts = np.zeros((VOCAB,) * LENGTH, dtype=np.int64)
    base = make_recipe(Request("r", (0,), 8, Sampling(temperature=1.0)), ())
    for first in range(0, num, BATCH):
        seeds = range(first, min(num, first + BATCH))
        recipes = [dataclasses.replace(base, seed=seed * 0x9E3779B97F4A7C15 % (1 << 63)) for seed in seeds]
        texts: list[list[int]] = [[] for _ in recipes]
        for start in range(LENGTH):
            due = [index for index, text in enumerate(texts) if len(text) == start]
            if due:
                for index, tokens in zip(
                    due, step(ops, way, start, [texts[i] for i in due], [recipes[i] for i in due]), strict=True
                ):
                    texts[index] += tokens
        np.add.at(counts, tuple(np.array([text[:LENGTH] for text in texts]).T), 1)
    return counts


def step(ops: Ops, way: Way, start: int, texts: list[list[int]], recipes: list[Recipe]) -> list[tuple[int, ...]]:
    """Draft and verify one span of each text; all texts have `start` tokens."""
    last = torch.tensor([text[-1] if text else 0 for text in texts])
    tokens = torch.empty(len(texts), len(way.parents), dtype=torch.int64)
    tokens[:, 0] = last
    depth = [0] * len(way.parents)
    for node, children in way.children.items():
        q = DRAFTER[tokens[:, node]]
        for draw, row in enumerate(children):
            depth[row] = depth[node] + 1
            if way.drawn == "best":
                tokens[:, row] = q.argmax(1)
            else:
                position, stream = way.noise(node, draw if way.drawn == "with" else 0, depth[node], start)
                tokens[:, row] = keyed(ops, q.log(), recipes, position, stream)
            if way.drawn != "with":
                q = q.scatter(1, tokens[:, row, None], 0.0)
        if not way.in_drawn_order:
            tokens[:, children] = tokens[:, children[::-1]]
    p = TARGET[tokens].log()
    q_of = DRAFTER[tokens[:, list(way.parents[1:])]]
    judgements, rows = [], []
    for index, recipe in enumerate(recipes):
        drafts = tokens[index, 1:].tolist()
        if not way.submit(float(q_of[index, 0, drafts[0]])):
            judgements.append(Judgement((), way.mode, recipe, start))
            rows.append(p[index, :1])
            continue
        parents = () if way.parents == CHAIN else way.parents
        q_MV = q_of[index] if way.with_q else None
        judgements.append(Judgement(drafts, way.mode, recipe, start, parents, q_MV, way.drawn == "with"))
        rows.append(p[index])
    return [verdict.tokens for verdict in verify_sampled(ops, torch.cat(rows), judgements)]


def keyed(ops: Ops, logits_NV: Tensor, recipes: list[Recipe], position: int, stream: int) -> Tensor:
    seeds = torch.tensor([recipe.seed for recipe in recipes])
    zeros = torch.zeros_like(seeds)
    return ops.sample(logits_NV, seeds, zeros, zeros + position, zeros.bool(), stream)


def chance(counts: np.ndarray) -> float:
    """Probability of counts at least this far from the target's law (Pearson's chi-square)."""
    target = TARGET.double().numpy()
    law = target[0][:, None, None] * target[:, :, None] * target[None, :, :]
    possible = law > 0
    if counts[~possible].any():
        return 0.0
    expected = law[possible] * counts.sum()
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))


@pytest.mark.parametrize(
    "num", [pytest.param(6_000), pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["sample", "full"]
)
@pytest.mark.parametrize("way", WAYS)
def test_the_texts_of_a_rejection_mode_follow_the_targets_law(ops: Ops, way: str, num: int) -> None:
    assert chance(written(ops, WAYS[way], num)) > FAILS_BELOW


FORBIDDEN = {
    "a draft is dropped for its own small probability": Way(VerifyMode.REJECTION, (-1, 0), submit=lambda q: q >= 0.3),
    "the best of q is verified as if drawn": Way(VerifyMode.REJECTION, CHAIN, drawn="best"),
    "siblings in the order opposite to how they were drawn": Way(
        VerifyMode.REJECTION, (-1, 0, 0, 0), in_drawn_order=False
    ),
    "drafts take the noise of the target's own draws": Way(
        VerifyMode.REJECTION, CHAIN, noise=lambda node, draw, depth, start: (start + depth, 2)
    ),
    "a block's drafts take noise that an earlier block has looked at": Way(
        VerifyMode.BLOCK, CHAIN, noise=lambda node, draw, depth, start: (start + depth, 3)
    ),
}


@pytest.mark.parametrize("way", FORBIDDEN)
def test_the_same_test_finds_what_drafters_must_not_do(ops: Ops, way: str) -> None:
    assert chance(written(ops, FORBIDDEN[way], 4_000)) < FAILS_BELOW


def test_the_law_of_the_target_itself_passes_and_a_shift_of_two_percent_does_not() -> None:
    generator = np.random.default_rng(0)
    target = TARGET.double().numpy()
    law = (target[0][:, None, None] * target[:, :, None] * target[None, :, :]).ravel()
    drawn = generator.multinomial(1_000_000, law).reshape((VOCAB,) * LENGTH)
    assert chance(drawn) > FAILS_BELOW
    law[0] += 0.02
    assert chance(generator.multinomial(1_000_000, law / law.sum()).reshape(drawn.shape)) < FAILS_BELOW
