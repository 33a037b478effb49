"""The engine as the bench sees it: prompts to continuations, with any attention, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from scheduler.attention import AttentionOffer
from scheduler.types import Attention
from server.bench.client import BenchError
from server.engine.config import AttentionConfig, LabelDtype, SpeculationConfig
from server.engine.offline import Engine, GenerationError
from server.models.locate import resolve_model

NO_LIMIT = 1 << 40


class RetrievalEngine:
    """A model that sparse methods are offered for. Speculation is off: a draft looked up in the prompt is the answer.

    calibration  its files, as `server/worker/attention_calibration.py` has them
    Raises BenchError if the model cannot be loaded, or a file does not fit it.
    """

    offers: tuple[AttentionOffer, ...]

    def __init__(
        self,
        model: str,
        methods: Sequence[str],
        calibration: Sequence[Path],
        num_channels: int | None,
        label_dtype: LabelDtype,
        max_len: int,
    ) -> None:
        attention = AttentionConfig(
            methods=tuple(methods),
            calibration=tuple(map(str, calibration)),
            num_channels=num_channels,
            label_dtype=label_dtype,
        )
        try:
            attention.check()
            self._engine = Engine(
                str(resolve_model(model)),
                max_model_len=max_len,
                max_queued_requests=NO_LIMIT,
                max_queued_tokens=NO_LIMIT,
                speculation=SpeculationConfig(mode="off"),
                attention=attention,
            )
        except (ValueError, OSError) as problem:
            raise BenchError(str(problem)) from problem
        self.offers = self._engine.info.attention

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._engine.close()

    def answer(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, attention: Attention | Literal["dense"]
    ) -> list[tuple[int, ...]]:
        try:
            found = self._engine.generate(prompts, max_tokens=num_tokens, stop_ids=(), attention=attention)
        except (GenerationError, ValueError) as problem:
            raise BenchError(str(problem)) from problem
        return [completion.tokens for completion in found]
