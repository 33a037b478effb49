"""Structured output: grammars compiled once per source, one matcher per sequence, one bit mask per judged row.

llguidance does the matching (https://github.com/guidance-ai/llguidance); its own limits bound the work of a compile and
of a step, and the size of the source bounds the rest. A grammar is never approximated: what cannot be enforced exactly
is refused. A matcher follows a sequence's own tokens only, by position, so that a repeated step finds it where it was.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.types import Grammar, GrammarKind, Request
from server.worker.grammar_library import llguidance

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE_BYTES = {
    GrammarKind.JSON_OBJECT: 1 << 16,
    GrammarKind.JSON_SCHEMA: 1 << 16,
    GrammarKind.CHOICE: 1 << 16,
    GrammarKind.REGEX: 1 << 13,
    GrammarKind.LARK: 1 << 14,
}
MAX_DEPTH = 32
"""Nesting of a JSON schema: real ones stay below ten, bombs do not."""
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between JSON tokens. Bounded: without a bound, a model that likes white space writes it until max_tokens."""
LEXER_FUEL = 200_000
"""Work of preparing a lexer, a fifth of the library's default: `(a{900}){1000}` took 3 s of a core, now 0.3 s."""
MAX_CACHED = 64
"""Compiled grammars kept for requests to come, least recently used out first."""


class GrammarMask(NamedTuple):
    """What a grammar allows on one row.

    bits         int32 [ceil(V / 32)], a bit per allowed token
    is_complete  nothing but the end may follow
    error        why there is no mask: the grammar failed, or a draft before the row is not its
    """

    bits: NDArray[np.int32]
    is_complete: bool = False
    error: str | None = None


class GrammarMatcher:
    """Where one sequence stands in its grammar: after the output tokens of the history it last caught up with.

    Drafts are only ever looked at: whatever a method follows besides the history, it takes back.
    """

    def __init__(
        self, compiled: LLMatcher, vocab_size: int, eos_ids: Sequence[int], stop_ids: Sequence[int], num_prompt: int
    ) -> None:
        """compiled: pristine, never changed here; stop_ids: what may end a complete output besides EOS; num_prompt:
        where the output begins in a history."""
        self._compiled, self._matcher = compiled, compiled.deep_copy()
        self._vocab_size, self._eos_ids, self._num_prompt = vocab_size, frozenset(eos_ids), num_prompt
        self._stop_ids = np.asarray(stop_ids, dtype=np.int64)
        self._num_seen = num_prompt

    def catch_up(self, history: Sequence[int]) -> str | None:
        """Follow the output tokens of `history` not followed yet; an error message if the grammar forbids one."""
        for token in history[self._num_seen :]:
            if not self._matcher.consume_token(token):
                return f"the output left its grammar at output token {token}: {_one_line(self._matcher.get_error())}"
        self._num_seen = max(self._num_seen, len(history))
        return None

    def masks(self, paths: Sequence[Sequence[int]]) -> list[GrammarMask]:
        """The mask after each path of drafts; () is the mask of the history itself. Neighbours should share prefixes.

        A path that the grammar forbids, and what would follow an end of sequence, has an error in its mask.
        """
        found, followed, num_seen = [], list[int](), self._num_seen
        for path in paths:
            followed = self._follow(followed, path) if self._num_seen == num_seen else []
            if len(followed) < len(path) or self._num_seen != num_seen:
                found.append(GrammarMask(self._no_bits(), error="a draft before this row is not the grammar's"))
            else:
                found.append(self._mask())
        self._go_back(len(followed))
        return found

    def mask_after(self, history: Sequence[int], drafts: Sequence[int]) -> GrammarMask:
        """The mask after `drafts` behind `history`, which may be ahead of the matcher."""
        return self.masks([(*history[self._num_seen :], *drafts)])[0]

    def num_legal(self, history: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of `drafts` may follow one after the other after `history`, which may be ahead of the matcher."""
        tokens = list(history[self._num_seen :])
        num_ahead = len(tokens)
        for draft in drafts:
            if not 0 <= draft < self._vocab_size:
                break
            tokens.append(draft)
        num_valid = self._matcher.validate_tokens(tokens)
        if self._matcher.is_error():
            self._restart()
            return 0
        return max(0, int(num_valid) - num_ahead)

    def forced(self, history: Sequence[int]) -> list[int]:
        """Tokens that must follow `history`, which may be ahead of the matcher: the grammar leaves no choice."""
        ahead = list(history[self._num_seen :])
        followed = self._follow([], ahead)
        tokens = list(self._matcher.compute_ff_tokens()) if followed == ahead and not self._matcher.is_stopped() else []
        self._go_back(len(followed))
        return tokens

    def _follow(self, followed: list[int], path: Sequence[int]) -> list[int]:
        """Go from after `followed` to after `path`, or as far as the grammar allows; where it got to."""
        common = 0
        while common < min(len(followed), len(path)) and followed[common] == path[common]:
            common += 1
        if not self._go_back(len(followed) - common):
            return []
        reached = list(path[:common])
        for token in path[common:]:
            # A consumed end of sequence cannot be rolled back, and nothing of use comes after it.
            is_end = token in self._eos_ids or self._matcher.is_stopped()
            if is_end or not 0 <= token < self._vocab_size or self._matcher.validate_tokens([token]) != 1:
                break
            if not self._matcher.consume_token(token):
                break
            reached.append(token)
        return reached

    def _go_back(self, num_tokens: int) -> bool:
        """Take back what was followed besides the history; False if the matcher broke on the way and began anew."""
        if not self._matcher.is_error() and (num_tokens == 0 or self._matcher.rollback(num_tokens)):
            return True
        self._restart()
        return False

    def _restart(self) -> None:
        """A draft drove the matcher beyond its limits, which it does not survive: the next `catch_up` begins anew."""
        self._matcher = self._compiled.deep_copy()
        self._num_seen = self._num_prompt

    def _no_bits(self) -> NDArray[np.int32]:
        return np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)

    def _mask(self) -> GrammarMask:
        bits = self._no_bits()
        llguidance().numpy.fill_next_token_bitmask(self._matcher, bits[np.newaxis])
        if self._matcher.is_error():
            return GrammarMask(bits, error=f"the grammar could not be followed: {_one_line(self._matcher.get_error())}")
        is_complete = bool(self._matcher.is_stopped())
        if is_complete and self._stop_ids.size:
            # All that is left is to end; the request may have ends of its own.
            np.bitwise_or.at(
                bits.view(np.uint32), self._stop_ids // 32, np.uint32(1) << (self._stop_ids % 32).astype(np.uint32)
            )
        return GrammarMask(bits, is_complete)


class GrammarCompiler:
    """Compiles requests' grammars against one tokenizer. `prepare` may run in any thread; the rest is the loop's."""

    def __init__(self, tokenizer_file: Path | None, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """tokenizer_file: a `tokenizer.json`, or None where the model has none and grammars are refused."""
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._cache: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._prepared: dict[str, LLMatcher] = {}

    def prepare(self, request: Request) -> None:
        """Compile the request's grammar, if it has one. Slow for large ones; raises ValueError saying what is wrong."""
        grammar = request.sampling.grammar
        if grammar is not None:
            self._prepared[request.id] = self._compiled(grammar)

    def forget(self, request_id: str) -> None:
        self._prepared.pop(request_id, None)

    @property
    def num_prepared(self) -> int:
        return len(self._prepared)

    def matcher(self, request: Request) -> GrammarMatcher | None:
        """A fresh matcher for one sequence of the request, before its first output token."""
        if request.sampling.grammar is None:
            return None
        compiled = self._prepared.get(request.id) or self._compiled(request.sampling.grammar)
        return GrammarMatcher(compiled, self._vocab_size, self._eos_ids, request.stop_ids, len(request.prompt))

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            cached = self._cache.get(grammar)
            if cached is not None:
                self._cache.move_to_end(grammar)
                return cached
            tokenizer = self._tokenizer = self._tokenizer or self._load_tokenizer()
        matcher = compile_grammar(grammar, tokenizer)
        with self._lock:
            self._cache[grammar] = matcher
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        if self._tokenizer_file is None:
            raise ValueError("structured output needs the model's tokenizer.json, and this model has none")
        if not self._eos_ids:
            raise ValueError("structured output needs an end-of-sequence token, and this model's config names none")
        library = llguidance()
        try:
            text = self._tokenizer_file.read_text(encoding="utf-8")
            return library.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_ids)
        except Exception as error:
            raise ValueError(f"structured output cannot use this model's tokenizer.json: {error}") from error


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """Compile a grammar, bounded in size and work. Raises ValueError with a sentence for the user."""
    name, size, library = grammar.kind.value, len(grammar.source.encode()), llguidance()
    if size > (most := MAX_SOURCE_BYTES[grammar.kind]):
        raise ValueError(f"the {name} grammar is {size} bytes long; at most {most} are accepted")
    limits = library.LLParserLimits(verbose_errors=False, initial_lexer_fuel=LEXER_FUEL)
    matcher: LLMatcher = library.LLMatcher(tokenizer, _source(grammar), log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(f"the {name} grammar cannot be used: {_one_line(matcher.get_error())}")
    # The first mask shows what the compile could not: a grammar that allows nothing, or is beyond the step limits.
    mask = np.zeros((1, (tokenizer.vocab_size + 31) // 32), dtype=np.int32)
    library.numpy.fill_next_token_bitmask(matcher, mask)
    if matcher.is_error():
        raise ValueError(f"the {name} grammar cannot be used: {_one_line(matcher.get_error())}")
    if not mask.any():
        raise ValueError(f"the {name} grammar cannot be used: no token of this model can begin it")
    return matcher


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation."""
    notation, kind, source = llguidance().LLMatcher, grammar.kind, grammar.source
    if kind is GrammarKind.REGEX:
        return str(notation.grammar_from_regex(source))
    if kind is GrammarKind.LARK:
        return str(notation.grammar_from_lark(source))
    if kind is GrammarKind.CHOICE:
        return str(notation.grammar_from_lark(_choice_lark(source)))
    schema = {"type": "object"} if kind is GrammarKind.JSON_OBJECT else _parsed(source, "json_schema")
    if not isinstance(schema, dict | bool):
        raise ValueError("the json_schema grammar is not a JSON object")
    if depth(schema) > MAX_DEPTH:
        raise ValueError(f"the json_schema grammar is nested deeper than {MAX_DEPTH} levels")
    return str(notation.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": WHITE_SPACE}))


def _choice_lark(source: str) -> str:
    choices = _parsed(source, "choice")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("the choice grammar must be a JSON list of at least one non-empty string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _parsed(source: str, name: str) -> object:
    try:
        value: object = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {name} grammar is not valid JSON: {error}") from None
    return value


def _one_line(message: str) -> str:
    return " ".join(message.split())


def depth(value: object) -> int:
    """Levels of nesting of a JSON value, found without recursion."""
    level, layer = 0, [value]
    while layer:
        level += 1
        children: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                children.extend(item.values())
            elif isinstance(item, list):
                children.extend(item)
        layer = children
    return level
