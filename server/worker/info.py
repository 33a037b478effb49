"""What is told about a worker once it is built. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.types import AttentionOffer, DiffusionModel, Topology
from server.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The facts of a built worker. Lengths in tokens, sizes in bytes.

    model_len             longest sequence, prompt and output
    diffusion             how it denoises; None = it only generates token by token
    drafters              (name, whether it runs a model step by step) of each drafter
    attention             the sparse methods that requests may choose
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
    attention: tuple[AttentionOffer, ...] = ()


def diffusion_model(config: ModelConfig, asked: int | None) -> DiffusionModel | None:
    """How a model of this configuration denoises; None = it does not.

    asked  the block size where the checkpoint leaves it open: it says none, or only has a default
    Raises ValueError for a block size that the model cannot have.
    """
    is_open = config.block_size is None or config.block_size_is_default
    block = asked if is_open and asked is not None else config.block_size
    if config.mask_token_id is None or block is None:
        if asked is not None:
            raise ValueError(f"denoise-block-size is {asked}, but this model has no mask token and cannot denoise")
        return None
    if asked not in (None, block):
        raise ValueError(f"denoise-block-size is {asked}, but this model was trained on blocks of {block} tokens")
    topology = Topology.BIDIRECTIONAL if config.bidirectional else Topology.BLOCK_CAUSAL
    return DiffusionModel(config.mask_token_id, block, topology, config.logit_shift, config.is_causal)
