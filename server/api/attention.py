"""`attention` of a body as the scheduler's `Attention`: part of the one choke point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.types import Attention, AttentionMethod, AttentionOffer, Diffusion, PromptAttention
from server.api.errors import invalid, shown
from server.api.prompt_attention import prompt_usage
from server.api.schema import AttentionFields, GenerationBody
from server.engine.config import DENSE

DRAFTER = "sparse_attention"
"""Drafts for lossless requests (`server/worker/drafters/sparse_attention.py`)."""


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What validation must know of the server's sparse attention.

    offers   the methods that requests may choose
    default  what a request gets that says nothing; None = dense
    budget   keys a row reads where a request does not say
    correct_every   output tokens between two corrections where it does not; 0 = none
    """

    offers: tuple[AttentionOffer, ...] = ()
    default: Attention | None = None
    budget: int = 1024
    correct_every: int = 0


def read_attention(
    body: GenerationBody, facts: AttentionFacts, drafters: Sequence[str], decoding: Diffusion | None
) -> Attention | None:
    """How the rows of the answer attend; None = they read every key. Raises ApiError 400.

    drafters  the server's: one of them drafts for lossless requests
    """
    fields = body.attention
    if fields is None or fields.method is None:
        if fields is not None:
            _check_without_method(fields)
        return None if decoding is not None else facts.default
    if fields.method == DENSE:
        for name, value in (("budget", fields.budget), ("correct_every", fields.correct_every)):
            if value is not None:
                message = f"attention.{name} is given, but attention.method dense reads every key"
                raise invalid(f"attention.{name}", message)
        if fields.lossless:
            raise invalid("attention.lossless", "attention.lossless is true, but attention.method dense loses nothing")
        return None
    if fields.method not in tuple(AttentionMethod):
        known = ", ".join((DENSE, *AttentionMethod))
        raise invalid("attention.method", f"attention.method is {shown(fields.method)}, but must be one of {known}")
    if decoding is not None:
        message = f"attention.method is {fields.method}, but decoding.policy {decoding.policy} denoises"
        raise invalid("attention", f"{message}: sparse attention is for tokens decoded one by one")
    every = 0 if fields.lossless else facts.correct_every
    asked = Attention(
        AttentionMethod(fields.method),
        facts.budget if fields.budget is None else fields.budget,
        fields.lossless,
        every if fields.correct_every is None else fields.correct_every,
    )
    if (problem := asked.misfit(facts.offers)) is not None:
        raise invalid(f"attention.{problem[0]}", f"attention.{problem[0]} {problem[1]}")
    if fields.lossless:
        _check_lossless(body, drafters)
    elif body.speculation is not None and body.speculation.tree:
        message = f"speculation.tree is true, but attention.method {fields.method} cannot verify trees"
        raise invalid("speculation", f"{message}; leave one of them out")
    return asked


def _check_without_method(fields: AttentionFields) -> None:
    if fields.prefill is None and fields.prefill_threshold is None:
        raise invalid("attention", "attention has neither method nor prefill; name one of them")
    is_given = {
        "budget": fields.budget is not None,
        "lossless": fields.lossless,
        "correct_every": fields.correct_every is not None,
    }
    for name in is_given:
        if is_given[name]:
            raise invalid(f"attention.{name}", f"attention.{name} is given, but attention.method is not")


def _check_lossless(body: GenerationBody, drafters: Sequence[str]) -> None:
    message = "attention.lossless is true, which is speculation with the drafter sparse_attention, but"
    if DRAFTER not in drafters:
        raise invalid("attention.lossless", f"{message} this server drafts without it")
    asked = body.speculation
    if asked is not None and (asked.mode == "off" or asked.drafter not in ("auto", DRAFTER)):
        raise invalid("speculation", f"{message} speculation.mode or speculation.drafter rules it out")


def attention_usage(
    body: GenerationBody, attention: Attention | None, prompt_attention: PromptAttention | None
) -> dict[str, object]:
    """The field of `usage`, for requests that say something of attention."""
    if body.attention is None:
        return {}
    of_prompt = prompt_usage(body, prompt_attention)
    if attention is None:
        return {"attention": {"method": DENSE} | of_prompt}
    shown_as: dict[str, object] = {"method": attention.method.value, "budget": attention.budget}
    lossless = {"lossless": True} if attention.lossless else {}
    corrected = {"correct_every": attention.correct_every} if attention.correct_every else {}
    return {"attention": shown_as | lossless | corrected | of_prompt}
