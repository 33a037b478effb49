"""How the prompt rows of a step are shared between prompts: in order, each up to its share."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.sequence import Sequence


def share_out(
    seqs: Iterable[Sequence], chunks: list[tuple[Sequence, int]], room: int, share: int, judged: int
) -> tuple[int, int]:
    """Append (sequence, chunk size) for each of `seqs`. Returns the tokens and the judged rows that are left."""
    for seq in seqs:
        size = min(room, share, seq.prefill_end - seq.num_committed)
        if seq.decoding.judges_prompt:
            size = min(size, judged)
            judged -= size
        if size:
            chunks.append((seq, size))
            room -= size
    return room, judged
