"""What is told about a worker once it is built. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The facts of a built worker. Lengths in tokens, sizes in bytes.

    model_len             longest sequence, prompt and output
    block_size, mask_id   of a block-diffusion model, else None
    drafters              (name, whether it runs a model step by step) of each drafter
    """

    model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    weight_bytes: int
    kv_bytes: int
    dtype: str
    device: str
    ops: str
    eos_ids: tuple[int, ...]
    block_size: int | None
    mask_id: int | None
    num_parameters: int
    drafters: tuple[tuple[str, bool], ...] = ()
