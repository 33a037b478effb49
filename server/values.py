"""How the values of settings are written, on the command line and in YAML: counts, lists, tables, and their checks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from scheduler.policies import POLICIES

_SUFFIXES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_count(text: object) -> object:
    """32k = 32,000; 32Ki or 32KiB = 32,768; 2GB = 2,000,000,000. What is not such a text is left for pydantic."""
    if isinstance(text, bool):
        raise ValueError("expected a whole number")
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError("expected a whole number, with a suffix k, M, G, Ki, Mi or Gi if you like (32k, 2GiB)")
    return int(float(match[1]) * _SUFFIXES[(match[2] or "").lower()])


def _auto(text: object) -> object:
    return None if text == "auto" else text


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
AutoCount = Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(lambda text: parse_count(_auto(text)))]
Auto = BeforeValidator(_auto)
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def setting(default: Any, text: str, group: str, **limits: Any) -> Any:
    """A field with its help text; `group` is its heading in --help and the README."""
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)


def settings_of(group: str) -> Callable[..., Any]:
    """`setting` for one group."""
    return lambda default, text, **limits: setting(default, text, group, **limits)


def parse_listed(value: object) -> object:
    """`a,b,c`, or a list in a file; the flag may also be repeated."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    parts = [part.strip() for item in items for part in str(item).split(",")]
    if not all(parts):
        raise ValueError("expected names with commas between them")
    if len(set(parts)) < len(parts):
        raise ValueError("a name is given twice")
    return tuple(parts)


def parse_table(value: object) -> object:
    """`1:8,4:4`: pairs of whole numbers, the first ascending; a list of pairs in a file."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", value)
        if found is None:
            raise ValueError("expected pairs such as 1:8,4:4 (up to 1 sequence 8 drafts, up to 4 sequences 4)")
        value = [part.split(":") for part in value.split(",")]
    if not isinstance(value, list | tuple):
        return value
    if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise ValueError("expected pairs of whole numbers")
    pairs = tuple((int(str(most)), int(str(drafts))) for most, drafts in value)
    if any(after[0] <= before[0] for before, after in itertools.pairwise(pairs)):
        raise ValueError("the numbers of sequences must ascend")
    return pairs


def _known_policy(value: object) -> object:
    if value is not None and value not in POLICIES:
        raise ValueError(f"there are {', '.join(POLICIES)}")
    return value


PolicyName = Annotated[str | None, BeforeValidator(lambda value: _known_policy(_auto(value)))]
Listed = Annotated[tuple[str, ...] | None, BeforeValidator(lambda value: parse_listed(_auto(value)))]


def _switch(value: object) -> object:
    """YAML reads the words on and off as truth values."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def parse_shares(value: object) -> object:
    """`3,1`: whole numbers above 0; a list in a file."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    shares = tuple(int(text) if (text := str(item).strip()).isdecimal() else 0 for item in items)
    if 0 in shares:
        raise ValueError("expected whole numbers above 0 with commas between them, such as 3,1")
    return shares


Shares = Annotated[tuple[int, ...], BeforeValidator(lambda value: parse_shares(() if value == "auto" else value))]
Switch = BeforeValidator(_switch)
Table = Annotated[tuple[tuple[int, int], ...], BeforeValidator(parse_table)]
