"""Whose noise drafts take: the target's own under coupled verification, else noise that nothing has looked at."""

from __future__ import annotations

import torch

from kernels.reference import ReferenceOps, gumbel_noise
from scheduler.types import Request, Sampling
from server.worker.drafters.drawing import draw, draw_apart
from server.worker.process_logits import JudgedRow
from server.worker.recipe import make_recipe
from server.worker.verification import draft_stream

RECIPE = make_recipe(Request("r", (0,), 8, Sampling(seed=3, sample_index=2)), ())


def noise(position: int, stream: int) -> torch.Tensor:
    return gumbel_noise(50, torch.tensor([3]), torch.tensor([2]), torch.tensor([position]), stream=stream)[0]


def test_coupled_drafts_take_the_noise_of_their_output_position() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [JudgedRow(RECIPE, (0,), position) for position in (4, 5, 9)]
    want = [int((logits[row] + noise(position, 0)).argmax()) for row, position in enumerate((4, 5, 9))]
    assert draw(ReferenceOps(), logits, rows).tolist() == want


def test_drafts_apart_are_keyed_by_where_their_span_begins_and_how_deep_they_stand() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    places = [(4, 0), (5, 1), (7, 3), (5, 0)]  # the last: the same output position as the second, one step later
    rows = [JudgedRow(RECIPE, (0,), position) for position, _ in places]
    got = draw_apart(ReferenceOps(), logits, rows, [depth for _, depth in places]).tolist()
    want = [noise(position - depth, draft_stream(depth)) for position, depth in places]
    assert got == [int((logits[row] + each).argmax()) for row, each in enumerate(want)]
    assert not torch.equal(want[1], want[3]), "a later step never meets noise that an earlier one has looked at"
