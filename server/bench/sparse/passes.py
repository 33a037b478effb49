"""Texts through a checkpoint: the queries, keys and values that calibration and recall are made of.

Legend of shapes as in kernels/ops.py: T tokens, Q query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.kv_format import read_pages
from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps
from server.bench.client import BenchError
from server.models.config import ModelConfig
from server.models.loading import load_model
from server.models.observed import ObservedLayers
from server.models.registry import Model

PAGE_SIZE = 64
SeeLayer = Callable[[int, Tensor, Tensor], None]
"""Is given a layer's index, q [T, Q, D] and k [T, K, D] of a whole text, after norm and rotation."""


class Texts:
    """A model over pages of its own, in float32, one text of at most `max_len` tokens at a time."""

    def __init__(self, config: ModelConfig, ops: ReferenceOps, max_len: int) -> None:
        self.config, self.max_len = config, max_len
        self._pages = -(-max_len // PAGE_SIZE)
        shape = (self._pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, torch.float32, torch.device("cpu"))
        self._kv = [ops.allocate_kv(*shape) for _ in range(config.num_layers)]

    def read(self, model: Model, tokens: Sequence[int]) -> None:
        """One forward over `tokens` as a prompt, each seeing what the model was trained to let it see."""
        length = len(tokens)
        places = torch.arange(length)
        rows = AttentionRows(
            page_table=torch.arange(self._pages, dtype=torch.int32).unsqueeze(0),
            row_seq=torch.zeros(length, dtype=torch.int32),
            positions=places.int(),
            visible=self._visible(places, length).int(),
            slots=places,
            span_starts=torch.tensor([0, length], dtype=torch.int32),
        )
        with torch.inference_mode():
            model.forward(torch.tensor(tokens), rows, self._kv)

    def _visible(self, places: Tensor, length: int) -> Tensor:
        config = self.config
        if config.bidirectional:
            return torch.full_like(places, length)
        block = 1 if config.is_causal or config.block_size is None else config.block_size
        return ((places // block + 1) * block).clamp_max(length)

    def stored(self, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each layer k and v [T, K, D] of the last text's `length` tokens, as its attention read them."""
        for k_pages, v_pages in self._kv:
            yield _in_order(k_pages, length), _in_order(v_pages, length)


def _in_order(pages: Tensor, length: int) -> Tensor:
    """[T, K, D] of plain pages, the first one first."""
    return read_pages(pages, None).transpose(1, 2).flatten(0, 1)[:length]


def open_model(folder: Path, max_len: int) -> tuple[Model, ReferenceOps]:
    """A checkpoint in float32 on the CPU. Raises BenchError if it cannot be read."""
    ops = ReferenceOps()
    try:
        return load_model(folder, ops, torch.float32, torch.device("cpu"), max_model_len=max_len), ops
    except (ValueError, OSError) as problem:
        raise BenchError(str(problem)) from problem


class Reader:
    """A model whose layers are looked at while it reads texts.

    Raises BenchError for a model whose rows do not see all earlier tokens.
    """

    def __init__(self, model: Model, ops: ReferenceOps, max_len: int) -> None:
        config = self.config = model.config
        if not config.is_causal or any(window is not None for window in config.windows):
            raise BenchError("sparse attention is for models whose tokens see all earlier ones, without windows")
        self.max_len = max_len
        self._texts = Texts(config, ops, max_len)
        self._see: SeeLayer | None = None
        self._layer = 0
        self._model = model.through(ObservedLayers(ops, self._seen))

    @classmethod
    def open(cls, folder: Path, max_len: int) -> Reader:
        """Of a checkpoint. Raises BenchError if it cannot be read."""
        return cls(*open_model(folder, max_len), max_len)

    def _seen(self, q_TQD: Tensor, k_TKD: Tensor, scale: float) -> None:
        assert self._see is not None
        self._see(self._layer, q_TQD, k_TKD)
        self._layer += 1

    def read(self, tokens: Sequence[int], see: SeeLayer) -> None:
        """One forward over `tokens`, at most `max_len`, as a prompt; `see` is called for every layer in order."""
        self._see, self._layer = see, 0
        self._texts.read(self._model, tokens)


def windows(texts: Iterable[Sequence[int]], length: int, num_tokens: int) -> Iterator[list[int]]:
    """Token ids of texts, joined and cut into windows of `length`, about `num_tokens` in all; a rest is left out."""
    held: list[int] = []
    count = 0
    for text in texts:
        held += text
        while len(held) >= length and count < num_tokens:
            yield held[:length]
            del held[:length]
            count += length
        if count >= num_tokens:
            return
