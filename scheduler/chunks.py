"""How the prompt rows of a step are shared between prompts: in order, each up to its share."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.prompt_attention import PromptAttention, chosen_by
from scheduler.sequence import Sequence, Status


def share_out(
    seqs: Iterable[Sequence], chunks: list[tuple[Sequence, int]], room: int, share: int, judged: int
) -> tuple[int, int]:
    """Append (sequence, chunk size) for each of `seqs`. Returns the tokens and the judged rows that are left."""
    for seq in seqs:
        size = chunk_size(seq, room, share)
        if seq.decoding.judges_prompt:
            size = min(size, judged)
            judged -= size
        if size:
            chunks.append((seq, size))
            room -= size
    return room, judged


def chunk_size(seq: Sequence, room: int, share: int) -> int:
    """Rows of a prompt's next chunk, of at most `room` and about `share`: whole grains or regions, or all there are."""
    decoding = seq.decoding
    if decoding.is_denoising:
        narrow = decoding.widths.narrow
        return narrow if narrow <= room else 0
    chosen = _prompt_attention(seq)
    grain = decoding.grain if chosen is None else least_chunk(seq)
    size = min(room, max(share, grain), seq.prefill_end - seq.num_committed)
    if chosen is not None:
        return chosen.most_rows(seq.num_committed, size, len(seq.request.prompt))
    return size // grain * grain


def least_chunk(seq: Sequence) -> int:
    """Rows that the sequence needs to go on at all. One that waits may begin anywhere, with its hits."""
    chosen = _prompt_attention(seq)
    if chosen is None:
        return seq.decoding.least_rows
    is_cut_anywhere = not chosen.dense <= seq.num_committed < len(seq.request.prompt)
    return 1 if is_cut_anywhere and seq.status is Status.RUNNING else chosen.method.region


def _prompt_attention(seq: Sequence) -> PromptAttention | None:
    return chosen_by(seq.request.prompt_attention, len(seq.request.prompt))
