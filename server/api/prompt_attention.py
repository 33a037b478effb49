"""`attention.prefill` of a body as the scheduler's `PromptAttention`: part of the one choke point."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler.types import Diffusion, PromptAttention, PromptMethod
from server.api.errors import invalid, shown
from server.api.schema import AttentionFields, GenerationBody
from server.engine.config import DENSE


@dataclass(frozen=True, slots=True)
class PromptAttentionFacts:
    """What validation must know of the server's block-sparse prompts.

    offers   the methods that requests may choose, with the threshold of who names none
    default  what a request gets that says nothing; None = dense
    """

    offers: tuple[PromptAttention, ...] = ()
    default: PromptAttention | None = None


def read_prompt_attention(
    body: GenerationBody, facts: PromptAttentionFacts, decoding: Diffusion | None, prompt_logprobs: int | None
) -> PromptAttention | None:
    """How the rows of the prompt attend; None = they read every key. Raises ApiError 400.

    prompt_logprobs  of the body, or of its echo
    """
    fields = body.attention or AttentionFields()
    if fields.prefill is None:
        if fields.prefill_threshold is not None:
            raise invalid("attention.prefill_threshold", "attention.prefill_threshold is given without a prefill")
        # Who needs a dense prompt has said something.
        is_dense = decoding is not None or fields.lossless or prompt_logprobs is not None
        return None if is_dense else facts.default
    if fields.prefill == DENSE:
        if fields.prefill_threshold is not None:
            message = "attention.prefill_threshold is given, but attention.prefill dense keeps everything"
            raise invalid("attention.prefill_threshold", message)
        return None
    if fields.prefill not in tuple(PromptMethod):
        known = ", ".join((DENSE, *PromptMethod))
        raise invalid("attention.prefill", f"attention.prefill is {shown(fields.prefill)}, but must be one of {known}")
    asked = _asked(PromptMethod(fields.prefill), fields.prefill_threshold, facts.offers)
    what = f"attention.prefill is {fields.prefill}, but"
    if decoding is not None:
        raise invalid("attention", f"{what} decoding.policy {decoding.policy} denoises and reads prompts its own way")
    if fields.lossless:
        raise invalid("attention.lossless", f"{what} attention.lossless promises the text of dense attention")
    if prompt_logprobs is not None:
        message = f"{what} log-probabilities of the prompt are asked for, which would not be the model's"
        raise invalid("attention.prefill", message)
    return None if asked.threshold == 1.0 else asked


def _asked(method: PromptMethod, threshold: float | None, offers: tuple[PromptAttention, ...]) -> PromptAttention:
    offer = next((offer for offer in offers if offer.method is method), PromptAttention(method))
    asked = offer if threshold is None else replace(offer, threshold=float(threshold))
    if (problem := asked.misfit([offer.method for offer in offers])) is not None:
        raise invalid(f"attention.{problem[0]}", f"attention.{problem[0]} {problem[1]}")
    return asked


def prompt_usage(body: GenerationBody, asked: PromptAttention | None) -> dict[str, object]:
    """What `usage.attention` says of the prompt, for requests that say something of it."""
    if body.attention is None or body.attention.prefill is None:
        return {}
    return (
        {"prefill": DENSE} if asked is None else {"prefill": asked.method.value, "prefill_threshold": asked.threshold}
    )
