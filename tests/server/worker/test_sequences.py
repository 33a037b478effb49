"""Plans applied to the worker's memory: twice is once, and every slot comes back."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from scheduler.types import Admission, Request, Span, StepPlan
from server.worker.recipe import make_recipe
from server.worker.sequences import SequenceState, SequenceTable, TokenCounts


def make_state(admission: Admission, slot: int, step: int) -> SequenceState:
    recipe = make_recipe(admission.request, ())
    return SequenceState(admission.request, recipe, slot, list(admission.tokens), step)


def admission(seq_id: int) -> Admission:
    return Admission(seq_id, Request(str(seq_id), (1, 2, 3), 5), (1, 2, 3))


def test_applying_a_plan_twice_appends_its_pages_once() -> None:
    table = SequenceTable(4, 8, 100, 4)
    plan = StepPlan(1, (), (admission(7),), ((7, (5, 6)),))
    table.apply(plan, make_state)
    table.apply(plan, make_state)
    table.apply(StepPlan(2, (), (), ((7, (9,)),)), make_state)
    table.apply(StepPlan(2, (), (), ((7, (9,)),)), make_state)
    assert table[7].num_pages == 3
    assert table.page_table[table[7].slot, :3].tolist() == [5, 6, 9]


def test_released_sequences_give_their_slots_back_and_are_forgotten() -> None:
    table = SequenceTable(2, 4, 100, 4)
    for step in range(10):
        ids = (2 * step, 2 * step + 1)
        released = (ids[0] - 2, ids[1] - 2)
        table.apply(StepPlan(step, (), tuple(map(admission, ids)), released=released), make_state)
        assert len(table) == 2
        assert {table[seq_id].slot for seq_id in ids} == {0, 1}
        assert len(table.page_table) == 2
    with pytest.raises(ValueError, match="sequence 3, which was never admitted or is released"):
        table[3]


def test_the_table_grows_when_more_are_admitted_and_keeps_what_it_had() -> None:
    table = SequenceTable(1, 4, 100, 4)
    for seq_id in range(5):
        table.apply(StepPlan(seq_id, (), (admission(seq_id),), ((seq_id, (10 + seq_id,)),)), make_state)
    assert len({table[seq_id].slot for seq_id in range(5)}) == 5
    assert [int(table.page_table[table[seq_id].slot, 0]) for seq_id in range(5)] == [10, 11, 12, 13, 14]


def test_impossible_pages_and_second_admissions_are_refused() -> None:
    table = SequenceTable(2, 2, 10, 4)
    table.apply(StepPlan(0, (), (admission(1),)), make_state)
    with pytest.raises(ValueError, match="would have 3 pages; the longest sequence has 2"):
        table.apply(StepPlan(1, (), (), ((1, (1, 2, 3)),)), make_state)
    with pytest.raises(ValueError, match="pool has pages 0 to 9"):
        table.apply(StepPlan(2, (), (), ((1, (10,)),)), make_state)
    with pytest.raises(ValueError, match="admitted again"):
        table.apply(StepPlan(3, (), (admission(1),)), make_state)


def test_a_span_with_a_gap_before_it_is_refused() -> None:
    state = make_state(admission(1), 0, 0)
    state.put(Span(1, (4,), 3, 4))
    assert state.history == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="starts at 9, but only 4 tokens are known"):
        state.put(Span(1, (4,), 9, 10))


@pytest.mark.parametrize("with_prompt", [False, True])
def test_counts_kept_token_by_token_equal_counts_from_scratch(with_prompt: bool) -> None:
    rng = random.Random(0)
    prompt = rng.choices(range(500), k=80)
    counts = TokenCounts(prompt, with_prompt)
    history = list(prompt)
    for _ in range(300):
        history.append(rng.randrange(500))
        counts.catch_up(history)
        counts.catch_up(history)
    wanted = Counter(history[80:])
    found = dict(zip(*(array.tolist() for array in counts.after()), strict=True))
    assert {token: count for token, count in found.items() if count} == wanted
    assert set(found) == set(wanted) | (set(prompt) if with_prompt else set())


def test_what_drafts_were_drawn_from_is_filed_by_the_span_that_verifies_them() -> None:
    state = make_state(Admission(1, Request("a", (1, 2, 3), 9), (1, 2, 3)), 0, 1)
    q = [torch.full((1, 4), float(i)) for i in range(4)]

    def offer(history: list[int], offered: torch.Tensor | None) -> dict[int, torch.Tensor]:
        state.history, state.draft_q = history, offered
        state.keep_draft_q()
        assert state.draft_q is None
        return state.draft_q_at

    assert offer([1, 2, 3, 4], q[0]) == {3: q[0]}
    assert offer([1, 2, 3, 4, 5, 6], q[1]) == {3: q[0], 5: q[1]}
    assert offer([1, 2, 3, 4, 5, 6], q[2]) == {3: q[0], 5: q[2]}, "the step of position 3 may run again"
    assert offer([1, 2, 3, 4, 5, 6], None) == {3: q[0]}, "it offered drafts that were not drawn this time"
    assert offer([1, 2, 3, 4, 5, 6], q[1]) == {3: q[0], 5: q[1]}
    assert offer([1, 2, 3, 4, 5, 6, 7], q[3]) == {5: q[1], 6: q[3]}
