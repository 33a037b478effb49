"""Drafts of a model that runs token by token, all wanting sequences together: one row per sequence and step.

A draft is drawn under the request's own rules (process_logits) with the target's own noise, so that both draw the same
token wherever their distributions agree (speculative reference, 2.2); greedily at temperature 0. Under the rejection
rules it is drawn with noise of its own, and the distribution it came from is kept for verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import Drafts
from server.worker.drafters.base import Want
from server.worker.drafters.draft_tree import MOST_NODES, Tree, grow
from server.worker.drafters.drawing import draw, draw_apart
from server.worker.drafters.lane import Lane
from server.worker.drafters.paged_forward import Feed, PagedForward
from server.worker.drafters.stopping import StopRule
from server.worker.process_logits import JudgedRow, process_logits
from server.worker.sampling import not_finite
from server.worker.sequences import SequenceState

ROWS_AT_ONCE_BYTES = 64 << 20
"""Most bytes of float32 logits held at once."""


class Reach(Protocol):
    """How far the drafting model's keys reach in a sequence (draft_kv.py)."""

    def num_valid(self, seq_id: int, tokens: Sequence[int]) -> int: ...
    def feed_sizes(self, lags: Sequence[int]) -> list[int]: ...
    def fed(self, seq_id: int, num_valid: int) -> None: ...
    def drafted(self, seq_id: int, tokens: Sequence[int]) -> None: ...
    def release(self, seq_id: int) -> None: ...


class SequentialDrafter:
    """`Drafter` over any model that shares the sequences' pages."""

    is_sequential = True
    needs_top = 0

    def __init__(
        self,
        name: str,
        forward: PagedForward,
        reach: Reach,
        stop: StopRule,
        ops: Ops,
        max_len: int,
        vocab_size: int,
        num_bytes: int,
    ) -> None:
        """max_len: positions the drafting model has. num_bytes: weights and KV of its own."""
        self.name, self.num_bytes = name, num_bytes
        self._forward, self._reach, self._stop, self._ops, self._max_len = forward, reach, stop, ops, max_len
        self._rows_at_once = max(1, ROWS_AT_ONCE_BYTES // (4 * vocab_size))

    def serves(self, state: SequenceState) -> bool:
        return True

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        if depth < 1:
            return [None] * len(wants)
        lanes = [self._lane(want, depth) for want in wants]
        trees = self._draft([lane for lane in lanes if lane is not None], depth)
        for lane in lanes:
            if lane is not None and lane.q:
                lane.want.state.draft_q = torch.stack(lane.q)
        return [None if lane is None else trees.get(id(lane), lane).offer(self.name) for lane in lanes]

    def release(self, seq_id: int, state: SequenceState) -> None:
        self._reach.release(seq_id)

    def _lane(self, want: Want, depth: int) -> Lane | None:
        """None where not even the last token can be fed: no room in its pages, or the model's positions end."""
        room = self._room(want)
        # The last draft is not fed.
        most = min(want.num_drafts, depth, room + 1)
        return Lane(want, most) if room >= 0 and most > 0 and want.state.failure is None else None

    def _room(self, want: Want) -> int:
        """Keys of drafts that fit behind the sequence's tokens."""
        return min(self._forward.capacity(want.state), self._max_len) - len(want.tokens)

    def _draft(self, lanes: Sequence[Lane], depth: int) -> dict[int, Tree]:
        """Fill the lanes; what branches is in the trees of the answer, by id of the lane."""
        active, hidden_JH = self._catch_up(lanes)
        trees = {id(lane): self._tree(lane.want, depth) for lane in active if lane.want.tree}
        if trees:
            at = [index for index, lane in enumerate(active) if lane.want.tree]
            grow(self._ops, list(trees.values()), _rows(hidden_JH, at), self._forward, self._rows_at_once)
            at = [index for index, lane in enumerate(active) if not lane.want.tree]
            active, hidden_JH = [active[index] for index in at], _rows(hidden_JH, at)
        while active:
            self._extend(active, hidden_JH)
            active = [lane for lane in active if not lane.is_over]
            if not active:
                break
            hidden_JH = self._forward.run([_last_draft(lane) for lane in active])
        for lane in lanes:
            if lane.drafts:
                self._reach.drafted(lane.want.seq_id, lane.drafts[:-1])
        return trees

    def _tree(self, want: Want, depth: int) -> Tree:
        most_depth = min(depth, self._max_len - len(want.tokens) + 1)
        return Tree(want, min(want.num_drafts, MOST_NODES), most_depth, self._room(want))

    def _catch_up(self, lanes: Sequence[Lane]) -> tuple[list[Lane], Tensor]:
        """Feed what the keys lag behind; the lanes that are up to date now, and the states of their last tokens."""
        starts = [self._reach.num_valid(lane.want.seq_id, lane.want.tokens) for lane in lanes]
        lags = [len(lane.want.tokens) - start for lane, start in zip(lanes, starts, strict=True)]
        sizes = self._reach.feed_sizes(lags)
        fed = [index for index, size in enumerate(sizes) if size > 0]
        if not fed:
            return [], torch.empty(0)
        hidden_JH = self._forward.run([_feed(lanes[i].want, starts[i], sizes[i]) for i in fed])
        for i in fed:
            self._reach.fed(lanes[i].want.seq_id, starts[i] + sizes[i])
        ready = [place for place, i in enumerate(fed) if sizes[i] == lags[i]]
        return [lanes[fed[place]] for place in ready], _rows(hidden_JH, ready)

    def _extend(self, lanes: Sequence[Lane], hidden_JH: Tensor) -> None:
        """Draw one draft for each lane from its state."""
        for start in range(0, len(lanes), self._rows_at_once):
            part = slice(start, start + self._rows_at_once)
            self._take(lanes[part], hidden_JH[part], self._forward.logits(hidden_JH[part]))

    def _take(self, lanes: Sequence[Lane], hidden_JH: Tensor, logits_JV: Tensor) -> None:
        bad = set(not_finite(logits_JV))
        for index in bad:
            logits_JV[index].zero_()
        rows = [lane.row() for lane in lanes]
        bad |= process_logits(self._ops, logits_JV, rows).keys()
        for index in bad:
            logits_JV[index].zero_()
        probs_JV = torch.softmax(logits_JV, dim=1)
        is_greedy = [row.recipe.is_greedy for row in rows]
        chances = self._stop.estimate(hidden_JH, probs_JV.amax(dim=1), is_greedy)
        tokens = self._drawn(lanes, logits_JV, rows)
        for index, lane in enumerate(lanes):
            # Where offers must not tell what was drawn, a lane at its end (an empty mask behind EOS) draws any token.
            if index in bad and not lane.keeps_q:
                lane.is_over = True
            else:
                q_V = probs_JV[index].clone() if lane.keeps_q else None
                lane.take(tokens[index], chances[index], q_V, self._stop.stop_below)

    def _drawn(self, lanes: Sequence[Lane], logits_JV: Tensor, rows: Sequence[JudgedRow]) -> list[int]:
        tokens = [0] * len(lanes)
        for keeps_q in (False, True):
            at = [index for index, lane in enumerate(lanes) if lane.keeps_q == keeps_q]
            if not at:
                continue
            part, chosen = _rows(logits_JV, at), [rows[i] for i in at]
            if keeps_q:
                drawn = draw_apart(self._ops, part, chosen, [len(lanes[i].drafts) for i in at])
            else:
                drawn = draw(self._ops, part, chosen)
            for index, token in zip(at, drawn.tolist(), strict=True):
                tokens[index] = token
        return tokens


def _rows(hidden_JH: Tensor, at: list[int]) -> Tensor:
    if len(at) == hidden_JH.shape[0]:
        return hidden_JH
    return hidden_JH[torch.tensor(at, device=hidden_JH.device, dtype=torch.int64)]


def _feed(want: Want, start: int, size: int) -> Feed:
    return Feed(want.seq_id, want.state, want.tokens[start : start + size], start)


def _last_draft(lane: Lane) -> Feed:
    want = lane.want
    return Feed(want.seq_id, want.state, lane.drafts[-1:], len(want.tokens) + len(lane.drafts) - 1)
