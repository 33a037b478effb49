"""Logprobs in OpenAI's two forms. Pure functions; whole answers with many of them are formatted in the text pool.

Values are of the raw distribution. JSON has no infinity: -9999.0 stands for "no probability at all".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler.types import TokenLogprob
from server.api.choice import Judged
from server.text.tokenizer import Tokenizer

LOWEST = -9999.0


class LogprobFormat:
    """How tokens are shown: `as_ids` writes "token_id:N" instead of the token's text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, as_ids: bool) -> None:
        self._tokenizer, self._num_top, self._as_ids = tokenizer, num_top, as_ids

    def token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def legacy(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """`tokens, token_logprobs, top_logprobs, text_offset`, all of one length."""
        return {
            "tokens": [self.token(item.token) for item in judged],
            "token_logprobs": [None if item.logprob is None else clamped(item.logprob.logprob) for item in judged],
            "top_logprobs": [None if item.logprob is None else self._top_dict(item.logprob) for item in judged],
            "text_offset": [item.offset for item in judged],
        }

    def chat(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """`content`: one entry per token with its bytes and its best alternatives."""
        entries = []
        for item in judged:
            value = item.logprob
            entry = self._entry(item.token, LOWEST if value is None else value.logprob)
            top = () if value is None else value.top[: self._num_top]
            entry["top_logprobs"] = [self._entry(token, logprob) for token, logprob in top]
            entries.append(entry)
        return {"content": entries, "refusal": None}

    def prompt(self, values: Sequence[TokenLogprob], num_prompt: int, num_top: int) -> list[Any]:
        """vLLM's `prompt_logprobs`: per prompt token null (the first) or {id: {logprob, rank, decoded_token}}."""
        shown: list[Any] = [None]
        for value in values[: num_prompt - 1]:
            entry = {}
            for rank, (token, logprob) in enumerate(value.top[:num_top], 1):
                entry[str(token)] = self._ranked(token, logprob, rank)
            entry.setdefault(str(value.token), self._ranked(value.token, value.logprob, value.rank))
            shown.append(entry)
        return shown

    def _top_dict(self, value: TokenLogprob) -> dict[str, float]:
        """Best alternatives and the token itself; of two ids with one text the better stays."""
        best: dict[str, float] = {}
        for token, logprob in (*value.top[: self._num_top], (value.token, value.logprob)):
            text = self.token(token)
            logprob = clamped(logprob)
            if text not in best or logprob > best[text]:
                best[text] = logprob
        return best

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.token(token),
            "logprob": clamped(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": clamped(logprob), "rank": rank, "decoded_token": self.token(token)}


def clamped(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST
