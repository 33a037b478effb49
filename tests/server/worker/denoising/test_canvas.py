"""Bidirectional requests, all rows a step or only some, and steps that mix every kind of span."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows
from scheduler.types import MASK_ALL, DiffusionModel, Read, Request, StepPlan, Topology
from tests.server.worker.denoising.block_driver import BlockDriver, Running
from tests.server.worker.denoising.oracle import fill_canvas, rules
from tests.server.worker.denoising.worlds import BLOCKS, CANVAS, MASK, SIZE, causal, plan_of, request, sharp_model
from tests.server.worker.tiny_model import TinyModel, make_worker

NEXT = DiffusionModel(MASK, SIZE, Topology.BIDIRECTIONAL, shift=1)


class NextRow(TinyModel):
    """A model whose row i gives what row i + 1 of the given model gives: it is shifted by one.

    Only for spans in which all rows stand one behind the other; a span's last row answers for nothing.
    """

    def __init__(self, model: TinyModel) -> None:
        self.__dict__.update(model.__dict__)

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return super().forward(tokens_T, rows, kv).roll(-1, 0)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return sharp_model()


def run(model: TinyModel, asked: Request, diffusion: DiffusionModel = CANVAS, twice: bool = True) -> Running:
    (one,) = BlockDriver(make_worker(model, diffusion=diffusion), twice=twice).generate([asked])
    assert one.error is None
    return one


@pytest.mark.parametrize("rule", rules())
@pytest.mark.parametrize("length", [1, 5, 11])
def test_a_canvas_equals_the_plain_loop(model: TinyModel, rule: str, length: int) -> None:
    policy, values, steps, plain = rules()[rule]
    asked = request(rule, policy, values, length, canvas=12, steps=steps, logprobs=0)
    one, expected = run(model, asked), fill_canvas(model, asked, SIZE, MASK, plain, dual=False, shift=0)
    assert one.output == expected.tokens
    assert one.fixed == expected.fixed
    assert one.logprobs == {at: pytest.approx(value, abs=1e-4) for at, value in expected.logprobs.items()}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("rule", ["low_confidence", "threshold", "static"])
def test_rows_that_a_step_leaves_out_are_seen_as_earlier_steps_left_them(
    model: TinyModel, rule: str, shift: int
) -> None:
    """The dual cache, position for position; with a shift the row before the block comes along."""
    policy, values, steps, plain = rules()[rule]
    asked = request(rule, policy, values, 10, canvas=12, steps=steps, parts={"cache": "dual"}, logprobs=0)
    one = run(model, asked, NEXT if shift else CANVAS)
    expected = fill_canvas(model, asked, SIZE, MASK, plain, dual=True, shift=shift)
    assert any(span.positions for span in one.spans)
    assert one.output == expected.tokens
    assert one.fixed == expected.fixed
    assert one.logprobs == {at: pytest.approx(value, abs=1e-4) for at, value in expected.logprobs.items()}
    exact = fill_canvas(model, asked, SIZE, MASK, plain, dual=False, shift=shift)
    assert exact.logprobs != expected.logprobs


@pytest.mark.parametrize("rule", ["low_confidence", "threshold", "all"])
def test_moving_the_head_by_one_row_changes_nothing_for_a_reader_that_knows(model: TinyModel, rule: str) -> None:
    policy, values, steps, _ = rules()[rule]
    asked = request(rule, policy, values, 7, canvas=12, steps=steps, logprobs=0)
    plain, moved = run(model, asked), run(NextRow(model), asked, NEXT)
    assert moved.output == plain.output
    assert moved.logprobs == plain.logprobs
    assert [span.judged for span in moved.spans] == [tuple(at - 1 for at in span.judged) for span in plain.spans]


def test_after_a_step_of_all_rows_a_step_of_some_gives_the_same(model: TinyModel) -> None:
    """The identity of every cache: nothing has changed since, so the rows left out are what they would be."""
    asked = request("same", "threshold", {"threshold": 0.5}, 9, canvas=12, logprobs=3)
    worker = make_worker(model, diffusion=CANVAS)
    span = BlockDriver(make_worker(model, diffusion=CANVAS)).generate([asked])[0].spans[0]
    (full,) = worker.run(plan_of(asked, asked.prompt, span)).outcomes
    for at in [(9, 10, 11, 12), (4, 9, 10, 11, 12, 20), tuple(range(1, 21))]:
        judged = tuple(at.index(place) for place in range(9, 13))
        tokens = tuple(span.tokens[place] for place in at)
        some = span._replace(tokens=tokens, positions=at, judged=judged, start=at[0], seq_id=1)
        (partial,) = worker.run(StepPlan(2, (some,))).outcomes
        assert (partial.tokens, partial.denoised) == (full.tokens, full.denoised)
        for a, b in zip(partial.logprobs, full.logprobs, strict=True):
            assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-5)


def crowd() -> list[Request]:
    return [
        causal("ar", 13, 9),
        causal("warm", 6, 12, temperature=0.9, seed=4),
        request("bc", "threshold", {"threshold": 0.5}, 11, logprobs=0),
        request("hot", "low_confidence", {}, 5, temperature=1.1, seed=-9, sample_index=3, logprobs=0),
        request("ends", "auto", {"threshold": 0.4}, 16, temperature=0.7, seed=8, top_p=0.9, presence_penalty=0.5),
        request("edit", "llada2_edit", {"threshold": 0.3, "edit_threshold": 0.3}, 6),
        request("wino", "wino", {"wide": 0.2}, 9, logprobs=0),
        request("fb", "threshold", {"threshold": 0.5}, 7, canvas=12, logprobs=0),
        request("dual", "low_confidence", {}, 9, canvas=8, parts={"cache": "dual"}, temperature=0.8, seed=5),
        request("wide", "wino", {"wide": 0.2}, 6, canvas=12),
    ]


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_ragged_step_of_every_kind_gives_each_what_it_gives_alone(fused: bool, backend: str) -> None:
    model = sharp_model()
    if backend == "compiled":
        if find_compiler() is None:
            pytest.skip("no C++ compiler: shows that the compiled back end takes every mask of a step")
        model.ops = CpuOps(num_threads=2)  # type: ignore[assignment]
    together = BlockDriver(make_worker(model, num_pages=300, diffusion=BLOCKS), fused, chunk=8).generate(crowd())
    first_steps = {(span.read, span.mask_block) for one in together for span in one.spans[:2]}
    assert {read for read, _ in first_steps} == {Read.NOTHING, Read.SAMPLE, Read.DENOISE}
    assert {size for _, size in first_steps} == {1, SIZE, MASK_ALL}
    for asked, one in zip(crowd(), together, strict=True):
        (alone,) = BlockDriver(make_worker(model, diffusion=BLOCKS), fused, chunk=8, twice=True).generate([asked])
        assert one.error is None
        assert one.output == alone.output
        assert one.fixed == alone.fixed
        assert one.logprobs == {at: pytest.approx(value, abs=1e-5) for at, value in alone.logprobs.items()}


def test_the_compiled_back_end_gives_the_texts_of_the_reference(model: TinyModel) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that shadows, blocks and canvases are the same in both back ends")
    compiled = sharp_model()
    compiled.ops = CpuOps(num_threads=2)  # type: ignore[assignment]
    for asked in crowd():
        if asked.sampling.temperature == 0:
            texts = [
                BlockDriver(make_worker(one, diffusion=BLOCKS), fused=True).generate([asked])[0].output
                for one in (model, compiled)
            ]
            assert texts[0] == texts[1]


def test_scattered_rows_that_are_no_rows_of_a_canvas_are_refused(model: TinyModel) -> None:
    asked = request("bad", "threshold", {}, 9, canvas=8, parts={"cache": "dual"})
    one = run(model, asked)
    span = next(span for span in one.spans if span.positions)
    worker = make_worker(model, diffusion=CANVAS)
    for wrong, message in [
        (span._replace(positions=span.positions[:-1]), "at positions"),
        (span._replace(positions=span.positions[::-1]), "expected one for each, ascending"),
        (span._replace(mask_block=SIZE), "sees its whole canvas"),
        (span._replace(positions=tuple(at + 99 for at in span.positions)), "covers KV"),
    ]:
        with pytest.raises(ValueError, match=message):
            worker.run(plan_of(asked, asked.prompt, wrong._replace(read=Read.NOTHING, denoise=None)))
