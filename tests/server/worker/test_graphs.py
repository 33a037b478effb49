"""Captured forwards without a GPU: what stands for a CUDA graph runs the recorded forward again, on the same memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows, StepRows
from kernels.reference import ReferenceOps
from scheduler.types import DiffusionModel
from server.models.loading import random_model
from server.worker.batch import HostBatch, place
from server.worker.forward import ForwardModel
from server.worker.gpu_checks import replay_check
from server.worker.graphs import GraphedForward, fill_up, graph_sizes
from server.worker.kv_pool import KVPool
from server.worker.random_steps import Space, random_batches, random_plans
from server.worker.transfer import Transfer, upload
from server.worker.worker import Worker
from tests.server.worker.tiny_model import TinyModel, make_worker

CPU = torch.device("cpu")
VOCAB, PAGE, PAGES, MASK = 50, 8, 200, 3
SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 64)


class Recorded:
    """Stands for CUDA graphs: a replay is the recorded function once more."""

    def __init__(self) -> None:
        self.num_runs = self.num_captured = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1

        def replay() -> None:
            self.num_runs += 1
            run()

        return replay


class Watched:
    """A model that notes where the tensors of its forwards lie."""

    def __init__(self, model: ForwardModel) -> None:
        self.model = model
        self.places: list[tuple[int, ...]] = []

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        read = [tokens_T, rows.page_table, rows.row_seq, rows.positions, rows.visible, rows.slots, rows.span_starts]
        read += [tensor for tensor in (rows.tree, rows.tree_starts) if tensor is not None]
        self.places.append(tuple(tensor.data_ptr() for tensor in read))
        return self.model.forward(tokens_T, rows, kv)

    def logits(self, hidden_JH: Tensor) -> Tensor:
        return self.model.logits(hidden_JH)


class Poisoning(Transfer):
    """Counts copies, and ruins what was staged once it is sent."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.num_copies = 0

    def send(self, staged: Tensor, target: Tensor) -> None:
        super().send(staged, target)
        self.num_copies += 1
        staged.fill_(0x5A)


class Planner:
    """`FixedPlans` of a back end that needs none: its plan is a checksum of the rows, which a forward can look at."""

    def __init__(self) -> None:
        self.words: dict[int, Tensor] = {}

    def plan_words(self, num_rows: int) -> int:
        return num_rows + 1

    def fix_plans(self, rows: AttentionRows, words: Tensor) -> None:
        self.words[len(rows.visible)] = words

    def write_plans(self, host: StepRows, words: NDArray[np.int32]) -> None:
        words[:-1], words[-1] = host.visible, host.visible.sum()


def ruin(host: HostBatch) -> None:
    """What a captured forward would read if it read anything of the step but its copy."""
    host.tokens[:], host.page_table[:], host.slots[:] = 1 << 40, 1 << 30, 1 << 40
    for values in (host.rows.row_seq, host.rows.positions, host.rows.visible, host.rows.span_starts):
        values[:] = -7


def batches(seed: int, count: int, most_rows: int) -> list[HostBatch]:
    """Random steps of all kinds of span, denoised blocks included."""
    space = Space(PAGES, PAGE, 256, VOCAB, DiffusionModel(MASK, 4))
    return list(random_batches(random.Random(seed), space, count, most_rows))


def make_pool(model: TinyModel) -> KVPool:
    """Keys of every page are known; nobody's page is NaN, which no row of a step may ever read."""
    pool = KVPool(model.ops, model.config, PAGES, PAGE, torch.float32, CPU, has_spare=True)
    generator = torch.Generator().manual_seed(1)
    for layer in pool.layers:
        for pages in layer:
            pages[:PAGES] = torch.randn(pages[:PAGES].shape, generator=generator)
            pages[PAGES:] = float("nan")
    return pool


def copied(pool: KVPool) -> list[tuple[Tensor, Tensor]]:
    return [(k.clone(), v.clone()) for k, v in pool.layers]


def same_pages(a: Sequence[tuple[Tensor, Tensor]], b: Sequence[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip((page for layer in a for page in layer), (page for layer in b for page in layer), strict=True)
    return all(torch.equal(one[:PAGES], other[:PAGES]) for one, other in pairs)


def graphed(model: ForwardModel, pool: KVPool, transfer: Transfer, capture: Recorded) -> GraphedForward:
    graphs = GraphedForward(model, Planner(), pool, 33, SIZES, capture, transfer)
    graphs.capture()
    return graphs


@pytest.mark.parametrize("seed", range(3))
def test_a_replayed_step_is_the_step_run_as_it_is_bit_for_bit(seed: int) -> None:
    model = TinyModel(VOCAB)
    pool, capture, transfer = make_pool(model), Recorded(), Poisoning()
    before = copied(pool)
    watched = Watched(model)
    graphs = graphed(watched, pool, transfer, capture)
    assert same_pages(before, pool.layers), "capturing wrote to a page of somebody"
    static = set(watched.places[1:])  # the first forward, before any capture, is of memory of its own
    assert all(len(places) == 9 for places in static)
    for host in batches(seed, 25, 64):
        kv, num_copies = copied(pool), transfer.num_copies
        with torch.inference_mode():
            size = next(size for size in SIZES if size >= len(host.tokens))
            eager = place(fill_up(host, size, PAGES, PAGE), CPU)
            expected = model.forward(eager.tokens, eager.rows, kv)[: len(host.tokens)].clone()
            batch = graphs.place(host)
            first_rows = list(batch.first_rows)
            ruin(host)
            actual = graphs.forward(batch.tokens, batch.rows, pool.layers)
        assert torch.equal(actual, expected)
        assert not actual.isnan().any()
        assert same_pages(kv, pool.layers)
        assert transfer.num_copies == num_copies + 1, "a step's inputs are one copy"
        assert first_rows[-1] == len(actual)
    assert set(watched.places[1:]) == static, "a replay read other memory than was captured"
    assert capture.num_runs == 25


def test_a_step_filled_up_is_the_step_of_its_own_rows_alone() -> None:
    """On a back end whose rows do not depend on how many there are: bit for bit, keys and values too."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that rows that fill a step up change no bit of the others")
    ops = CpuOps(num_threads=1)
    shape = "hidden=64,layers=2,heads=4,kv_heads=2,mlp=128,vocab=50"
    model = random_model(shape, ops, torch.float32, CPU, 0, 512)
    pool, other = (KVPool(ops, model.config, PAGES, PAGE, torch.float32, CPU, has_spare=True) for _ in range(2))
    # What is inside a page is the back end's secret, and so is how much of its memory a page's shape shows.
    memories = [[pages.untyped_storage() for layer in one.layers for pages in layer] for one in (pool, other)]
    for mine, its in zip(*memories, strict=True):
        mine.copy_(torch.randn(len(mine) // 4).untyped_storage())
        its.copy_(mine)
    graphs = graphed(model, pool, Poisoning(), Recorded())
    for host in batches(9, 25, 64):
        with torch.inference_mode():
            alone = place(host, CPU)
            expected = model.forward(alone.tokens, alone.rows, other.layers)
            batch = graphs.place(host)
            assert torch.equal(graphs.forward(batch.tokens, batch.rows, pool.layers), expected)


def test_the_plan_arrives_with_the_rows_it_is_of() -> None:
    model, planner = TinyModel(VOCAB), Planner()
    graphs = GraphedForward(model, planner, make_pool(model), 33, SIZES, Recorded(), Poisoning())
    graphs.capture()
    for host in batches(4, 8, 40):
        visible = host.rows.visible.tolist()
        with torch.inference_mode():
            batch = graphs.place(host)
        size = len(batch.tokens)
        assert planner.words[size].tolist() == [*visible, *[0] * (size - len(visible)), sum(visible)]
        assert batch.rows.visible.tolist() == [*visible, *[0] * (size - len(visible))]


def test_steps_above_the_largest_size_and_before_the_capture_run_as_they_are() -> None:
    model, capture = TinyModel(VOCAB), Recorded()
    pool = make_pool(model)
    graphs = GraphedForward(model, None, pool, 33, (1, 2, 4), capture, Poisoning())
    large, small = (next(host for host in batches(2, 60, most) if len(host.tokens) == most) for most in (9, 3))
    for is_captured in (False, True):
        if is_captured:
            graphs.capture()
        for host in (large, small):
            with torch.inference_mode():
                batch = graphs.place(host)
                hidden = graphs.forward(batch.tokens, batch.rows, pool.layers)
            assert len(hidden) == len(host.tokens)
    assert capture.num_runs == 1


def test_sizes_are_fine_where_steps_are_small() -> None:
    assert graph_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert graph_sizes(3) == (1, 2)
    sizes = graph_sizes(512)
    assert (sizes[0], sizes[-1], len(sizes)) == (1, 512, 51)
    assert max(b - a for a, b in pairwise(sizes)) == 16
    with pytest.raises(ValueError, match="a step of 5 rows does not fit in 4"):
        fill_up(next(host for host in batches(2, 60, 9) if len(host.tokens) == 5), 4, 0, PAGE)


def test_arrays_arrive_as_they_were_in_one_copy() -> None:
    generator, transfer = np.random.default_rng(0), Poisoning()
    arrays = [
        generator.integers(-9, 9, shape).astype(dtype)
        for shape, dtype in [
            ((3,), np.int64),
            ((5, 7), np.int32),
            ((0,), np.int32),
            ((1,), np.int64),
            ((33,), np.int32),
        ]
    ]
    arrived = upload(arrays, CPU, transfer)
    assert transfer.num_copies == 1
    for tensor, array in zip(arrived, arrays, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.storage_offset() * tensor.element_size() % 64 == 0


def test_the_outcomes_of_a_worker_with_captured_steps_are_those_without() -> None:
    """All kinds of span, sampling rules and logprobs; steps above and below the captured sizes, run in two halves."""

    def worker(graphed: Callable[[KVPool], GraphedForward] | None) -> Worker:
        made = make_worker(model, PAGE, PAGES, diffusion=DiffusionModel(MASK, 4), graphed=graphed)
        for layer in made._pool.layers:
            for pages in layer:
                pages[:] = torch.randn(pages.shape, generator=torch.Generator().manual_seed(2))
        return made

    model, capture = TinyModel(VOCAB), Recorded()
    alone = worker(None)
    captured = worker(lambda pool: graphed(model, pool, Poisoning(), capture))
    captured.is_asynchronous = True
    for plan in random_plans(random.Random(7), alone.info, 20, 100):
        num_runs = capture.num_runs
        finish = captured.launch(plan)
        assert capture.num_runs - num_runs == (0 < plan.num_tokens <= SIZES[-1]), "the forward waits for the end"
        expected, actual = alone.run(plan).outcomes, finish().outcomes
        for one, other in zip(expected, actual, strict=True):
            assert (one.tokens, one.error, one.denoised) == (other.tokens, other.error, other.denoised)
            assert one.error is None
            logprobs = [entry.logprob for entry in one.logprobs]
            assert [entry.logprob for entry in other.logprobs] == pytest.approx(logprobs, abs=1e-4)
    assert 5 < capture.num_runs < 20


def test_the_gpu_check_of_replays_finds_a_replay_that_is_another_step() -> None:
    """The check itself, on a CPU: right for a faithful replay, wrong for one that skips a step."""

    class Lazy(Recorded):
        def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
            replay = super().__call__(run)
            return lambda: replay() if self.num_runs < 3 else None

    ops = ReferenceOps()
    model = random_model("hidden=32,layers=1,heads=2,mlp=32,vocab=50,max_len=512", ops, torch.float32, CPU)
    for capture, is_right in ((Recorded(), True), (Lazy(), False)):
        what, found = replay_check(model, ops, torch.float32, CPU, capture, 5)
        assert found == is_right, what
        assert "5 replayed steps" in what
