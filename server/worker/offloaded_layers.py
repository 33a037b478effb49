"""A decoder whose middle layers keep K and V in host memory: keys are chosen a layer ahead and copied behind its MLP.

The rule (Yang et al., "Post-Training Sparse Attention with Double Sparsity" (2024), section on offloading): in a layer
that lies on the host, a sparse row chooses by a predicted query. What is approximated is the choice alone; attention to
what was chosen is exact, with the layer's own query, keys and values. The predicted query is W_q of the layer applied
to its norm of the residual stream as it is before the MLP of the layer before: so only that MLP's change is missed.

Departures: the paper predicts from the stream before the whole layer and copies into one of two buffers while that
layer runs. Here the buffer is one, of a layer's size under the pool's own page ids, and it is free when attention of
the layer before is done; what is left to hide the copy behind, the MLP, is most of a layer's time, and the prediction
is closer.

A row's choice depends on its position alone, whether it is decoded, verified among drafts or computed again as a part
of a chunk: the query is always the predicted one, and what a row chooses among are the keys before its last LAST_KEYS.
Where some of those are of the step itself (chunks of more rows than that), the choice waits until they are written.

A layer with experts is run on its own, so its keys are sent for when it is its turn, and waited for.

Rows that read all their keys (prompts, dense requests) have whole pages copied, in every layer and step anew.
Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers, composed_mlp_block
from kernels.hosted import Fetches, Pages, StepKeys
from kernels.ops import AttentionRows, Ops
from kernels.sparse import SparseLayer
from server.models.registry import Model
from server.worker.offload import CudaStream, NoStream, OffloadPlan, SharedBuffer


class FetchingOps(Ops, Fetches, Protocol):
    """A back end that can do both."""


class KeyBuffer(Protocol):
    """Where attention of a layer on the host reads, and how its keys come and go: one layer at a time, in this
    order."""

    def pages(self, own: Pages) -> Pages:
        """What attention of the layer with these pages of its own reads and writes."""
        ...

    def begin(self, own: Pages, places_M: Tensor) -> None:
        """Start to copy these keys of the layer's own pages; all that the layer before had here is lost."""
        ...

    def arrive(self) -> None:
        """What was begun is there, for all that is launched from now on."""
        ...

    def keep(self, own: Pages, places_M: Tensor) -> None:
        """Copy back what the layer has just written."""
        ...

    def fetch(self, own: Pages, places_M: Tensor) -> None:
        """Copy more keys, before anything that is launched from now on."""
        ...


class _Step:
    """What one step's layers share. written: places of the keys that its rows write."""

    def __init__(self, rows: AttentionRows, num_kv: int, page_size: int) -> None:
        assert rows.host is not None
        self.rows = rows
        keys, device = StepKeys(rows, rows.host, page_size), rows.slots.device
        self.has_choice, self.is_early = keys.has_choice, keys.is_early
        self.dense = keys.places(num_kv, page_size, device)
        heads = torch.arange(num_kv, device=device)
        pages, offsets = rows.slots // page_size, rows.slots % page_size
        self.written = ((pages.unsqueeze(1) * num_kv + heads) * page_size + offsets.unsqueeze(1)).flatten()


def offloaded(model: Model, ops: Ops, plan: OffloadPlan, buffer: Pages | None) -> Model:
    """The model over a pool whose `buffer` this is."""
    assert isinstance(ops, Fetches)
    assert buffer is not None
    side = CudaStream() if buffer[0].is_cuda else NoStream()
    return model.through(OffloadedLayers(ops, plan.hosted, SharedBuffer(ops, buffer, side)))


def _metadata(block: AttentionBlock, rows: AttentionRows) -> SparseLayer:
    layer = block.sparse(rows)
    assert layer is not None
    return layer


class OffloadedLayers:
    """`model.through(OffloadedLayers(ops, hosted, buffer))`. One forward at a time.

    hosted  numbers of the layers on the host: consecutive, and never the first
    """

    def __init__(self, ops: FetchingOps, hosted: Collection[int], buffer: KeyBuffer) -> None:
        self._ops, self._hosted, self._buffer = ops, hosted, buffer
        self._step: _Step | None = None
        self._stream_TH: Tensor | None = None
        """The residual stream behind the attention that ran last."""

    def dense_layers(self, x_TH: Tensor, run: DenseLayers, kv: Sequence[Pages], rows: AttentionRows) -> Tensor:
        """`blocks.composed_dense_layers`, keys of the layers on the host on their way meanwhile."""
        ops, blocks = self._ops, [attention for attention, _ in run.layers]
        query = self._begin(blocks[0], kv[0], rows)
        for at, ((attention, mlp), own) in enumerate(zip(run.layers, kv, strict=True)):
            x_TH = self._attention(x_TH, attention, own, rows, query)
            if at + 1 < len(blocks):
                query = self._begin(blocks[at + 1], kv[at + 1], rows)
            x_TH = composed_mlp_block(ops, x_TH, mlp)
        return x_TH

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor:
        """Of a layer with experts: chosen by the same query, but its keys are sent for now, behind nothing."""
        own = (k_pages, v_pages)
        return self._attention(x_TH, block, own, rows, self._begin(block, own, rows))

    def _attention(
        self, x_TH: Tensor, block: AttentionBlock, own: Pages, rows: AttentionRows, query: Tensor | None
    ) -> Tensor:
        if block.layer in self._hosted:
            x_TH = self._hosted_attention(x_TH, block, own, self._step_of(rows, own), query)
        else:
            x_TH = self._ops.attention_block(x_TH, block, *own, rows)
        self._stream_TH = x_TH
        return x_TH

    def _step_of(self, rows: AttentionRows, own: Pages) -> _Step:
        if self._step is None or self._step.rows is not rows:
            self._step = _Step(rows, *own[0].shape[1:3])
        return self._step

    def _begin(self, block: AttentionBlock, own: Pages, rows: AttentionRows) -> Tensor | None:
        """Send for the keys of a layer on the host. Returns its predicted query where the choice must wait."""
        if block.layer not in self._hosted:
            return None
        step = self._step_of(rows, own)
        if not step.has_choice:
            self._buffer.begin(own, step.dense)
            return None
        assert self._stream_TH is not None
        ops, b, pages = self._ops, block, self._buffer.pages(own)
        # Its keys and values go where the layer's own will be written over them, before any is read.
        query_TQD = self._rotated(self._stream_TH, b, pages, step.rows, None)
        if not step.is_early:
            self._buffer.begin(own, step.dense)
            return query_TQD
        chosen = ops.choose_keys(query_TQD, pages[0], step.rows, b.scale, _metadata(b, step.rows))
        self._buffer.begin(own, torch.cat((step.dense, chosen)))
        return None

    def _rotated(
        self, x_TH: Tensor, b: AttentionBlock, pages: Pages, rows: AttentionRows, layer: SparseLayer | None
    ) -> Tensor:
        """q of the layer for this residual stream; k and v are in `pages` afterwards."""
        ops = self._ops
        return ops.qkv_rope_write(
            ops.linear(ops.rms_norm(x_TH, b.norm_H, b.eps), b.qkv),
            b.num_q,
            b.num_kv,
            b.head_dim,
            b.cos_sin_MR,
            b.q_norm_D,
            b.k_norm_D,
            b.eps,
            *pages,
            rows,
            layer=layer,
        )

    def _hosted_attention(
        self, x_TH: Tensor, block: AttentionBlock, own: Pages, step: _Step, query: Tensor | None
    ) -> Tensor:
        ops, b, rows, layer = self._ops, block, step.rows, _metadata(block, step.rows)
        pages = self._buffer.pages(own)
        self._buffer.arrive()
        q_TQD = self._rotated(x_TH, b, pages, rows, layer)
        self._buffer.keep(own, step.written)
        if query is not None:
            self._buffer.fetch(own, ops.choose_keys(query, pages[0], rows, b.scale, layer))
        out_TQD = ops.paged_attention(q_TQD, *pages, rows, b.scale, b.window, b.form, layer=layer)
        return ops.linear(out_TQD.flatten(1), b.out, x_TH)
