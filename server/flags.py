"""The command line and configuration files, read into a `ServerConfig`; the command line wins over the file.

A file is YAML with the flags' names as keys, without the dashes in front: `max-model-len: 4096`.
"""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from server.config import ServerConfig


class ConfigError(Exception):
    """What is wrong with the command line or a file: one line per problem, for a person."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def is_bool(field: FieldInfo) -> bool:
    return field.annotation is bool


def is_repeatable(field: FieldInfo) -> bool:
    return bool(field.annotation == tuple[str, ...])


def describe_default(field: FieldInfo) -> str:
    """As the table and --help show it."""
    if is_bool(field):
        return "on" if field.default else "off"
    if field.default is None:
        return "auto" if "auto" in (field.description or "") else "-"
    if field.default == ():
        return "-"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The values of a Literal field."""
    annotation: Any = field.annotation
    options = annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
    options = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Union else options
    return tuple(
        value for option in options if typing.get_origin(option) is typing.Literal for value in option.__args__
    )


def groups() -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    """(heading, its fields) in the order of declaration."""
    found: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in ServerConfig.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        found.setdefault(str(extra["group"]), []).append((name, field))
    yield from found.items()


def make_parser(program: str = "python -m server serve") -> argparse.ArgumentParser:
    parser = _Parser(program, description="Serve a model.", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of the settings below; flags win over it"
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings in force as YAML, and exit")
    for heading, fields in groups():
        group = parser.add_argument_group(heading)
        for name, field in fields:
            _add(group, name, field)
    return parser


def _add(group: Any, name: str, field: FieldInfo) -> None:
    text = f"{field.description} [{describe_default(field)}]".replace("%", "%%")
    if name == "model":
        group.add_argument("model", nargs="?", metavar="MODEL", help=text)
    elif is_bool(field):
        group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=text)
    else:
        choices = choices_of(field)
        action = "append" if is_repeatable(field) else "store"
        group.add_argument(flag_of(name), action=action, metavar="|".join(choices) or "VALUE", help=text)


def parse(arguments: Sequence[str]) -> tuple[ServerConfig, bool]:
    """(the configuration, whether --print-config was given). Raises ConfigError; `--help` prints and exits."""
    parser = make_parser()
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError("; ".join(_unknown(argument, _flags(parser)) for argument in unknown))
    values = vars(known)
    should_print = values.pop("print_config", False)
    path = values.pop("config", None)
    if values.get("model", "") is None:
        del values["model"]
    merged = {**(read_file(path) if path is not None else {}), **values}
    return validate(merged), should_print


def validate(values: dict[str, Any]) -> ServerConfig:
    """Raises ConfigError naming each bad setting, its value and what was expected."""
    try:
        return ServerConfig(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(dict(item)) for item in error.errors())) from None


def read_file(path: Path) -> dict[str, Any]:
    """Settings of a YAML file by field name. Raises ConfigError naming the file and the key."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected settings as `name: value`, found a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in ServerConfig.model_fields:
            names = [field.replace("_", "-") for field in ServerConfig.model_fields]
            raise ConfigError(f"--config {path}: unknown setting {str(key)!r}{_nearest(str(key), names)}")
        if name in values:
            raise ConfigError(f"--config {path}: {str(key)!r} is given twice")
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def dump(config: ServerConfig) -> str:
    """The settings in force as YAML that `--config` reads; keys of the API are not shown."""
    values = config.model_dump(mode="json")
    if values["api_key"]:
        values["api_key"] = ["(hidden)"] * len(values["api_key"])
    return yaml.safe_dump({name.replace("_", "-"): value for name, value in values.items()}, sort_keys=False)


def table() -> str:
    """The README's list of flags (Markdown)."""
    lines = []
    for heading, fields in groups():
        lines += [f"**{heading}**", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        for name, field in fields:
            flag = "MODEL" if name == "model" else flag_of(name)
            flag = f"{flag}, --no-{name.replace('_', '-')}" if is_bool(field) else flag
            choices = choices_of(field)
            text = f"{field.description} ({', '.join(choices)})" if choices else field.description
            lines.append(f"| `{flag}` | {describe_default(field)} | {text} |")
        lines.append("")
    return "\n".join(lines)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def _unknown(argument: str, flags: list[str]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    name = argument.split("=")[0]
    return f"unknown flag {name}{_nearest(name, flags)}"


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else "; --help lists them"


def _problem(item: dict[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    name = str(item["loc"][0])
    label = "MODEL" if name == "model" else flag_of(name)
    return f"{label} is {item['input']!r}: {message[:1].lower()}{message[1:]}"
