"""`response_format`, `structured_outputs` and the older `guided_*` names, as the scheduler's `Grammar`.

Only size and shape are judged here; the engine compiles the grammar off its loop and answers 400 if it cannot.
"""

from __future__ import annotations

import json
from typing import Any

from scheduler.types import Grammar, GrammarKind
from server.api.errors import ApiError, invalid, shown, unsupported
from server.api.schema import GenerationBody
from server.api.settings import Limits


def read_grammar(body: GenerationBody, limits: Limits) -> Grammar | None:
    """The one constraint of a body, or None. Raises ApiError 400 naming the field."""
    found: list[tuple[str, Grammar]] = []
    for name, value in (
        ("guided_json", body.guided_json),
        ("guided_regex", body.guided_regex),
        ("guided_choice", body.guided_choice),
        ("guided_grammar", body.guided_grammar),
    ):
        if value is not None:
            found.append((name, _from_option(name, name.removeprefix("guided_"), value)))
    if body.structured_outputs is not None:
        found += _from_structured_outputs(body.structured_outputs)
    if body.response_format is not None:
        grammar = _from_response_format(body.response_format)
        if grammar is not None:
            found.append(("response_format", grammar))
    if len(found) > 1:
        raise invalid(found[1][0], f"{found[0][0]} and {found[1][0]} are both given; an output has one constraint")
    if not found:
        return None
    name, grammar = found[0]
    _check_size(name, grammar, limits)
    return grammar


def grammar_field(body: GenerationBody) -> str:
    """The field that a body's grammar came from, for errors found when it is compiled."""
    names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
    return next((name for name in names if getattr(body, name)), "response_format")


def _from_response_format(value: dict[str, Any]) -> Grammar | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(GrammarKind.JSON_OBJECT, "")
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if not isinstance(schema, dict | bool):
            raise invalid("response_format", "response_format of type json_schema needs json_schema.schema, an object")
        return Grammar(GrammarKind.JSON_SCHEMA, _compact(schema))
    if kind in ("structural_tag", "grammar", "python"):
        raise unsupported("response_format", f"response_format of type {kind} is not supported")
    raise invalid("response_format", "response_format.type must be text, json_object or json_schema")


def _from_structured_outputs(value: dict[str, Any]) -> list[tuple[str, Grammar]]:
    found = []
    for key, option in value.items():
        if key == "json_object":
            if option is True:
                found.append(("structured_outputs", Grammar(GrammarKind.JSON_OBJECT, "")))
            elif option is not False:
                raise invalid("structured_outputs", "structured_outputs.json_object must be true or false")
        elif key in ("json", "regex", "choice", "grammar"):
            found.append(("structured_outputs", _from_option("structured_outputs", key, option)))
        else:
            raise unsupported("structured_outputs", f"structured_outputs.{shown(key)} is not supported")
    return found


def _from_option(name: str, kind: str, value: Any) -> Grammar:
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise invalid(name, f"{name} holds a JSON schema as text that is not valid JSON") from error
        if not isinstance(value, dict | bool):
            raise invalid(name, f"{name} must be a JSON schema, an object")
        return Grammar(GrammarKind.JSON_SCHEMA, _compact(value))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise invalid(name, f"{name} must be a list of non-empty strings")
        return Grammar(GrammarKind.CHOICE, _compact(value))
    if not isinstance(value, str) or not value:
        raise invalid(name, f"{name} must be a non-empty string")
    return Grammar(GrammarKind.REGEX if kind == "regex" else GrammarKind.LARK, value)


def _check_size(name: str, grammar: Grammar, limits: Limits) -> None:
    size = len(grammar.source.encode())
    if size > limits.max_grammar_bytes:
        raise invalid(name, f"{name} has {size} bytes, the limit is {limits.max_grammar_bytes}")
    depth = _depth(grammar.source)
    if depth > limits.max_grammar_depth:
        raise invalid(name, f"{name} is nested {depth} levels deep, the limit is {limits.max_grammar_depth}")


def _depth(source: str) -> int:
    """Deepest nesting of brackets, wherever they stand: an upper bound good enough for a limit."""
    depth = deepest = 0
    for char in source:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    return deepest


def _compact(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the JSON schema is not valid JSON") from error
