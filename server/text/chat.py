"""Messages to a prompt, with the model's own template in a sandbox.

The template comes with the model and is not trusted: immutable sandbox, bounded loops, bounded output, a deadline.
Rendering may take long, so the caller runs it off the event loop. Message content never becomes a special token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from server.text.tokenizer import Tokenizer

ALLOWED_KWARGS = frozenset({"enable_thinking", "thinking", "reasoning_effort", "thinking_budget"})
"""Template variables a client may set (S-45): scalars, by name; anything else could override ours."""

BREAKERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Unicode noncharacters; one that no message uses marks where a special-token string in content is broken up."""


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the message is fit for the client."""


class ChatTemplate:
    """A compiled template.

    max_loops   items all `for` loops and ranges of one rendering may produce together
    max_chars   characters of output
    deadline_s  wall time, checked at every loop item and output piece
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        max_loops: int = 100_000,
        max_chars: int = 1 << 22,
        deadline_s: float = 5.0,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_loops, self._max_chars, self._deadline_s = max_loops, max_chars, deadline_s
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template does not compile: {error}") from error

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the rendered messages. Raises ChatTemplateError."""
        breaker = _unused_breaker(messages)
        safe = [_broken_up(message, self._tokenizer.special_texts, breaker) for message in messages]
        text = self.render(safe, add_generation_prompt, kwargs)
        if continue_final_message:
            text = _cut_after_last_content(text, safe[-1])
        ids: list[int] = []
        for i, piece in enumerate(text.split(breaker)):
            ids += self._tokenizer.encode(piece, add_special_tokens=add_special_tokens and i == 0) if piece else []
        return ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The template's text for `messages`. Raises ChatTemplateError."""
        meter = _Meter(self._max_loops, time.monotonic() + self._deadline_s)
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                **(kwargs or {}),
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._tokenizer.bos_token or "",
                eos_token=self._tokenizer.eos_token or "",
                tools=None,
                documents=None,
                _meter=meter,
            ):
                num_chars += len(piece)
                meter.tick()
                if num_chars > self._max_chars:
                    raise ChatTemplateError(f"the chat template gave more than {self._max_chars} characters")
                pieces.append(piece)
        except ChatTemplateError:
            raise
        except RecursionError as error:
            raise ChatTemplateError("the chat template recurses too deeply") from error
        except Exception as error:  # template code can raise anything; all of it is about this request
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {str(error)[:200]}") from error
        return "".join(pieces)


class _Meter:
    """Loop items and time used by one rendering."""

    def __init__(self, max_loops: int, deadline: float) -> None:
        self._left, self._deadline = max_loops, deadline

    def tick(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ChatTemplateError("the chat template loops too often")
        if time.monotonic() > self._deadline:
            raise ChatTemplateError("the chat template takes too long")


class _LimitedContext(jinja2.runtime.Context):
    """Hands the rendering's meter to the loops."""


class _LimitedCodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles every `for` over `environment.metered(context, items)`, so that each item is counted."""

    def visit_For(self, node: jinja2.nodes.For, frame: Any) -> None:
        metered = jinja2.nodes.Call(
            jinja2.nodes.EnvironmentAttribute("metered"),
            [jinja2.nodes.ContextReference(), node.iter],
            [],
            None,
            None,
        )
        metered.set_lineno(node.lineno)
        if node.iter.environment is not None:
            metered.set_environment(node.iter.environment)
        node.iter = metered
        super().visit_For(node, frame)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with counted loops and no large repetitions (`'x' * 10**9`)."""

    code_generator_class = _LimitedCodeGenerator
    context_class = _LimitedContext
    intercepted_binops = frozenset({"*", "**"})

    def metered(self, context: jinja2.runtime.Context, items: Any) -> Any:
        meter = context.get_all().get("_meter")
        return items if meter is None else _MeteredItems(items, meter)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        for value, count in ((left, right), (right, left)):
            is_repetition = operator == "*" and isinstance(value, str | list | tuple) and isinstance(count, int)
            if is_repetition and len(value) * count > 100_000:
                raise ChatTemplateError("the chat template repeats a value too often")
        if operator == "**" and not (abs(left) <= 1 << 32 and abs(right) <= 64):
            raise ChatTemplateError("the chat template raises to too large a power")
        return super().call_binop(context, operator, left, right)


class _MeteredItems:
    """An iterable that ticks the meter; it keeps `len`, which `loop.length` and `loop.last` need."""

    def __init__(self, items: Any, meter: _Meter) -> None:
        self._items, self._meter = items, meter

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._meter.tick()
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: object) -> None:
    raise ChatTemplateError(f"the chat template refuses these messages: {str(message)[:200]}")


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _unused_breaker(messages: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps([dict(message) for message in messages], ensure_ascii=False)
    for breaker in BREAKERS:
        if breaker not in text:
            return breaker
    raise ChatTemplateError("messages use every Unicode noncharacter from U+FDD0 to U+FDEF")


def _broken_up(value: Any, specials: Sequence[str], breaker: str) -> Any:
    """`value` with a breaker inside each special-token string of its texts (S-42: content is never control)."""
    if isinstance(value, str):
        for special in specials:
            if special in value:
                value = value.replace(special, special[0] + breaker + special[1:])
        return value
    if isinstance(value, Mapping):
        return {key: _broken_up(item, specials, breaker) for key, item in value.items()}
    if isinstance(value, list):
        return [_broken_up(item, specials, breaker) for item in value]
    return value


def _cut_after_last_content(text: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ChatTemplateError("continue_final_message needs a last message with text content")
    for candidate in (content, content.strip()):
        found = text.rfind(candidate)
        if found >= 0:
            return text[: found + len(candidate)]
    raise ChatTemplateError("continue_final_message: the chat template changes the last message's content")
