"""Whether an engine can do what a request asks of speculation: the one rule of front end and offline engine."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.types import Speculation, SpeculationMode, VerifyMode


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
