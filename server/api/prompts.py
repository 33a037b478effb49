"""What a client may give as a prompt, in every spelling, as `RawPrompt`s that know their size before tokenizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.errors import ApiError, invalid, shown, unsupported
from server.api.schema import ChatFields, Message
from server.api.settings import Limits
from server.text.chat import ALLOWED_KWARGS, ChatTemplate, ChatTemplateError
from server.text.tokenizer import Tokenizer

CHUNK = 1 << 13
"""Token ids checked in one call into C, which lets no other thread run."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and how to render them."""

    template: ChatTemplate
    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """Exactly one of `text`, `ids` and `conversation`. `num_bytes` is the size of the text in UTF-8."""

    text: str | None = None
    ids: tuple[int, ...] | None = None
    conversation: Conversation | None = None
    num_bytes: int = 0
    add_special_tokens: bool = True

    def encode(self, tokenizer: Tokenizer) -> Sequence[int]:
        """Token ids; slow for long texts. Raises ApiError 400 where the chat template refuses."""
        if self.ids is not None:
            return self.ids
        if self.text is not None:
            return tokenizer.encode(self.text, self.add_special_tokens)
        assert self.conversation is not None
        talk = self.conversation
        try:
            return talk.template.encode(
                talk.messages,
                talk.add_generation_prompt,
                talk.continue_final_message,
                talk.add_special_tokens,
                talk.kwargs,
            )
        except ChatTemplateError as error:
            raise invalid("messages", str(error)) from error


def read_prompts(value: Any, vocab_size: int, limits: Limits, add_special_tokens: bool = True) -> tuple[RawPrompt, ...]:
    """The `prompt` field: a string, strings, token ids, or lists of token ids. Raises ApiError 400."""
    if value is None:
        raise invalid("prompt", "prompt is missing; give a string, a list of strings, or token ids")
    if isinstance(value, str):
        return (_text(value, add_special_tokens),)
    if not isinstance(value, list):
        raise invalid("prompt", f"prompt is {_kind(value)}, but must be a string, a list of strings, or token ids")
    if not value:
        raise invalid("prompt", "prompt is an empty list")
    if type(value[0]) is int:
        return (_ids(value, vocab_size),)
    if len(value) > limits.max_prompts:
        raise invalid("prompt", f"prompt has {len(value)} prompts, the limit is {limits.max_prompts}")
    if isinstance(value[0], str) and all(isinstance(item, str) for item in value):
        return tuple(_text(item, add_special_tokens) for item in value)
    if isinstance(value[0], list) and all(isinstance(item, list) for item in value):
        return tuple(_ids(item, vocab_size) for item in value)
    raise invalid("prompt", "prompt must hold only strings, only token ids, or only lists of token ids")


def _text(value: str, add_special_tokens: bool) -> RawPrompt:
    if not value:
        raise invalid("prompt", "the prompt is empty; give at least one character")
    return RawPrompt(text=value, num_bytes=len(value.encode()), add_special_tokens=add_special_tokens)


def _ids(value: list[Any], vocab_size: int) -> RawPrompt:
    if not value:
        raise invalid("prompt", "prompt holds an empty list of token ids")
    for start in range(0, len(value), CHUNK):
        _check_ids(value[start : start + CHUNK], vocab_size)
    return RawPrompt(ids=tuple(value))


def _check_ids(ids: list[Any], vocab_size: int) -> None:
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return
    for item in ids:
        if type(item) is not int:
            raise invalid("prompt", f"prompt mixes token ids with {_kind(item)}")
        if not 0 <= item < vocab_size:
            raise invalid("prompt", f"prompt holds {shown(item)}; token ids of this model are 0 to {vocab_size - 1}")


def read_conversation(body: ChatFields, template: ChatTemplate | None, limits: Limits) -> RawPrompt:
    """The `messages` of a chat body. Raises ApiError 400."""
    _check_tools(body)
    if template is None:
        raise ApiError(
            400, "this model has no chat template; use /v1/completions with a prompt", "messages", "no_chat_template"
        )
    if not body.messages:
        raise invalid("messages", "messages is missing or empty; give at least one message")
    if len(body.messages) > limits.max_messages:
        raise invalid("messages", f"messages has {len(body.messages)} entries, the limit is {limits.max_messages}")
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise invalid("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")
    for name, value in body.chat_template_kwargs.items():
        if name not in ALLOWED_KWARGS:
            allowed = ", ".join(sorted(ALLOWED_KWARGS))
            raise unsupported("chat_template_kwargs", f"chat_template_kwargs.{shown(name)} is not one of {allowed}")
        if not isinstance(value, bool | int | float | str | None):
            raise invalid("chat_template_kwargs", f"chat_template_kwargs.{name} must be a plain value")
    messages = tuple(_message(i, message) for i, message in enumerate(body.messages))
    conversation = Conversation(
        template,
        messages,
        body.add_generation_prompt and not body.continue_final_message,
        body.continue_final_message,
        bool(body.add_special_tokens),
        dict(body.chat_template_kwargs),
    )
    return RawPrompt(
        conversation=conversation,
        num_bytes=sum(len(str(message.get("content") or "").encode()) for message in messages),
    )


def _check_tools(body: ChatFields) -> None:
    if body.tools is None:
        if body.tool_choice is not None:
            raise invalid("tool_choice", "tool_choice is given without tools")
        return
    if not body.tools:
        raise invalid("tools", "tools is an empty list; leave it out")
    if body.tool_choice != "none":
        raise unsupported(
            "tools", 'tools are not supported by this server yet; leave them out or set tool_choice to "none"'
        )


def _message(index: int, message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if message.role == "tool" and not message.tool_call_id:
        raise invalid("messages", f"messages[{index}]: a message of role tool needs a tool_call_id")
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise invalid("messages", f"messages[{index}].content is missing")
    # "developer" is OpenAI's newer word for "system"; open models' templates know only the latter.
    rendered: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    optional = {
        "name": message.name,
        "tool_calls": message.tool_calls,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": reasoning,
    }
    rendered.update({name: value for name, value in optional.items() if value is not None})
    return rendered


def _kind(value: Any) -> str:
    names = {
        bool: "a boolean",
        float: "a fraction",
        int: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
