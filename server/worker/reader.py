"""The reader of a step's sampled and verified spans: which rows of them are judged, a bounded number of rows at a time.

Choosing and telling are two halves. What is chosen on the device can be read there by the next step, before the host
has seen it (`ahead.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from kernels.ops import Ops
from scheduler.types import Span
from server.worker.judged import Judged, in_parts, judge
from server.worker.sampling import Chosen, Reading, choose_tokens, read_chosen
from server.worker.sequences import SequenceState


class Part(NamedTuple):
    """Some spans whose tokens were chosen together; indices are the spans' in the step."""

    indices: list[int]
    chosen: Chosen


class TokenReader:
    """rows_at_once  most rows whose logits are held, unless one span has more."""

    def __init__(self, ops: Ops, vocab_size: int, rows_at_once: int) -> None:
        self._ops, self._vocab_size, self._rows_at_once = ops, vocab_size, rows_at_once

    def choose(
        self,
        logits_of: Callable[[list[int]], Tensor],
        spans: Sequence[Span],
        states: Sequence[SequenceState],
        first_rows: Sequence[int],
        errors: dict[int, str],
    ) -> Iterator[Part]:
        """Choose tokens, part by part as the caller asks; spans in `errors` are left out, and others join them.

        first_rows  row of the step of each span's first token
        """
        found: list[tuple[int, Judged]] = []
        for index, (span, state) in enumerate(zip(spans, states, strict=True)):
            if index not in errors:
                judged = judge(span, state, self._vocab_size)
                if isinstance(judged, str):
                    errors[index] = judged
                elif judged is not None:
                    found.append((index, judged))
        for part in in_parts(found, self._rows_at_once):
            rows: list[int] = []
            for index, judged in part:
                first = first_rows[index] + judged.first
                rows.extend(range(first, first + len(judged.rows)))
            chosen = choose_tokens(self._ops, logits_of(rows), [judged for _, judged in part])
            yield Part([index for index, _ in part], chosen)

    def read(
        self, parts: Iterable[Part], spans: Sequence[Span], errors: dict[int, str], num_top: int = 0
    ) -> dict[int, Reading]:
        """{index of a span: what its rows gave}; errors are added to.

        num_top  best tokens to report of spans that ask for drafts
        """
        readings: dict[int, Reading] = {}
        for indices, chosen in parts:
            tops_of = [place for place, index in enumerate(indices) if spans[index].num_drafts] if num_top else ()
            for index, reading in zip(indices, read_chosen(self._ops, chosen, num_top, tops_of), strict=True):
                readings[index] = reading
                if reading.error is not None:
                    errors[index] = reading.error
        return readings
