"""/v1/chat/completions: how its answers are written. Requests are read in `handler.py`, judged in `validation.py`."""

from __future__ import annotations

from typing import Any

from server.api.choice import Choice, Piece
from server.api.completions import extras, joined
from server.api.generation import Generation
from server.api.logprobs import LogprobFormat
from server.api.stream import Envelope, to_json
from server.text.tokenizer import Tokenizer


class ChatForm:
    """`chat.completion` objects and `chat.completion.chunk`s: per index first the role, then content, then the end."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, generation: Generation, envelope: Envelope, tokenizer: Tokenizer) -> None:
        checked = generation.call.checked
        self._generation, self._envelope = generation, envelope
        self._body = checked.body
        self._wants_logprobs = checked.logprobs is not None
        self._format = LogprobFormat(tokenizer, checked.logprobs or 0, self._body.return_tokens_as_token_ids)

    def choices(self, piece: Piece) -> list[str]:
        chunks = []
        if piece.is_first:
            extra = ""
            if self._body.return_token_ids:
                extra = f',"prompt_token_ids":{list(self._generation.choices[piece.index].prompt.ids)}'
            chunks.append(self._chunk(piece.index, '{"role":"assistant","content":""}', extra=extra))
        if piece.text or piece.judged:
            logprobs = to_json(self._format.chat(piece.judged)) if self._wants_logprobs else "null"
            extra = f',"token_ids":{piece.token_ids}' if self._body.return_token_ids else ""
            chunks.append(self._chunk(piece.index, f'{{"content":{to_json(piece.text)}}}', logprobs, extra=extra))
        if piece.finish_reason is not None:
            stop = "null" if piece.stop_reason is None else to_json(piece.stop_reason)
            chunks.append(self._chunk(piece.index, "{}", finish=f'"{piece.finish_reason.value}"', stop=stop))
        return chunks

    @staticmethod
    def _chunk(
        index: int, delta: str, logprobs: str = "null", finish: str = "null", stop: str = "null", extra: str = ""
    ) -> str:
        return (
            f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish},"stop_reason":{stop}{extra}}}'
        )

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        choices = [self._choice(choice, joined(pieces, choice.index)) for choice in self._generation.choices]
        return {**self._envelope.fields, "choices": choices, "usage": self._generation.usage()}

    def _choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._format.chat(piece.judged) if self._wants_logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        shown.update(extras(choice, piece, self._format))
        return shown
