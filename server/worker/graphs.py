"""Forwards of few rows, captured once for each of some sizes and replayed: a step then costs one launch, not hundreds.

Kinds of span are data, so what tells captured forwards apart is the number of rows alone: a step runs on the smallest
size that holds it, filled up with rows that see nothing and whose keys go to a page of nobody. Larger steps, and
forwards of other models, run as they are. A captured forward reads and writes memory that stays: the inputs, its plan
(`kernels.ops.FixedPlans`), the KV pages, the hidden states. All inputs of a step, the plan included, are one copy.

Source: CUDA graphs over padded sizes as in vLLM and nano-vllm. Departure: one set of graphs for decodes, prompts,
drafts and denoising together, instead of graphs of uniform decodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kernels.ops import AttentionRows, FixedPlans, StepRows
from server.worker.batch import Batch, HostBatch, place
from server.worker.forward import ForwardModel
from server.worker.kv_pool import KVPool
from server.worker.transfer import Layout, Transfer

MOST_TOKENS = 512
"""Rows of the largest captured step unless the user says: beyond, the kernels' work hides the launches."""

Number = TypeVar("Number", np.int32, np.int64)


class Capture(Protocol):
    """The primitive: a CUDA graph, or in tests what stands for one."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` does to tensors; what comes back does it again, on the same memory."""
        ...


def graph_sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows that are captured, ascending, none above `most`: steps of 8 up to 256, then of 16.

    A step is filled up with at most 7, then 15, rows, which cost a few percent of it.
    """
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, most + 1, 16)]
    return tuple(size for size in sizes if size <= most)


NOBODY = HostBatch(
    np.zeros(0, np.int64),
    np.zeros((0, 1), np.int32),
    np.zeros(0, np.int64),
    StepRows(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(1, np.int32)),
    [0],
)
"""A step without rows, to be filled up."""


def fill_up(host: HostBatch, size: int, dump_page: int, page_size: int) -> HostBatch:
    """The step with rows up to `size`: a span of rows that see nothing (`visible` 0) and write to `dump_page`.

    `span_starts` has size + 2 entries (empty spans at the end), the page table one row more. Raises ValueError if the
    step has more rows.
    """
    num_rows, num_spans = len(host.tokens), len(host.page_table)
    if num_rows > size:
        raise ValueError(f"a step of {num_rows} rows does not fit in {size}")
    rows = host.rows

    def filled(values: NDArray[Number], value: int = 0) -> NDArray[Number]:
        out = np.full(size, value, values.dtype)
        out[:num_rows] = values
        return out

    span_starts = np.full(size + 2, size, np.int32)
    span_starts[: num_spans + 1] = rows.span_starts
    table = np.full((num_spans + 1, host.page_table.shape[1]), dump_page, np.int32)
    table[:num_spans] = host.page_table
    return HostBatch(
        filled(host.tokens),
        table,
        filled(host.slots, dump_page * page_size),
        StepRows(
            filled(rows.row_seq, num_spans),
            filled(rows.positions),
            filled(rows.visible),
            span_starts,
            None if rows.tree is None else filled(rows.tree),
            None if rows.tree_starts is None else filled(rows.tree_starts),
        ),
        host.first_rows,
    )


@dataclass(frozen=True)
class _Graph:
    """One size: where its inputs lie in the buffer that all sizes share, and what runs its forward."""

    size: int
    layout: Layout
    batch: Batch
    replay: Callable[[], None]


class GraphedForward:
    """`ForwardModel` over another one. Its own steps come to it by `place`; a caller runs one before placing the next.

    plans      of the back end, if it plans its attention on the host
    max_pages  most columns of a page table
    pool       its `spare_page` takes what rows that fill up write
    """

    def __init__(
        self,
        model: ForwardModel,
        plans: FixedPlans | None,
        pool: KVPool,
        max_pages: int,
        sizes: Sequence[int],
        capture: Capture,
        transfer: Transfer,
    ) -> None:
        self._model, self._plans, self._pool = model, plans, pool
        self._max_pages, self._sizes = max_pages, sorted(sizes)
        self._capture, self._transfer, self._device = capture, transfer, pool.device
        self._graphs: dict[int, _Graph] = {}
        self._of_rows: dict[int, _Graph] = {}
        self._num_rows = 0

    def capture(self, progress: bool = False, after_each: Callable[[], None] = lambda: None) -> None:
        """Capture all sizes, the largest first, which takes the memory that the others share. Writes to nobody's page.

        progress  show a bar
        """
        with torch.inference_mode():
            # Once as it is: the back end then knows which kinds of layer there are to plan for.
            first = place(self._filled(NOBODY, self._sizes[-1]), self._device, self._pool.metadata)
            hidden_TH = self._model.forward(first.tokens, first.rows, self._pool.layers)
            self._hidden_TH = torch.empty_like(hidden_TH)
            self._allocate_inputs()
            for size in tqdm(self._sizes[::-1], desc="CUDA graphs", disable=not progress, leave=False):
                graph = self._make(size)
                self._graphs[size] = self._of_rows[id(graph.batch.rows)] = graph
                after_each()

    def place(self, host: HostBatch) -> Batch:
        """The step's tensors: those of a captured size where one holds it, valid until the next call."""
        num_rows = len(host.tokens)
        at = bisect_left(self._sizes, num_rows)
        graph = self._graphs.get(self._sizes[at]) if at < len(self._sizes) else None
        if graph is None:
            return place(host, self._device, self._pool.metadata)
        self._num_rows = num_rows
        self._send(graph, self._filled(host, graph.size))
        return Batch(graph.batch.tokens, graph.batch.rows, host.first_rows)

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states of the step's own rows. Of a captured step, valid until the next one runs."""
        graph = self._of_rows.get(id(rows))
        if graph is None:
            return self._model.forward(tokens_T, rows, kv)
        graph.replay()
        return self._hidden_TH[: self._num_rows]

    def logits(self, hidden_JH: Tensor) -> Tensor:
        return self._model.logits(hidden_JH)

    def _filled(self, host: HostBatch, size: int) -> HostBatch:
        return fill_up(host, size, self._pool.spare_page, self._pool.page_size)

    def _layout(self, size: int) -> Layout:
        """tokens, slots, tree; row_seq, positions, visible, tree_starts, span_starts; the plan."""
        int64, int32 = np.dtype(np.int64), np.dtype(np.int32)
        num_words = 0 if self._plans is None else self._plans.plan_words(size)
        fields = [((size,), int64)] * 3 + [((size,), int32)] * 4 + [((size + 2,), int32), ((num_words,), int32)]
        return Layout(fields)

    def _allocate_inputs(self) -> None:
        """One buffer for the inputs of any size: a step is over before the next one's arrive, on the same stream."""
        most_rows = self._sizes[-1] + 1
        num_bytes = self._layout(self._sizes[-1]).num_bytes + 4 * most_rows * self._max_pages
        self._inputs = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        # Its rows lie apart: the distance is part of what is captured, the width of a step's table is not.
        self._page_table = torch.zeros((most_rows, self._max_pages), dtype=torch.int32, device=self._device)

    def _make(self, size: int) -> _Graph:
        layout = self._layout(size)
        tokens, slots, tree, row_seq, positions, visible, tree_starts, span_starts, words = layout.on_device(
            self._inputs
        )
        rows = AttentionRows(
            self._page_table, row_seq, positions, visible, slots, span_starts, tree, tree_starts,
            layers=self._pool.metadata,
        )  # fmt: skip
        if self._plans is not None:
            self._plans.fix_plans(rows, words)

        def run() -> None:
            self._hidden_TH[:size].copy_(self._model.forward(tokens, rows, self._pool.layers))

        graph = _Graph(size, layout, Batch(tokens, rows, []), run)
        self._send(graph, self._filled(NOBODY, size))
        # What is compiled or allocated for good must be so before the capture.
        run()
        return _Graph(size, layout, graph.batch, self._capture(run))

    def _send(self, graph: _Graph, host: HostBatch) -> None:
        """Everything in one copy; the page table is spread over its rows on the device."""
        rows, num_bytes = host.rows, graph.layout.num_bytes
        staged = self._transfer.stage(num_bytes + host.page_table.nbytes)
        buffer = staged.numpy()
        *arrays, words = graph.layout.on_host(buffer)
        for part, values in zip(
            arrays,
            (host.tokens, host.slots, rows.tree, rows.row_seq, rows.positions, rows.visible, rows.tree_starts,
             rows.span_starts),
            strict=True,
        ):  # fmt: skip
            part[...] = 0 if values is None else values
        if self._plans is not None:
            self._plans.write_plans(rows, words)
        buffer[num_bytes:] = host.page_table.reshape(-1).view(np.uint8)
        self._transfer.send(staged, self._inputs)
        num_spans, width = host.page_table.shape
        table = self._inputs[num_bytes : len(staged)].view(torch.int32).view(num_spans, width)
        self._page_table[:num_spans, :width].copy_(table)
