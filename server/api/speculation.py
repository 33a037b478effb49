"""`speculation` and `prediction` of a body as the scheduler's `Speculation`: part of the one choke point.

Neither changes what is generated (coupled verification), so a prediction that this server has no use for is accepted;
what a client orders expressly and cannot have is a 400.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scheduler.types import Speculation, SpeculationMode, SpeculationUsage, VerifyMode
from server.api.errors import MAX_MESSAGE_CHARS, ApiError, invalid, shown
from server.api.schema import GenerationBody, SpeculationFields
from server.engine.decoding import refusal
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
    asked = asked_speculation(body, facts.mode)
    problem = refusal(asked, facts.drafters, facts.max_drafts, body.prediction is not None)
    if problem is not None:
        raise invalid("speculation", shown(problem, MAX_MESSAGE_CHARS))
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
    asked = asked_speculation(body, facts.mode)
    prediction: tuple[int, ...] = ()
    if text and asked.mode is not SpeculationMode.OFF and "prediction" in facts.drafters:
        prediction = tuple(tokenizer.encode(text, add_special_tokens=False))
        if len(prediction) > facts.max_prediction:
            raise _too_long(str(len(prediction)), facts)
        if len(prediction) * num_choices > facts.max_predictions:
            message = f"prediction.content has {len(prediction)} tokens for each of {num_choices} choices"
            raise invalid("prediction", f"{message}, the limit is {facts.max_predictions} together")
    return replace(asked, prediction=prediction)


def asked_speculation(body: GenerationBody, default: SpeculationMode = SpeculationMode.AUTO) -> Speculation:
    """What the body says, without its prediction; a request that says nothing gets the server's mode."""
    fields = body.speculation or SpeculationFields()
    mode = SpeculationMode.ON if default is SpeculationMode.ON else SpeculationMode.AUTO
    if fields.mode is not None:
        mode = SpeculationMode(fields.mode)
    return Speculation(mode, fields.max_tokens, fields.drafter, VerifyMode(fields.verify), fields.tree)


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
