"""Sinks, softcap and sink logits against float64, alone and together, with trees, windows and cuts everywhere."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kernels.blocks import AttentionForm
from kernels.reference import ReferenceOps
from kernels.triton.gpu_checks import TREE, Span, make_world, worst_error
from kernels.triton.ops import TritonOps
from tests.kernels.triton.worlds import poisoned

CPU = torch.device("cpu")
SPANS = [Span(150, 1), Span(40, 33), Span(90, 10, parents=TREE), Span(32, 16, 16), Span(3, 1)]
LOGITS = torch.tensor([-2.0, 0.0, 3.0, 9.0])


@pytest.mark.parametrize(
    ("form", "window", "page", "num_programs"),
    [
        (AttentionForm(sinks=4), 21, 16, 5),
        (AttentionForm(sinks=1), 1, 7, 2),
        (AttentionForm(sinks=4), None, 16, 3),
        (AttentionForm(softcap=3.0), None, 64, 4),
        (AttentionForm(sink_logits_Q=LOGITS), None, 16, 7),
        (AttentionForm(softcap=30.0, sinks=33, sink_logits_Q=LOGITS), 16, 32, 9),
    ],
)
def test_each_form_equals_its_definition(form: AttentionForm, window: int | None, page: int, num_programs: int) -> None:
    world = make_world(SPANS, 4, 2, 24, page, torch.float32, CPU)
    seen = form if window is not None else dataclasses.replace(form, sinks=0)
    args = (world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.4, window, form)
    with poisoned():
        actual = TritonOps(num_programs=num_programs).paged_attention(*args)
    for out in (actual, ReferenceOps().paged_attention(*args)):
        assert worst_error(world, out, 0.4, window, seen) <= 1


def test_keys_between_the_sinks_and_the_window_are_not_read() -> None:
    """Their pages are NaN and their entries of the page table name no page: any read would show."""
    world = make_world([Span(700, 1), Span(640, 3)], 2, 1, 16, 16, torch.float32, CPU)
    expected = TritonOps(num_programs=3).paged_attention(
        world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.3, 40, AttentionForm(sinks=5)
    )
    table = world.rows.page_table
    for index in (0, 1):
        gone = table[index, 1:36].clone()
        world.k_pages[gone.long()] = world.v_pages[gone.long()] = math.nan
        table[index, 1:36] = -(1 << 30)
    world.k_pages[table[:, 0].long(), :, 5:] = world.v_pages[table[:, 0].long(), :, 5:] = math.nan
    args = (world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.3, 40, AttentionForm(sinks=5))
    assert torch.equal(TritonOps(num_programs=3).paged_attention(*args), expected)


@pytest.mark.parametrize("wrong", [math.log2(math.e), 1 / math.log2(math.e)])
def test_mistake_16_a_softcap_in_the_wrong_base_is_seen(wrong: float) -> None:
    world = make_world([Span(70, 9)], 2, 1, 16, 16, torch.float32, CPU)
    for cap, is_right in ((5.0, True), (5.0 * wrong, False)):
        out = TritonOps(num_programs=2).paged_attention(
            world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.5, None, AttentionForm(softcap=cap)
        )
        assert (worst_error(world, out, 0.5, None, AttentionForm(softcap=5.0)) <= 1) == is_right


def test_forms_that_make_no_sense_are_refused() -> None:
    world = make_world([Span(9, 1)], 2, 1, 16, 16, torch.float32, CPU)
    for form in (AttentionForm(softcap=-1.0), AttentionForm(sinks=-1), AttentionForm(sink_logits_Q=torch.zeros(3))):
        with pytest.raises(ValueError, match="sink_logits must be one for each of 2 heads"):
            TritonOps().paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.5, 3, form)
