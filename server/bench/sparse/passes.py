"""Texts through a checkpoint, its layers looked at: the queries and keys that calibration and recall are made of.

Legend of shapes as in kernels/ops.py: T tokens, Q query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps
from server.bench.client import BenchError
from server.models.loading import load_model
from server.models.observed import ObservedLayers
from server.models.registry import Model

PAGE_SIZE = 64
SeeLayer = Callable[[int, Tensor, Tensor], None]
"""Is given a layer's index, q [T, Q, D] and k [T, K, D] of a whole text, after norm and rotation."""


class Reader:
    """A model in float32, one text of at most `max_len` tokens at a time.

    Raises BenchError for a model whose rows do not see all earlier tokens.
    """

    def __init__(self, model: Model, ops: ReferenceOps, max_len: int) -> None:
        config = self.config = model.config
        if not config.is_causal or any(window is not None for window in config.windows):
            raise BenchError("sparse attention is for models whose tokens see all earlier ones, without windows")
        self.max_len = max_len
        self._pages = -(-max_len // PAGE_SIZE)
        shape = (self._pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, torch.float32, torch.device("cpu"))
        self._kv = [ops.allocate_kv(*shape) for _ in range(config.num_layers)]
        self._see: SeeLayer | None = None
        self._layer = 0
        self._model = model.through(ObservedLayers(ops, self._seen))

    @classmethod
    def open(cls, folder: Path, max_len: int) -> Reader:
        """Of a checkpoint. Raises BenchError if it cannot be read."""
        ops = ReferenceOps()
        try:
            model = load_model(folder, ops, torch.float32, torch.device("cpu"), max_model_len=max_len)
        except (ValueError, OSError) as problem:
            raise BenchError(str(problem)) from problem
        return cls(model, ops, max_len)

    def _seen(self, q_TQD: Tensor, k_TKD: Tensor, scale: float) -> None:
        assert self._see is not None
        self._see(self._layer, q_TQD, k_TKD)
        self._layer += 1

    def read(self, tokens: Sequence[int], see: SeeLayer) -> None:
        """One forward over `tokens`, at most `max_len`, as a prompt; `see` is called for every layer in order."""
        length = len(tokens)
        places = torch.arange(length)
        rows = AttentionRows(
            page_table=torch.arange(self._pages, dtype=torch.int32).unsqueeze(0),
            row_seq=torch.zeros(length, dtype=torch.int32),
            positions=places.int(),
            visible=places.int() + 1,
            slots=places,
            span_starts=torch.tensor([0, length], dtype=torch.int32),
        )
        self._see, self._layer = see, 0
        with torch.inference_mode():
            self._model.forward(torch.tensor(tokens), rows, self._kv)


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
