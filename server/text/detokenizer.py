"""Tokens to text as they come: partial characters held, stop strings found, offsets kept.

One `Detokenizer` per choice, used for streamed and whole answers alike, so that the concatenated pieces *are* the text.
It never takes back a character. It does not know the engine: the caller aborts when `stopped` is set.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Protocol

from server.text.tokenizer import Tokenizer

PRIMING_TOKENS = 6
"""Prompt tokens that prime a window: enough for SentencePiece to keep the first word's space."""


@dataclass(frozen=True, slots=True)
class StopConditions:
    """Texts that end the output; matches that end within the first `min_tokens` tokens do not count."""

    strings: tuple[str, ...] = ()
    include_in_output: bool = False
    min_tokens: int = 0


class CharacterStream(Protocol):
    """Turns tokens into whole characters, in order, holding what is not yet one."""

    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


class ByteLevelStream:
    """For byte-level vocabularies: bytes through an incremental UTF-8 decoder. A valid prefix of a character is held,
    invalid bytes become U+FFFD at once, a literal U+FFFD is a character like any other."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class WindowStream:
    """For every other vocabulary: decodes the tokens of the last piece with the new ones, and shows the difference.

    The library's own DecodeStream holds text that ends in U+FFFD, for ever if that character is literal or its bytes
    are invalid (and repeats text when restarted). Here text is held only while it can begin a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # A window that began within a run of byte tokens would decode the whole run as invalid.
        self._shown = list(dropwhile(tokenizer.is_byte_token, prompt[-PRIMING_TOKENS:]))
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        if _is_partial_character(b"".join(map(self._tokenizer.token_bytes, self._held))):
            return ""
        return self.finish()

    def finish(self) -> str:
        if not self._held:
            return ""
        before = self._tokenizer.decode(self._shown, self._skip)
        after = self._tokenizer.decode(self._shown + self._held, self._skip)
        if after != before:
            self._shown = self._held
        else:  # nothing visible (a special token): the context before it still decides about spaces
            self._shown = self._shown + self._held
        self._held = []
        same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        return after[same:]


def _is_partial_character(value: bytes) -> bool:
    """Does `value` end in a proper prefix of a UTF-8 character?"""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(value)
    pending: bytes = decoder.getstate()[0]
    return bool(pending)


class Detokenizer:
    """The text of one output.

    `push` and `finish` return the characters that may be shown now. `stopped` is the stop string that matched.
    `num_chars` counts the characters decoded so far (held ones too): the offset of the next token's text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: StopConditions | None = None,
        skip_special_tokens: bool = True,
        prompt: Sequence[int] = (),
    ) -> None:
        self._stop = stop or StopConditions()
        self._stream: CharacterStream
        if tokenizer.is_byte_level:
            self._stream = ByteLevelStream(tokenizer, skip_special_tokens)
        else:
            self._stream = WindowStream(tokenizer, skip_special_tokens, prompt)
        self._window = ""  # characters a stop string may still begin in
        self._num_shown = 0  # of `_window`: already returned (only with include_in_output)
        self._unchecked = 0  # leading characters of `_window` that lie within the first min_tokens tokens
        self._num_tokens = 0
        self.num_chars = 0
        self.stopped: str | None = None

    def push(self, token_id: int, is_hidden: bool = False) -> str:
        """Take one token; `is_hidden` for the stop id, which counts as a token but shows no text."""
        assert self.stopped is None, "the output has ended"
        self._num_tokens += 1
        return self._show("" if is_hidden else self._stream.push(token_id))

    def finish(self) -> str:
        """The rest: incomplete characters as U+FFFD, and what was held for a stop string that did not come."""
        if self.stopped is not None:
            return ""
        shown = self._show(self._stream.finish())
        if self.stopped is not None:
            return shown
        rest = self._window[self._num_shown :]
        self._window, self._num_shown = "", 0
        return shown + rest

    def _show(self, piece: str) -> str:
        self.num_chars += len(piece)
        if not self._stop.strings:
            return piece
        if not piece:
            return ""
        self._window += piece
        if self._num_tokens <= self._stop.min_tokens:
            self._unchecked = len(self._window)
        match = first_match(self._window, self._stop.strings, self._unchecked)
        if match is None:
            return self._advance()
        start, self.stopped = match
        end = start + len(self.stopped) if self._stop.include_in_output else start
        self.num_chars += end - len(self._window)
        return self._window[self._num_shown : max(end, self._num_shown)]

    def _advance(self) -> str:
        """Show what can no longer be part of a stop string; keep the rest in the window."""
        keep = held_suffix_len(self._window, self._stop.strings)
        settled = len(self._window) - keep
        if self._stop.include_in_output:
            shown, self._num_shown = self._window[self._num_shown :], keep
        else:
            shown = self._window[:settled]
        self._window = self._window[settled:]
        self._unchecked = max(0, self._unchecked - settled)
        return shown


def first_match(text: str, stops: Sequence[str], min_end: int = 0) -> tuple[int, str] | None:
    """The match that is complete first (the longest, if several end together): (start, stop string) or None.

    "Complete first" rather than "begins first" makes the result independent of how the text was cut into tokens.
    Matches that end at or before `min_end` do not count.
    """
    best: tuple[int, int, str] | None = None
    for stop in stops:
        start = text.find(stop, max(0, min_end + 1 - len(stop)))
        if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
            best = (start + len(stop), start, stop)
    return None if best is None else (best[1], best[2])


def held_suffix_len(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string: at most max(len(stop)) - 1."""
    longest = 0
    for stop in stops:
        start = max(0, len(text) - len(stop) + 1)
        while (start := text.find(stop[0], start)) >= 0:
            if len(text) - start <= longest:
                break
            if stop.startswith(text[start:]):
                longest = len(text) - start
                break
            start += 1
    return longest
