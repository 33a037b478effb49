"""Which state machine a request gets, and which requests none of them can serve."""

from __future__ import annotations

from scheduler.decoding.autoregressive import Autoregressive
from scheduler.decoding.base import Decoding
from scheduler.decoding.block import refuse_blocks
from scheduler.decoding.block_diffusion import BlockDiffusion
from scheduler.decoding.canvas import refuse_canvas
from scheduler.decoding.full_diffusion import FullDiffusion
from scheduler.sequence import Sequence
from scheduler.types import DiffusionModel, Fault, Limits, Request, Topology


def refuse_decoding(request: Request, limits: Limits, model: DiffusionModel | None) -> Fault | None:
    """A 400 for a way of decoding that the model does not have, or that no step has room for.

    The request has passed `admission.refuse_impossible`. `model`: how the model denoises, None = it cannot.
    """
    if request.decoding is None:
        if model is None or model.is_dual:
            return None
        return Fault(400, "this model only denoises; it cannot decode token by token", "decoding")
    if model is None:
        return Fault(400, "this model decodes token by token; it cannot denoise", "decoding")
    if request.max_tokens < 1:
        return Fault(400, "max_tokens is 0, but a request that is denoised has at least 1", "max_tokens")
    if request.sampling.prompt_logprobs is not None:
        return Fault(400, "denoising gives no log-probabilities of the prompt", "prompt_logprobs")
    if (misfit := model.misfit(request.decoding)) is not None:
        return Fault(400, misfit[1], f"decoding.{misfit[0]}")
    refuse = refuse_canvas if model.topology is Topology.BIDIRECTIONAL else refuse_blocks
    return refuse(request, request.decoding, model, limits)


def make_decoding(seq: Sequence, limits: Limits, model: DiffusionModel | None) -> Decoding:
    """The machine of a request that `refuse_decoding` let in."""
    if seq.request.decoding is None:
        return Autoregressive(seq, limits.max_model_len)
    assert model is not None, "a request to denoise came to a model that cannot"
    machine = FullDiffusion if model.topology is Topology.BIDIRECTIONAL else BlockDiffusion
    return machine(seq, limits.max_model_len, model)
