"""The shapes of request bodies: names, types and defaults, nothing more. Values are judged in `validation.py`.

Strict: `true` is not 1, `"0.5"` is not 0.5. A null means "the default". Unknown fields are ignored (SDK users send
`extra_body`) and logged once. Fields that other engines have and this one does not are in `REFUSED` and `IGNORED`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from scheduler.policies import PARTS
from server.api.errors import ApiError, invalid, shown

REFUSED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "logprob_token_ids": ([],),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "stream_interval": (1,),
    "structural_tag": (),
    "functions": (),
    "function_call": (),
    "audio": (),
    "web_search_options": (),
    "documents": (),
    "chat_template": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "truncation_side": ("left",),
}
"""Field -> values that change nothing and are therefore accepted; any other value is a 400, never silently dropped."""

IGNORED = frozenset(
    {
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "metadata",
        "store",
        "service_tier",
        "verbosity",
        "parallel_tool_calls",
        "include_reasoning",
        "reasoning_effort",
        "request_id",
        "spaces_between_special_tokens",
    }
)
"""Accepted without effect: bookkeeping of the client's, or knobs that have no counterpart in an open model."""


NAMED_STEPS = frozenset(
    {
        *("role", "content", "type", "text", "include_usage", "continuous_usage_stats", "include_obfuscation"),
        *("mode", "max_tokens", "drafter", "verify", "tree", "quality", "include_snapshots"),
        *("policy", "selector", "planner", "cache", "stopper", "steps", "block_size", "gen_length"),
        *("confidence", "eos", "method", "budget", "lossless"),
    }
)
"""Inner names that an error message may show; others could be the client's own text."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False
    include_snapshots: bool = False


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["text"]
    text: str


class SpeculationFields(BaseModel):
    """`speculation`: how drafts may be used for this request. None of it changes the text of a seeded request, unless
    `verify` is not coupled. `mode` None = the server's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    mode: Literal["auto", "on", "off"] | None = None
    max_tokens: int | None = None
    drafter: str = "auto"
    verify: Literal["coupled", "rejection", "block"] = "coupled"
    tree: bool | None = None
    quality: Literal["exact"] = "exact"


class Prediction(BaseModel):
    """`prediction`: text that the client expects much of in the answer; drafts are looked up in it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    type: Literal["content"]
    content: str | list[TextPart]


def _with_parameters(schema: dict[str, Any]) -> None:
    """The catalogue's parameters in the OpenAPI document."""
    for methods in PARTS.values():
        for parameters in methods.values():
            for name, rule in parameters.items():
                kind = "integer" if rule.is_integer else "number"
                schema["properties"].setdefault(name, {"type": kind, "description": rule.meaning})


class DecodingFields(BaseModel):
    """`decoding`: how the answer is denoised. Other keys are parameters of the chosen methods, `name` or `part.name`
    (`scheduler/policies.py`); they and all values are judged in `decoding.py`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", json_schema_extra=_with_parameters)

    policy: str | None = None
    selector: str | None = None
    planner: str | None = None
    cache: str | None = None
    stopper: str | None = None
    steps: int | None = None
    block_size: int | None = None
    gen_length: int | None = None
    confidence: Literal["raw", "filtered"] | None = None
    eos: Literal["free", "never", "last"] | None = None


class AttentionFields(BaseModel):
    """`attention`: how many keys the tokens of the answer (method, budget, lossless, correct_every) and of the prompt
    (prefill) read.

    None = the server's default.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    method: str | None = None
    budget: int | None = None
    lossless: bool = False
    correct_every: int | None = None
    prefill: str | None = None
    prefill_threshold: float | None = None


class GenerationBody(BaseModel):
    """What completions and chat completions share."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    seed: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    speculation: SpeculationFields | None = None
    prediction: Prediction | None = None
    decoding: DecodingFields | None = None
    attention: AttentionFields | None = None
    user: str | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt` is a string, a list of strings, token ids, or a list of token-id lists."""

    prompt: Any = None
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True


class DenoiseBody(CompletionBody):
    """POST /v1/denoise/stream: a completion that is denoised and streamed, whatever the model's name says."""

    stream: bool = True


class Message(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatFields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    messages: list[Message] = []
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class ChatBody(GenerationBody, ChatFields):
    """POST /v1/chat/completions."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    modalities: list[str] = ["text"]
    echo: bool = False


class TokenizeBody(ChatFields):
    """POST /tokenize. Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # type: ignore[assignment]
    return_token_strs: bool = False


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = None
    tokens: Any = None


Body = TypeVar("Body", bound=BaseModel)

MAX_ENTRIES = 1 << 14
"""Of any list or object field; what each field takes is judged in `validation.py`."""


def read_fields(kind: type[Body], body: dict[str, Any]) -> tuple[Body, tuple[str, ...]]:
    """The typed body and the names of fields that nobody here knows. Raises ApiError 400 naming the field."""
    for name, harmless in REFUSED.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(item) and value == item for item in harmless):
            raise ApiError(400, f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
    for name, problem in _of_the_other_route(kind, body):
        raise ApiError(400, problem, name, "unsupported_parameter")
    known = kind.model_fields
    for name in known.keys() - {"prompt", "tokens"}:
        # Before any entry is looked at. Prompts have a limit of their own, the context's length.
        if isinstance(value := body.get(name), list | dict) and len(value) > MAX_ENTRIES:
            raise invalid(name, f"{name} has {len(value)} entries, the limit is {MAX_ENTRIES}")
    given = {name: _without_nulls(value) for name, value in body.items() if value is not None and name in known}
    try:
        typed = kind.model_validate(given)
    except ValidationError as error:
        raise _as_api_error(error) from error
    unknown = tuple(name for name in body if name not in known and name not in IGNORED and name not in REFUSED)
    return typed, unknown


def _of_the_other_route(kind: type[BaseModel], body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields that mean something on the other generation route only: to ignore max_completion_tokens would be to answer
    another question."""
    for mine, other, path in (
        (CompletionBody, ChatBody, "/v1/chat/completions"),
        (ChatBody, CompletionBody, "/v1/completions"),
    ):
        if issubclass(kind, mine):
            for name, field in other.model_fields.items():
                value = body.get(name)
                if name == "max_completion_tokens" and value == body.get("max_tokens"):
                    continue  # load generators send both, whatever the route
                if name not in mine.model_fields and value is not None and value != field.default:
                    yield name, f"{name} is a field of {path}; leave it out"


def _without_nulls(value: Any) -> Any:
    """Nulls inside option objects mean "default" as well."""
    return {key: item for key, item in value.items() if item is not None} if type(value) is dict else value


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    where = param or "body"
    if param == "decoding" and len(first["loc"]) > 1:
        param += f".{shown(first['loc'][1])}"
    if first["type"] == "extra_forbidden":
        return invalid(param, f"{where} has the unknown field {shown(first['loc'][-1])}", "unknown_field")
    for step in first["loc"][1:]:
        if isinstance(step, int):
            where += f"[{step}]"
        elif step in NAMED_STEPS:
            where += f".{step}"
    return invalid(param, f"{where}: {first['msg']}", "invalid_type")
