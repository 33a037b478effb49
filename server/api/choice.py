"""One choice of an answer while it grows: deltas in, `Piece`s of text out. No I/O.

A piece has text or an end; tokens that have no text yet (half a character, a possible stop string) wait for the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.types import DecodingUsage, Delta, FinishReason, Snapshot, SpeculationUsage, TokenLogprob
from server.api.validation import Call
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Judged:
    """A token of the answer (or of an echoed prompt) with its place in the text and, if asked, its logprobs."""

    token: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(slots=True)
class Piece:
    """What is new of choice `index`. `judged` is empty unless logprobs were asked, `snapshot` is there where it was."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    is_first: bool = False
    num_tokens: int = 0
    snapshot: Snapshot | None = None

    @property
    def is_chunk(self) -> bool:
        """Is there more than a snapshot?"""
        return bool(self.text or self.token_ids) or self.finish_reason is not None


class Choice:
    """State of choice `index`: its detokenizer, counts, and what waits for text."""

    def __init__(self, index: int, call: Call, tokenizer: Tokenizer) -> None:
        checked = call.checked
        self.index = index
        self.request = call.requests[index]
        self.prompt = call.prompts[index // checked.body.n]
        self.num_tokens = 0
        self.cached_tokens: int | None = None
        self.speculation = SpeculationUsage()
        self.decoding = DecodingUsage()
        self.prompt_logprobs: list[TokenLogprob] = []
        self.is_finished = False
        self.wants_prompt_logprobs = checked.body.prompt_logprobs is not None
        self.wants_token_ids = checked.body.return_token_ids
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(self.request.stop_ids) - frozenset(checked.body.stop_token_ids)
        options = checked.body.stream_options
        # A client that counts tokens sees each as it comes, even half a character that has no text yet.
        self._is_counted = self.wants_token_ids or (options is not None and options.continuous_usage_stats)
        self._shows_stop = checked.body.include_stop_str_in_output
        self._wants_logprobs = checked.logprobs is not None
        self._skip_special = checked.body.skip_special_tokens
        self._text = Detokenizer(tokenizer, call.stop, self._skip_special, self.prompt.ids)
        self._echo = checked.echo
        self._echo_text = self._echoed() if checked.echo else ""
        self._pending = Piece(index, is_first=True)

    def absorb(self, delta: Delta) -> Piece | None:
        """Take one delta; the piece that may be shown now, if any. After the last piece `is_finished` is true."""
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        if delta.speculation is not None:
            self.speculation += delta.speculation
        if delta.decoding is not None:
            self.decoding += delta.decoding
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        waiting = None if delta.snapshot is None else Piece(self.index, snapshot=delta.snapshot)
        if not delta.tokens and delta.finish_reason is None:
            return waiting
        if self._echo:
            self._put_echo()
        piece = self._pending
        last = len(delta.tokens) - 1
        for k, token in enumerate(delta.tokens):
            is_hidden = k == last and delta.stop_id is not None and not self._shows_stop
            offset = len(self._echo_text) + self._text.num_chars
            piece.text += self._text.push(token, is_hidden)
            piece.token_ids.append(token)
            self.num_tokens += 1
            if self._wants_logprobs:
                piece.judged.append(Judged(token, offset, delta.logprobs[k] if k < len(delta.logprobs) else None))
            if self._text.stopped is not None:
                break
        if self._text.stopped is None and delta.finish_reason is not None:
            piece.text += self._text.finish()
        self._note_end(piece, delta)
        if not piece.text and piece.finish_reason is None and not self._is_counted:
            return waiting
        piece.num_tokens = self.num_tokens
        piece.snapshot = delta.snapshot
        self._pending = Piece(self.index)
        return piece

    def _note_end(self, piece: Piece, delta: Delta) -> None:
        if self._text.stopped is not None:
            piece.finish_reason, piece.stop_reason = FinishReason.STOP, self._text.stopped
            end = len(self._echo_text) + self._text.num_chars
            piece.judged = [Judged(item.token, min(item.offset, end), item.logprob) for item in piece.judged]
        elif delta.finish_reason is not None:
            piece.finish_reason = delta.finish_reason
            if delta.stop_id is not None and delta.stop_id not in self._eos_ids:
                piece.stop_reason = delta.stop_id
        self.is_finished = piece.finish_reason is not None

    def _echoed(self) -> str:
        if self.prompt.text is not None:
            return self.prompt.text
        stream = Detokenizer(self._tokenizer, None, self._skip_special)
        return "".join([*map(stream.push, self.prompt.ids), stream.finish()])

    def _put_echo(self) -> None:
        """The prompt goes before the first token: its text, and with logprobs its tokens."""
        self._echo = False
        self._pending.text += self._echo_text
        if not self._wants_logprobs:
            return
        stream = Detokenizer(self._tokenizer, None, self._skip_special)
        known = [None, *self.prompt_logprobs]
        for i, token in enumerate(self.prompt.ids):
            offset = min(stream.num_chars, len(self._echo_text))
            stream.push(token)
            self._pending.judged.append(Judged(token, offset, known[i] if i < len(known) else None))
