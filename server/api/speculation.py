"""`speculation` and `prediction` of a body as the scheduler's `Speculation`: part of the one choke point.

Neither changes what is generated (coupled verification), so a prediction that this server has no use for is accepted;
what a client orders expressly and cannot have is a 400.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduler.types import Speculation, SpeculationMode, SpeculationUsage, VerifyMode
from server.api.errors import ApiError, invalid, shown
from server.api.sampling import check_range
from server.api.schema import GenerationBody, SpeculationFields
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SpeculationFacts:
    """What validation must know of the server's speculation.

    mode        the server's own: auto, on or off
    drafters    names that a request may ask for; none = this server never drafts
    max_drafts  most drafts of one sequence in one step
    max_prediction   tokens of a prediction (no output is longer); max_predictions: over all choices of a call
    """

    mode: SpeculationMode = SpeculationMode.OFF
    drafters: tuple[str, ...] = ()
    max_drafts: int = 8
    max_prediction: int = 8192
    max_predictions: int = 65536


def check_speculation(body: GenerationBody, facts: SpeculationFacts, tokenizer: Tokenizer) -> str:
    """The cheap checks of both fields; the predicted text, empty if there is none. Raises ApiError 400."""
    asked = body.speculation or SpeculationFields()
    if asked.max_tokens is not None:
        check_range("speculation.max_tokens", asked.max_tokens, 1, facts.max_drafts, param="speculation")
    if asked.drafter != "auto" and asked.drafter not in facts.drafters:
        offer = f"this server has {', '.join(facts.drafters)}" if facts.drafters else "this server has none"
        raise invalid("speculation", f"speculation.drafter is {shown(asked.drafter)}, but {offer}")
    if asked.mode == "on" and not facts.drafters:
        raise invalid("speculation", "speculation.mode is on, but this server runs without speculation")
    if asked.tree and asked.verify != "coupled":
        message = f"speculation.tree is true and speculation.verify is {asked.verify}; trees are verified coupled only"
        raise invalid("speculation", message)
    if body.prediction is not None and asked.drafter not in ("auto", "prediction"):
        message = (
            f"prediction is given and speculation.drafter is {asked.drafter}, which does not read it; "
            "leave one of them out, or set the drafter to auto or prediction"
        )
        raise invalid("speculation", message)
    text = _prediction_text(body)
    longest = tokenizer.max_bytes_per_token
    if longest is not None and (at_least := math.ceil(len(text.encode()) / longest)) > facts.max_prediction:
        raise _too_long(f"at least {at_least}", facts)
    return text


def read_speculation(
    body: GenerationBody, text: str, num_choices: int, facts: SpeculationFacts, tokenizer: Tokenizer
) -> Speculation:
    """The scheduler's value; tokenizes the prediction `text` if a drafter will read it, which may be slow.

    Raises ApiError 400 for a prediction that is too long.
    """
    asked = body.speculation or SpeculationFields()
    mode = SpeculationMode.ON if facts.mode is SpeculationMode.ON else SpeculationMode.AUTO
    if asked.mode is not None:
        mode = SpeculationMode(asked.mode)
    prediction: tuple[int, ...] = ()
    if text and mode is not SpeculationMode.OFF and "prediction" in facts.drafters:
        prediction = tuple(tokenizer.encode(text, add_special_tokens=False))
        if len(prediction) > facts.max_prediction:
            raise _too_long(str(len(prediction)), facts)
        if len(prediction) * num_choices > facts.max_predictions:
            message = f"prediction.content has {len(prediction)} tokens for each of {num_choices} choices"
            raise invalid("prediction", f"{message}, the limit is {facts.max_predictions} together")
    return Speculation(mode, asked.max_tokens, asked.drafter, VerifyMode(asked.verify), asked.tree, prediction)


def speculation_usage(body: GenerationBody, has_drafters: bool, total: SpeculationUsage) -> dict[str, object]:
    """The fields of `usage` about drafts: where the server drafts or the client asked, and zeros mean none.

    OpenAI's two counts are of the drafts found in the prediction: verified ones that became output, and the rest of
    the verified ones. Predicted tokens that were never tried are in neither.
    """
    fields: dict[str, object] = {}
    if body.prediction is not None:
        fields["completion_tokens_details"] = {
            "accepted_prediction_tokens": total.prediction_accepted,
            "rejected_prediction_tokens": total.prediction_drafted - total.prediction_accepted,
        }
    if has_drafters or body.speculation is not None or body.prediction is not None:
        fields["speculation"] = {"drafted": total.drafted, "accepted": total.accepted, "steps": total.steps}
    return fields


def _prediction_text(body: GenerationBody) -> str:
    """Parts are joined as they are."""
    if body.prediction is None:
        return ""
    content = body.prediction.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _too_long(count: str, facts: SpeculationFacts) -> ApiError:
    message = f"prediction.content has {count} tokens, but no output is longer than the context of "
    return invalid("prediction", f"{message}{facts.max_prediction} tokens")
