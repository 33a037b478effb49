"""`attention` of a body as the scheduler's `Attention`: part of the one choke point."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.types import Attention, AttentionMethod, AttentionOffer, Diffusion
from server.api.errors import invalid, shown
from server.api.schema import GenerationBody
from server.engine.config import DENSE


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What validation must know of the server's sparse attention.

    offers   the methods that requests may choose
    default  what a request gets that says nothing; None = dense
    budget   keys a row reads where a request does not say
    """

    offers: tuple[AttentionOffer, ...] = ()
    default: Attention | None = None
    budget: int = 1024


def read_attention(body: GenerationBody, facts: AttentionFacts, decoding: Diffusion | None) -> Attention | None:
    """How the rows of the answer attend; None = they read every key. Raises ApiError 400."""
    fields = body.attention
    if fields is None:
        return None if decoding is not None else facts.default
    if fields.method == DENSE:
        if fields.budget is not None:
            raise invalid("attention.budget", "attention.budget is given, but attention.method dense reads every key")
        return None
    if fields.method not in tuple(AttentionMethod):
        known = ", ".join((DENSE, *AttentionMethod))
        raise invalid("attention.method", f"attention.method is {shown(fields.method)}, but must be one of {known}")
    if decoding is not None:
        message = f"attention.method is {fields.method}, but decoding.policy {decoding.policy} denoises"
        raise invalid("attention", f"{message}: sparse attention is for tokens decoded one by one")
    asked = Attention(AttentionMethod(fields.method), facts.budget if fields.budget is None else fields.budget)
    if (problem := asked.misfit(facts.offers)) is not None:
        raise invalid(f"attention.{problem[0]}", f"attention.{problem[0]} {problem[1]}")
    if body.speculation is not None and body.speculation.tree:
        message = f"speculation.tree is true, but attention.method {fields.method} cannot verify trees"
        raise invalid("speculation", f"{message}; leave one of them out")
    return asked


def attention_usage(body: GenerationBody, attention: Attention | None) -> dict[str, object]:
    """The field of `usage`, for requests that say something of attention."""
    if body.attention is None:
        return {}
    if attention is None:
        return {"attention": {"method": DENSE}}
    return {"attention": {"method": attention.method.value, "budget": attention.budget}}
