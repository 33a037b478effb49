"""Trees of drafts by a model: best first, a level of all sequences' trees in one forward.

A node's children are the best tokens by log q + G, q being the draft's distribution and G the target's own noise at
that position: the target picks the largest log p + G, so the ranking follows the noise and not only the model
(speculative reference, 2.2). At temperature 0 there is no noise. A node is expanded while it is among the `most`
likeliest; what is offered are the likeliest, which with falling chances along a path always hang together.
Source: Xiong et al., "DySpec" (2024), its layer-threshold variant; the coupled ranking is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import Ops
from kernels.philox import gumbel
from scheduler.types import MAX_TREE_NODES, Drafts
from server.worker.drafters.base import Want
from server.worker.drafters.drawing import draw
from server.worker.drafters.lane import LEAST_SURVIVAL, row_after
from server.worker.drafters.paged_forward import PagedForward, TreeFeed
from server.worker.process_logits import JudgedRow, process_logits
from server.worker.sampling import not_finite

MOST_NODES = MAX_TREE_NODES - 1
NUM_RANKED = 16
"""Likeliest tokens per node that are ranked besides the one that is drawn."""
NOT_TWICE = -1
NUM_CHILDREN = 4
LEAST_CHANCE = 0.02
"""Children less likely than this are not worth a row."""
MOST_EXPANDED = 8
"""Nodes of one sequence expanded per level."""


@dataclass(slots=True)
class Node:
    """path: tokens from the sequence's last token to this one. slot: where its key is, once it was fed, else -1."""

    path: tuple[int, ...]
    parent: int
    survival: float
    mask: int = 0
    slot: int = -1


@dataclass(slots=True)
class Tree:
    """One sequence's tree. most: nodes offered; most_depth: of any node; room: keys that fit behind its tokens."""

    want: Want
    most: int
    most_depth: int
    room: int
    nodes: list[Node] = field(default_factory=list)
    num_fed: int = 0

    def add(self, parent: int, tokens: Sequence[int], chances: Sequence[float]) -> None:
        path, survival = ((), 1.0) if parent < 0 else (self.nodes[parent].path, self.nodes[parent].survival)
        for token, chance in zip(tokens, chances, strict=True):
            self.nodes.append(Node((*path, token), parent, max(LEAST_SURVIVAL, survival * min(1.0, chance))))

    def best(self) -> list[int]:
        """The `most` likeliest nodes, likeliest first; of equals the earlier, so parents stand before children."""
        order = sorted(range(len(self.nodes)), key=lambda index: -self.nodes[index].survival)
        return order[: self.most]

    def frontier(self, depth: int) -> list[int]:
        """Nodes of this depth to expand: they may have children among the offered."""
        if depth >= self.most_depth:
            return []
        ends = self.want.state.request.stop_ids
        found = [i for i in self.best() if len(self.nodes[i].path) == depth and self.nodes[i].path[-1] not in ends]
        return found[: min(MOST_EXPANDED, self.room - self.num_fed, MOST_NODES - self.num_fed)]

    def feed(self, frontier: Sequence[int]) -> TreeFeed:
        """The rows of some nodes, whose parents have been fed; they get the next slots."""
        start = len(self.want.tokens)
        for index in frontier:
            node = self.nodes[index]
            node.slot = self.num_fed
            self.num_fed += 1
            node.mask = 1 << node.slot | (self.nodes[node.parent].mask if node.parent >= 0 else 0)
        nodes = [self.nodes[index] for index in frontier]
        return TreeFeed(
            self.want.seq_id,
            self.want.state,
            tuple(node.path[-1] for node in nodes),
            start + nodes[0].slot,
            start,
            tuple(start + len(node.path) - 1 for node in nodes),
            tuple(node.mask for node in nodes),
        )

    def offer(self, source: str) -> Drafts | None:
        chosen = self.best()
        if not chosen:
            return None
        places = {-1: -1} | {index: place for place, index in enumerate(chosen)}
        nodes = [self.nodes[index] for index in chosen]
        parents = tuple(places[node.parent] for node in nodes)
        is_chain = parents == tuple(range(-1, len(nodes) - 1))
        tokens = tuple(node.path[-1] for node in nodes)
        return Drafts(tokens, tuple(node.survival for node in nodes), source, () if is_chain else parents)


def grow(ops: Ops, trees: Sequence[Tree], hidden_JH: Tensor, forward: PagedForward, rows_at_once: int) -> None:
    """Grow all trees from the states of their sequences' last tokens, one forward per level."""
    heads = [(tree, -1) for tree in trees]
    depth = 0
    while heads:
        for start in range(0, len(heads), rows_at_once):
            part = slice(start, start + rows_at_once)
            _branch(ops, heads[part], forward.logits(hidden_JH[part]))
        depth += 1
        frontiers = [(tree, frontier) for tree in trees if (frontier := tree.frontier(depth))]
        heads = [(tree, index) for tree, frontier in frontiers for index in frontier]
        if heads:
            hidden_JH = forward.run_trees([tree.feed(frontier) for tree, frontier in frontiers])


def _branch(ops: Ops, heads: Sequence[tuple[Tree, int]], logits_JV: Tensor) -> None:
    """Add the children of each head: (tree, node), -1 = the sequence's last token."""
    bad = set(not_finite(logits_JV))
    for index in bad:
        logits_JV[index].zero_()
    paths = [tree.nodes[index].path if index >= 0 else () for tree, index in heads]
    rows = [row_after(tree.want, path) for (tree, _), path in zip(heads, paths, strict=True)]
    bad |= process_logits(ops, logits_JV, rows).keys()
    # The noise may lift any token to the top: the very best is drawn from all, the next from the likeliest.
    drawn_J1 = draw(ops, logits_JV, rows).unsqueeze(1)
    logq_JV = torch.log_softmax(logits_JV, dim=1)
    best = logq_JV.topk(min(NUM_RANKED, logits_JV.shape[1]), dim=1)
    ids_JR = torch.cat((drawn_J1, best.indices.masked_fill(best.indices == drawn_J1, NOT_TWICE)), dim=1).cpu().numpy()
    logq_JR = torch.cat((logq_JV.gather(1, drawn_J1), best.values), dim=1).cpu().numpy()
    for place, (tree, index) in enumerate(heads):
        if place not in bad:
            kept = ids_JR[place] != NOT_TWICE
            tokens, chances = ranked(rows[place], ids_JR[place][kept], logq_JR[place][kept])
            tree.add(index, tokens, chances)


def ranked(row: JudgedRow, ids_R: NDArray[np.int64], logq_R: NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """The children of a node, best first, and the chance that each is the target's token.

    ids_R, logq_R  the drawn token, then the likeliest others; banned ones have -inf
    """
    keys_R = logq_R.astype(np.float64)
    if not row.recipe.is_greedy:
        keys_R += gumbel(row.recipe.seed, row.recipe.sampling.sample_index, row.num_output, ids_R)
    order = np.argsort(-keys_R, kind="stable")[:NUM_CHILDREN]
    weights_R = np.exp(keys_R - keys_R.max())
    chances = (weights_R / weights_R.sum())[order]
    kept = chances >= LEAST_CHANCE
    return ids_R[order][kept].tolist(), chances[kept].tolist()
