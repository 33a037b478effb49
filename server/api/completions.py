"""/v1/completions: how its answers are written. Requests are read in `handler.py`, judged in `validation.py`."""

from __future__ import annotations

from typing import Any

from scheduler.types import FinishReason
from server.api.choice import Choice, Judged, Piece
from server.api.generation import Generation
from server.api.logprobs import LogprobFormat
from server.api.schema import CompletionBody, DenoiseBody
from server.api.stream import Envelope, to_json
from server.text.tokenizer import Tokenizer


class CompletionForm:
    """`text_completion` objects, streamed and whole."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"
    body_kind: type[CompletionBody] = CompletionBody

    def __init__(self, generation: Generation, envelope: Envelope, tokenizer: Tokenizer) -> None:
        checked = generation.call.checked
        self._generation, self._envelope = generation, envelope
        self._body = checked.body
        self._wants_logprobs = checked.logprobs is not None
        self._format = LogprobFormat(tokenizer, checked.logprobs or 0, self._body.return_tokens_as_token_ids)

    def choices(self, piece: Piece) -> list[str]:
        logprobs = to_json(self._format.legacy(piece.judged)) if self._wants_logprobs else "null"
        finish = f'"{piece.finish_reason.value}"' if piece.finish_reason is not None else "null"
        stop = "null" if piece.stop_reason is None else to_json(piece.stop_reason)
        extra = ""
        if self._body.return_token_ids:
            if piece.is_first:
                extra = f',"prompt_token_ids":{list(self._generation.choices[piece.index].prompt.ids)}'
            extra += f',"token_ids":{piece.token_ids}'
        return [
            f'{{"index":{piece.index},"text":{to_json(piece.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish},"stop_reason":{stop}{extra}}}'
        ]

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        choices = [self._choice(choice, joined(pieces, choice.index)) for choice in self._generation.choices]
        return {**self._envelope.fields, "choices": choices, "usage": self._generation.usage()}

    def _choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "text": piece.text,
            "logprobs": self._format.legacy(piece.judged) if self._wants_logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        shown.update(extras(choice, piece, self._format))
        return shown


class DenoiseForm(CompletionForm):
    """/v1/denoise/stream: the same chunks; snapshots come beside them (`stream.py`)."""

    body_kind = DenoiseBody


def joined(pieces: list[Piece], index: int) -> Piece:
    """All pieces of one choice as one."""
    texts: list[str] = []
    token_ids: list[int] = []
    judged: list[Judged] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    for piece in pieces:
        if piece.index == index:
            texts.append(piece.text)
            token_ids += piece.token_ids
            judged += piece.judged
            finish_reason, stop_reason = piece.finish_reason, piece.stop_reason
    return Piece(index, "".join(texts), token_ids, judged, finish_reason, stop_reason)


def extras(choice: Choice, piece: Piece, form: LogprobFormat) -> dict[str, Any]:
    """Fields of a whole choice that other engines have and the official API has not; only where they were asked."""
    shown: dict[str, Any] = {}
    sampling = choice.request.sampling
    if choice.wants_prompt_logprobs and sampling.prompt_logprobs is not None:
        shown["prompt_logprobs"] = form.prompt(choice.prompt_logprobs, len(choice.prompt.ids), sampling.prompt_logprobs)
    if choice.wants_token_ids:
        shown["token_ids"] = piece.token_ids
        shown["prompt_token_ids"] = list(choice.prompt.ids)
    return shown
