"""Text to token ids and back, on the `tokenizers` library. No torch, no transformers.

A tokenizer is immutable after `load` and may be used from several threads. Whoever generates text token by token uses
`detokenizer.py`, never `decode` on pieces: pieces of a character are not text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders

MAX_NORMALIZER_SHRINK = 3
"""NFC can turn 9 bytes (three Hangul jamo) into 3; no common normalizer shrinks more."""


class TokenizerError(ValueError):
    """The tokenizer files are missing or unusable; the message says which and why."""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    id: int
    text: str


class Tokenizer:
    """Encode, decode and name tokens.

    vocab_size          ids are in [0, vocab_size)
    max_bytes_per_token longest text one token can stand for, in UTF-8 bytes; None = unbounded (unknown words collapse
                        into one token), then only the body limit protects
    chat_template       Jinja source, or None
    """

    def __init__(
        self, raw: RawTokenizer, config: dict[str, Any] | None = None, chat_template: str | None = None
    ) -> None:
        config = config or {}
        self.raw = raw
        self.vocab_size: int = raw.get_vocab_size(with_added_tokens=True)
        self.is_byte_level = isinstance(raw.decoder, decoders.ByteLevel)
        self.chat_template = chat_template
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self._byte_of_char = _byte_of_char()
        self._added = dict(raw.get_added_tokens_decoder())
        self.special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self.special_texts = tuple(sorted((self._added[i].content for i in self.special_ids), key=len, reverse=True))
        self.bos_id = raw.token_to_id(self.bos_token) if self.bos_token else None
        self.eos_id = raw.token_to_id(self.eos_token) if self.eos_token else None
        self._bytes_cache: dict[int, bytes] = {}
        self.max_bytes_per_token = self._longest_token_bytes()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` from a model folder.

        Raises TokenizerError naming the file. Without tokenizer.json, transformers (if installed) converts.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                raw = RawTokenizer.from_file(str(file))
            except Exception as error:  # the library raises bare Exception
                raise TokenizerError(f"{file} is not a usable tokenizer: {error}") from error
        else:
            raw = _converted_by_transformers(folder)
        return cls(raw, config, _read_chat_template(folder, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special-token strings in it become their ids."""
        # encode_batch releases the interpreter lock, encode does not: a long text must not stop the event loop.
        encodings = self.raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int, is_kept: bool = True) -> bytes:
        """The bytes a token stands for: part of a character where the vocabulary splits characters.

        is_kept  False for who looks at the whole vocabulary once: remembering it would take 20 MB
        """
        known = self._bytes_cache.get(token_id)
        if known is None:
            known = self._find_token_bytes(token_id)
            if is_kept:
                self._bytes_cache[token_id] = known
        return known

    def line_end_ids(self, most: int) -> tuple[int, ...]:
        """The first `most` ids whose text holds a line's end, special tokens aside. Looks at the whole vocabulary."""
        ids = (token for token in range(self.vocab_size) if token not in self.special_ids)
        return tuple(itertools.islice((i for i in ids if b"\n" in self.token_bytes(i, is_kept=False)), most))

    def token_text(self, token_id: int) -> str:
        """The token as text, or `bytes:\\xNN...` (OpenAI's form) where it is not whole characters."""
        value = self.token_bytes(token_id)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def is_byte_token(self, token_id: int) -> bool:
        """Is it a byte-fallback token, `<0xNN>`?"""
        token = self.raw.id_to_token(token_id)
        return not self.is_byte_level and token is not None and _is_byte_name(token)

    def _find_token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return str(added.content).encode()
        token = self.raw.id_to_token(token_id)
        if token is None:  # a hole in the vocabulary, or a padded embedding row
            return b""
        if self.is_byte_level:
            try:
                return bytes(self._byte_of_char[char] for char in token)
            except KeyError:
                return str(token).encode()
        if _is_byte_name(token):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("▁", " ").encode()

    def _longest_token_bytes(self) -> int | None:
        if not self.is_byte_level:
            return None
        # In the byte-level alphabet each character is one byte; added tokens are plain text.
        longest = max((len(token) for token in self.raw.get_vocab(with_added_tokens=False)), default=1)
        longest = max([longest, *(len(token.content.encode()) for token in self._added.values())])
        return longest * (MAX_NORMALIZER_SHRINK if self.raw.normalizer is not None else 1)


def _is_byte_name(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes stand for themselves, the rest for U+0100 onwards.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), byte-level BPE.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates: the one called "default"
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _converted_by_transformers(folder: Path) -> RawTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TokenizerError(f"{folder} has no tokenizer.json, and transformers is not there to convert it") from error
    try:
        fast = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise TokenizerError(f"{folder} has no tokenizer.json, and it could not be made: {error}") from error
    raw: RawTokenizer | None = getattr(fast, "backend_tokenizer", None)
    if raw is None:
        raise TokenizerError(f"{folder} has no tokenizer.json and no fast tokenizer")
    return raw
