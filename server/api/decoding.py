"""`decoding` of a body as the scheduler's `Diffusion`, and what a denoised answer tells: part of the one choke point.

The catalogue (`scheduler/policies.py`) judges names, parameters and parts; here stand the sizes and what does not go
together with other fields of a request. Everything that cannot hold is a 400; both fields are named.
"""

from __future__ import annotations

from typing import Any

from scheduler.policies import PARTS, POLICIES, WITH_QUOTA, BadPolicy, make_diffusion
from scheduler.types import DecodingUsage, Diffusion, DiffusionModel, EosRule, Snapshot, Topology
from server.api.errors import MAX_MESSAGE_CHARS, ApiError, invalid, shown, unsupported
from server.api.facts import ModelFacts
from server.api.grammar import grammar_field
from server.api.schema import CompletionBody, DecodingFields, DenoiseBody, GenerationBody
from server.api.speculation import asked_speculation
from server.engine.decoding import AUTOREGRESSIVE, conflict, ordered_drafts
from server.text.tokenizer import Tokenizer

SETTINGS = ("steps", "block_size", "gen_length", "confidence", "eos")
PARAMETERS = frozenset(
    name
    for part, methods in PARTS.items()
    for parameters in methods.values()
    for key in parameters
    for name in (key, f"{part}.{key}")
)


def read_decoding(
    body: GenerationBody, facts: ModelFacts, max_tokens: int | None, has_grammar: bool
) -> Diffusion | None:
    """How the answer is denoised; None = it is generated token by token. Raises ApiError 400."""
    _check_route(body)
    fields = body.decoding or DecodingFields()
    given = {name: value for name, value in fields if value is not None}
    model = facts.diffusion
    is_route = isinstance(body, DenoiseBody)
    if model is None:
        if is_route:
            raise unsupported("model", "this model generates token by token and cannot denoise; use /v1/completions")
        if body.decoding is not None and given != {"policy": AUTOREGRESSIVE}:
            raise unsupported(
                "decoding", "decoding is given, but this model generates token by token only; leave it out"
            )
        return None
    if fields.policy == AUTOREGRESSIVE:
        _check_autoregressive(given, model, is_route)
        return None
    if not given and not is_route and not facts.denoises(body.model):
        return None
    decoding = _made(body, fields, given, facts, model, has_grammar)
    _check_sizes(decoding, given, facts, model, max_tokens)
    _check_company(body, decoding, facts, max_tokens, has_grammar)
    return decoding


def _check_route(body: GenerationBody) -> None:
    is_watched = body.stream_options is not None and body.stream_options.include_snapshots
    if isinstance(body, DenoiseBody):
        if not body.stream:
            raise invalid("stream", "stream is false, but /v1/denoise/stream always streams; use /v1/completions")
    elif is_watched:
        name = "stream_options.include_snapshots"
        raise unsupported(name, f"{name} is a field of /v1/denoise/stream; leave it out")


def _check_autoregressive(given: dict[str, Any], model: DiffusionModel, is_route: bool) -> None:
    message = f"decoding.policy is {AUTOREGRESSIVE}, but"
    if is_route:
        raise invalid("decoding.policy", f"{message} /v1/denoise/stream denoises; use /v1/completions")
    if not model.is_dual:
        raise invalid("decoding.policy", f"{message} this model can only denoise; name another, or none")
    for name in given.keys() - {"policy"}:
        _check_known(name)
        field = f"decoding.{name}"
        raise invalid(field, f"{field} is given and decoding.policy is {AUTOREGRESSIVE}, which has no such field")


def _made(
    body: GenerationBody,
    fields: DecodingFields,
    given: dict[str, Any],
    facts: ModelFacts,
    model: DiffusionModel,
    has_grammar: bool,
) -> Diffusion:
    """The catalogue's value, with what only this server knows filled in."""
    policy = fields.policy
    if policy is None:
        # A constraint is read left to right; whoever names nothing gets what can keep it.
        policy = "sequential" if has_grammar and fields.selector is None else model.policy
    parts = {part: shown(given[part]) for part in PARTS if part in given}
    values = {name: _number(name, given[name]) for name in given.keys() - parts.keys() - {"policy", *SETTINGS}}
    if policy not in POLICIES:
        known = ", ".join((*([AUTOREGRESSIVE] if model.is_dual else ()), *POLICIES))
        raise invalid("decoding.policy", f"decoding.policy is {shown(policy)}, but must be one of {known}")
    options = body.stream_options
    try:
        decoding = make_diffusion(
            policy,
            model.topology,
            parts,
            values,
            steps=fields.steps,
            block_size=fields.block_size if model.topology is Topology.BIDIRECTIONAL else None,
            gen_length=fields.gen_length,
            filtered=fields.confidence == "filtered",
            eos=EosRule(fields.eos or "free"),
            delimiters=facts.delimiters if _planner(policy, parts) == "adablock" else (),
            snapshots=options is not None and options.include_snapshots,
        )
    except BadPolicy as error:
        raise _as_api_error(error, policy) from error
    if (misfit := model.misfit(decoding)) is not None:
        raise _as_api_error(BadPolicy(*misfit), policy)
    if decoding.planner.name == "adablock" and not decoding.delimiters:
        message = "decoding.planner is adablock, but no token of this model ends a line; choose another planner"
        raise invalid("decoding.planner", message)
    return decoding


def _planner(policy: str, parts: dict[str, str]) -> str:
    return parts.get("planner", POLICIES[policy].planner)


def _as_api_error(error: BadPolicy, policy: str) -> ApiError:
    message = f"decoding.{error} (decoding.policy is {policy})"
    return invalid(f"decoding.{shown(error.field)}", shown(message, MAX_MESSAGE_CHARS))


def _number(name: str, value: Any) -> float:
    _check_known(name)
    if type(value) not in (int, float):
        raise invalid(f"decoding.{name}", f"decoding.{name} must be a number", "invalid_type")
    return float(value)


def _check_known(name: str) -> None:
    if name not in PARAMETERS and name not in DecodingFields.model_fields:
        name = shown(name)
        raise invalid(f"decoding.{name}", f"decoding has the unknown field {name}", "unknown_field")


def _check_sizes(
    decoding: Diffusion, given: dict[str, Any], facts: ModelFacts, model: DiffusionModel, max_tokens: int | None
) -> None:
    block, length = given.get("block_size", model.block_size), decoding.gen_length
    if model.topology is Topology.BLOCK_CAUSAL:
        if block != model.block_size:
            message = f"decoding.block_size is {block}, but the blocks of this model have {model.block_size} tokens"
            raise invalid("decoding.block_size", message)
        if length is not None:
            message = "decoding.gen_length is for bidirectional models; the length of this one's answer is max_tokens"
            raise invalid("decoding.gen_length", message)
    for name in ("block_size", "gen_length"):
        if name in given and not 1 <= given[name] <= facts.model_len:
            message = f"decoding.{name} is {given[name]}, but must be between 1 and {facts.model_len}"
            raise invalid(f"decoding.{name}", message)
    if length is not None:
        if length % block:
            message = (
                f"decoding.gen_length is {length}, but must be a multiple of decoding.block_size, which is {block}"
            )
            raise invalid("decoding.gen_length", message)
        if max_tokens is not None and max_tokens > length:
            message = f"max_tokens is {max_tokens}, but decoding.gen_length is {length}, and no answer is longer"
            raise invalid("max_tokens", message)
    if decoding.steps is not None:
        name = decoding.selector.name
        if name not in WITH_QUOTA:
            message = f"decoding.steps is given and the selector is {name}, which has no quota of steps; "
            raise invalid("decoding.steps", f"{message}those that have one are {', '.join(sorted(WITH_QUOTA))}")
        if not 1 <= decoding.steps <= block:
            message = f"decoding.steps is {decoding.steps}, but must be between 1 and the {block} tokens of a block"
            raise invalid("decoding.steps", message)


def _check_company(
    body: GenerationBody, decoding: Diffusion, facts: ModelFacts, max_tokens: int | None, has_grammar: bool
) -> None:
    """What else the request says must be possible for a text that is not written from left to right."""
    if isinstance(body, CompletionBody) and body.echo:
        raise invalid("echo", f"echo is true, but {_why(body, decoding)}: prompts are not evaluated")
    if (order := ordered_drafts(asked_speculation(body))) is not None:
        raise invalid("speculation", f"speculation.{order} asks for drafts, but {_why(body, decoding)}")
    found = conflict(decoding, max_tokens == 0, body.prompt_logprobs is not None, has_grammar)
    if found is not None:
        name = grammar_field(body) if found[0] == "grammar" else found[0]
        raise invalid(name, f"{name} {found[1]}, but {_why(body, decoding)}")


def _why(body: GenerationBody, decoding: Diffusion) -> str:
    """Which field made it a denoised request."""
    if body.decoding is None:
        return f"the model {shown(body.model or 'that is served')} denoises (decoding.policy {decoding.policy})"
    return f"decoding.policy {decoding.policy} (selector {decoding.selector.name}) denoises"


def decoding_usage(total: DecodingUsage, num_tokens: int) -> dict[str, object]:
    """The field of `usage` of a denoised answer. Forwards fixed tokens, commit passes only wrote final KV."""
    per_forward = round(num_tokens / total.forwards, 3) if total.forwards else 0.0
    counts = {"forwards": total.forwards, "tokens_per_forward": per_forward, "commit_passes": total.commit_passes}
    return {"decoding": counts}


def show_snapshot(
    snapshot: Snapshot, index: int, num_prompt: int, mask_id: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A block as it stands: the text of each position, null for masks. Positions count from the first of the output;
    a block that begins in the prompt is shown from there."""
    first = max(snapshot.start, num_prompt)
    tokens = snapshot.tokens[first - snapshot.start :]
    pieces = [None if token == mask_id else tokenizer.token_text(token) for token in tokens]
    return {"index": index, "block_start": first - num_prompt, "step": snapshot.step, "pieces": pieces}
