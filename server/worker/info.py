"""What is told about a worker once it is built. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.types import DiffusionModel


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The facts of a built worker. Lengths in tokens, sizes in bytes.

    model_len             longest sequence, prompt and output
    diffusion             how it denoises; None = it only generates token by token
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
    num_parameters: int
    diffusion: DiffusionModel | None = None
    drafters: tuple[tuple[str, bool], ...] = ()
