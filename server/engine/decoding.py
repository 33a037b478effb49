"""What no engine can do of what a request asks of decoding, judged in one place for HTTP and for scripts. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.policies import make_diffusion
from scheduler.types import Diffusion, DiffusionModel, Speculation, SpeculationMode, VerifyMode

AUTOREGRESSIVE = "autoregressive"
"""The policy of whoever wants a model that can do both to generate token by token."""

DIFFUSION_SUFFIX = "-diffusion"
"""A model that can do both answers under a second name, its own with this."""
MAX_DELIMITERS = 64
"""Token ids that a planner looks for as the ends of lines."""


def default_decoding(model: DiffusionModel | None) -> Diffusion | None:
    """What a request gets that says nothing; None = token by token, where a model can."""
    return None if model is None or model.is_dual else make_diffusion(model.policy, model.topology)


def ordered_drafts(asked: Speculation) -> str | None:
    """The field by which a request insists on drafts, which denoising has no use for; None = it does not."""
    orders = {
        "mode": asked.mode is SpeculationMode.ON,
        "max_tokens": asked.max_tokens is not None,
        "drafter": asked.drafter != "auto",
        "verify": asked.verify is not VerifyMode.COUPLED,
        "tree": bool(asked.tree),
    }
    return next((name for name, is_order in orders.items() if is_order), None)


def conflict(
    decoding: Diffusion, is_empty: bool, has_prompt_logprobs: bool, has_grammar: bool
) -> tuple[str, str] | None:
    """(field, what is wrong with it) of a request that no denoising can answer, or None. Diffusion reference 9.6.

    is_empty   max_tokens is 0: a prompt is only to be evaluated
    """
    if is_empty:
        return "max_tokens", "is 0"
    if has_prompt_logprobs:
        return "prompt_logprobs", "is given"
    if has_grammar and decoding.selector.name != "sequential":
        return "grammar", f"is read from left to right and needs the selector sequential, not {decoding.selector.name}"
    if has_grammar and decoding.steps is not None:
        return "grammar", "is followed token by token, which leaves no choice of decoding.steps"
    if has_grammar and decoding.stopper.name == "prophet":
        return "grammar", "is read from left to right, and the stopper prophet fills many masks at once"
    return None


def refusal(asked: Speculation, drafters: Sequence[str], max_drafts: int, has_prediction: bool = False) -> str | None:
    """Why an engine with these drafters cannot do what a request asks of speculation; None = it can.

    has_prediction  the request brings one, whether or not its ids are in `asked` yet
    """
    if asked.max_tokens is not None and not 1 <= asked.max_tokens <= max_drafts:
        return f"speculation.max_tokens is {asked.max_tokens}, but must be between 1 and {max_drafts}"
    if asked.drafter != "auto" and asked.drafter not in drafters:
        offer = f"this server has {', '.join(drafters)}" if drafters else "this server has none"
        return f"speculation.drafter is {asked.drafter}, but {offer}"
    if asked.mode is SpeculationMode.ON and not drafters:
        return "speculation.mode is on, but this server runs without speculation"
    if asked.tree and asked.verify is not VerifyMode.COUPLED:
        return f"speculation.tree is true and speculation.verify is {asked.verify}; trees are verified coupled only"
    if has_prediction and asked.drafter not in ("auto", "prediction"):
        return (
            f"prediction is given and speculation.drafter is {asked.drafter}, which does not read it; "
            "leave one of them out, or set the drafter to auto or prediction"
        )
    return None
