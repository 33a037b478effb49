"""What is refused on arrival: what can never run, and what does not fit the queue. Pure functions.

What a way of decoding cannot do is refused by `decoding/factory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.attention import leaves_keys_out
from scheduler.types import AttentionOffer, DiffusionModel, Fault, Limits, PromptMethod, Request, Topology


def refuse_impossible(
    request: Request,
    limits: Limits,
    attention: Sequence[AttentionOffer] = (),
    prompt_attention: Sequence[PromptMethod] = (),
) -> Fault | None:
    """A 400 for a request that no empty machine could serve; it would wait for ever (R1, forward progress).

    attention, prompt_attention  the sparse methods that it may choose
    """
    num_prompt, num_output = len(request.prompt), len(request.output)
    if num_prompt == 0:
        return Fault(400, "prompt has no tokens; at least 1 is needed", "prompt")
    if request.max_tokens < 0:
        return Fault(400, f"max_tokens is {request.max_tokens}; it must be at least 0", "max_tokens")
    if num_output and num_output >= request.max_tokens:
        return Fault(
            400, f"output has {num_output} tokens already and max_tokens is {request.max_tokens}", "max_tokens"
        )
    fewest = num_output + min(1, request.max_tokens)
    if num_prompt + fewest > limits.max_model_len:
        return Fault(
            400,
            f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
            f"{num_prompt + request.max_tokens} tokens ({num_prompt} in the prompt, {request.max_tokens} for the "
            "completion). Please reduce the length of the prompt.",
            "prompt",
        )
    fault = _refuse_attention(request, attention) or _refuse_prompt_attention(request, prompt_attention)
    if fault is not None:
        return fault
    total = min(limits.max_model_len, num_prompt + request.max_tokens)
    # The last output token is never fed back, so its KV is never needed.
    pages = -(-(total - min(1, request.max_tokens)) // limits.page_size)
    if pages > limits.num_pages:
        room = limits.num_pages * limits.page_size
        return Fault(
            400,
            f"prompt ({num_prompt} tokens) and max_tokens ({request.max_tokens}) need KV for {total} tokens, but the "
            f"whole KV cache holds {room}. Reduce max_tokens or the prompt.",
            "max_tokens" if num_prompt < room else "prompt",
        )
    return None


def _refuse_attention(request: Request, offers: Sequence[AttentionOffer]) -> Fault | None:
    if request.attention is None:
        return None
    if request.decoding is not None:
        return Fault(
            400, "attention is sparse for tokens that are decoded one by one, but this text is denoised", "attention"
        )
    if request.speculation.tree and leaves_keys_out(request.attention):
        return Fault(400, "speculation.tree is true, but a row of sparse attention cannot be of a tree", "speculation")
    problem = request.attention.misfit(offers)
    return None if problem is None else Fault(400, f"attention.{problem[0]} {problem[1]}", f"attention.{problem[0]}")


def _refuse_prompt_attention(request: Request, methods: Sequence[PromptMethod]) -> Fault | None:
    asked = request.prompt_attention
    if asked is None:
        return None
    what = f"attention.prefill is {asked.method}"
    if request.decoding is not None:
        return Fault(400, f"{what}, but this text is denoised, and its prompt read as denoising needs it", "attention")
    if request.attention is not None and request.attention.lossless:
        return Fault(400, f"{what}, which changes the text, but attention.lossless is true", "attention.lossless")
    if request.sampling.prompt_logprobs is not None:
        return Fault(400, f"{what}, so the prompt's log-probabilities would not be the model's", "prompt_logprobs")
    problem = asked.misfit(methods)
    return None if problem is None else Fault(400, f"attention.{problem[0]} {problem[1]}", f"attention.{problem[0]}")


def refuse_overload(
    request: Request, limits: Limits, num_waiting: int, num_seats: int, num_queued: int
) -> Fault | None:
    """A 429 when the queue is full. A request with output is already on a client's screen: it is never refused here.

    num_seats    sequences that could still start at once; they do not count as queued
    num_queued   tokens of the waiting sequences
    """
    if request.output:
        return None
    if num_waiting >= limits.max_queued_requests + num_seats:
        return Fault(
            429, f"{num_waiting} requests are waiting and the limit is {limits.max_queued_requests}; retry later"
        )
    # A prompt longer than the whole limit is let into an empty queue, or it could never run.
    total = num_queued + len(request.prompt)
    if num_waiting and total > limits.max_queued_tokens:
        return Fault(
            429, f"{total} prompt tokens would be waiting and the limit is {limits.max_queued_tokens}; retry later"
        )
    return None


def check_limits(limits: Limits, model: DiffusionModel | None = None) -> None:
    """Raise ValueError for limits under which the rules cannot be kept. `model`: how the model denoises, if it can."""
    if model is not None and model.topology is Topology.BLOCK_CAUSAL and limits.page_size % model.block_size:
        raise ValueError(
            f"page_size is {limits.page_size}; it must be a multiple of the model's block size, {model.block_size}: "
            "a shared page must not end within a block"
        )
    for name in ("max_batched_tokens", "max_seqs", "max_model_len", "num_pages", "page_size", "max_queued_requests"):
        if getattr(limits, name) < 1:
            raise ValueError(f"{name} is {getattr(limits, name)}; it must be at least 1")
    if limits.max_seqs > limits.max_batched_tokens:
        raise ValueError(
            f"max_seqs is {limits.max_seqs}, more than max_batched_tokens ({limits.max_batched_tokens}): "
            "a step could not hold one token of every running sequence (R1)"
        )
    if not 0.0 < limits.max_prefill_share <= 1.0:
        raise ValueError(f"max_prefill_share is {limits.max_prefill_share}; it must be in (0, 1]")
    if limits.watermark_pages < 0:
        raise ValueError(f"watermark_pages is {limits.watermark_pages}; it must be at least 0")
    if limits.tbt_slo_s is not None and limits.tbt_slo_s <= 0:
        raise ValueError(f"tbt_slo_s is {limits.tbt_slo_s}; it must be positive, or None for auto")
    if limits.tbt_auto_factor < 1.0:
        raise ValueError(f"tbt_auto_factor is {limits.tbt_auto_factor}; it must be at least 1")
