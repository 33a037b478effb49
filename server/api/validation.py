"""The one choke point: a typed body becomes scheduler `Request`s, or a 400 that names the field.

Two phases. `check_*` is cheap and comes before admission: numbers, shapes, sizes in bytes. `prepare` tokenizes, may be
slow and runs in the text pool. Nothing reaches the engine by another way, and nothing here is per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.types import Attention, Diffusion, Grammar, PromptAttention, Request, Speculation, SpeculationMode
from server.api.attention import read_attention
from server.api.decoding import read_decoding
from server.api.errors import invalid
from server.api.facts import ModelFacts, check_model
from server.api.grammar import read_grammar
from server.api.lengths import check_prompt_bytes, fitting_max_tokens, truncated
from server.api.prompt_attention import read_prompt_attention
from server.api.prompts import RawPrompt, read_prompts
from server.api.sampling import check_ids, check_numbers, check_range, check_stop, make_sampling
from server.api.schema import ChatBody, CompletionBody, GenerationBody
from server.api.settings import Limits
from server.api.speculation import check_speculation, read_speculation
from server.text.detokenizer import StopConditions
from server.text.tokenizer import Tokenizer

FORBIDDEN_IN_SALT = frozenset("@/\\\0")


@dataclass(frozen=True, slots=True)
class Checked:
    """A body that passed the cheap checks. `cost_tokens` estimates its prompt tokens, for admission; `prediction` is
    the text of that field, `decoding` how the answer is denoised (None = it is generated token by token), `attention`
    and `prompt_attention` how its rows and those of the prompt read fewer keys (None = they read all)."""

    body: CompletionBody | ChatBody
    prompts: tuple[RawPrompt, ...]
    stop: tuple[str, ...]
    max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    cost_tokens: int
    prediction: str = ""
    grammar: Grammar | None = None
    decoding: Diffusion | None = None
    attention: Attention | None = None
    prompt_attention: PromptAttention | None = None

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.body.n


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in tokens; `text` is what the client sent, if it sent text."""

    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """A client call, ready to run: `requests[p * n + i]` is sample i of prompt p."""

    checked: Checked
    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    stop: StopConditions

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def num_logprobs(self) -> int:
        """Most log-probabilities the answer can hold, each about 300 bytes of memory until it is written."""
        output, prompt = (0 if k is None else 1 + k for k in (self.checked.logprobs, self.checked.prompt_logprobs))
        return sum(output * request.max_tokens + prompt * len(request.prompt) for request in self.requests)


def check_completion(body: CompletionBody, facts: ModelFacts, limits: Limits, tokenizer: Tokenizer) -> Checked:
    check_model(body.model, facts)
    if body.logprobs is not None:
        check_range("logprobs", body.logprobs, 0, min(limits.max_logprobs, facts.max_logprobs))
    prompts = read_prompts(body.prompt, facts.vocab_size, limits, body.add_special_tokens)
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    return _check(body, prompts, body.max_tokens, body.logprobs, prompt_logprobs, body.echo, facts, limits, tokenizer)


def check_chat(body: ChatBody, prompt: RawPrompt, facts: ModelFacts, limits: Limits, tokenizer: Tokenizer) -> Checked:
    check_model(body.model, facts)
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        check_range("top_logprobs", body.top_logprobs, 0, min(limits.max_logprobs, facts.max_logprobs))
    if body.modalities != ["text"]:
        raise invalid("modalities", 'modalities must be ["text"]; this server gives text only')
    if body.echo:
        raise invalid("echo", "echo is not supported for chat completions")
    wanted = body.max_completion_tokens
    max_tokens = body.max_tokens if wanted is None else wanted
    if max_tokens == 0:
        name = "max_tokens" if wanted is None else "max_completion_tokens"
        raise invalid(name, f"{name} is 0, but a chat completion needs at least 1")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _check(body, (prompt,), max_tokens, logprobs, body.prompt_logprobs, False, facts, limits, tokenizer)


def _check(
    body: CompletionBody | ChatBody,
    prompts: tuple[RawPrompt, ...],
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    echo: bool,
    facts: ModelFacts,
    limits: Limits,
    tokenizer: Tokenizer,
) -> Checked:
    check_numbers(body, limits)
    if max_tokens is not None:
        check_range("max_tokens", max_tokens, 0, 1 << 62)
        if limits.max_output_tokens is not None and max_tokens > limits.max_output_tokens:
            message = f"max_tokens is {max_tokens}, but this server gives at most {limits.max_output_tokens}"
            raise invalid("max_tokens", message)
    check_range("min_tokens", body.min_tokens, 0, 1 << 62)
    _check_min(body, max_tokens)
    num_choices = len(prompts) * body.n
    most = min(limits.max_choices, facts.max_choices)
    if num_choices > most:
        param = "n" if body.n > 1 else "prompt"
        raise invalid(param, f"{len(prompts)} prompts x n = {body.n} make {num_choices} choices, the limit is {most}")
    check_ids("stop_token_ids", body.stop_token_ids, facts.vocab_size, limits.max_stop_token_ids)
    if len(body.bad_words) > limits.max_bad_words:
        raise invalid("bad_words", f"bad_words has {len(body.bad_words)} entries, the limit is {limits.max_bad_words}")
    if body.truncate_prompt_tokens is not None:
        check_range("truncate_prompt_tokens", body.truncate_prompt_tokens, -1, facts.model_len)
        if body.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens", "truncate_prompt_tokens is 0, which would leave no prompt")
    _check_salt(body.cache_salt, limits)
    prediction = check_speculation(body, facts.speculation, tokenizer)
    is_truncated = body.truncate_prompt_tokens is not None
    cost = sum(check_prompt_bytes(prompt, is_truncated, facts, tokenizer) for prompt in prompts)
    stop = check_stop(body, limits)
    grammar = read_grammar(body, limits)
    decoding = read_decoding(body, facts, max_tokens, grammar is not None)
    attention = read_attention(body, facts.attention, facts.speculation.drafters, decoding)
    prompt_attention = read_prompt_attention(body, facts.prompt_attention, decoding, prompt_logprobs)
    return Checked(
        body,
        prompts,
        stop,
        max_tokens,
        logprobs,
        prompt_logprobs,
        echo,
        cost,
        prediction,
        grammar,
        decoding,
        attention,
        prompt_attention,
    )


def _check_min(body: GenerationBody, max_tokens: int | None) -> None:
    if max_tokens is not None and body.min_tokens > max_tokens:
        raise invalid("min_tokens", f"min_tokens is {body.min_tokens}, but max_tokens is only {max_tokens}")


def _check_salt(salt: str | None, limits: Limits) -> None:
    if salt is None:
        return
    if not 1 <= len(salt) <= limits.max_label_chars or not salt.isprintable() or FORBIDDEN_IN_SALT & set(salt):
        allowed = f"1 to {limits.max_label_chars} printable characters without @ / \\"
        raise invalid("cache_salt", f"cache_salt must be {allowed}")


def prepare(checked: Checked, facts: ModelFacts, limits: Limits, tokenizer: Tokenizer, call_id: str, salt: str) -> Call:
    """Tokenize and build the requests. Slow: run it in the text pool. Raises ApiError 400."""
    body = checked.body
    prompts: list[Prompt] = []
    requests: list[Request] = []
    sampling = make_sampling(
        body,
        vocab_size=facts.vocab_size,
        limits=limits,
        logprobs=checked.logprobs,
        prompt_logprobs=checked.prompt_logprobs,
        bad_words=_encode_bad_words(body.bad_words, tokenizer, limits),
        grammar=checked.grammar,
    )
    decoding = checked.decoding
    if decoding is None:
        speculation = read_speculation(body, checked.prediction, checked.num_choices, facts.speculation, tokenizer)
    else:
        speculation = Speculation(SpeculationMode.OFF)  # a prediction is a hint: here it is no use to anybody
    is_chat = isinstance(body, ChatBody)
    stop_ids = () if body.ignore_eos else facts.eos_ids
    stop_ids = tuple(dict.fromkeys((*stop_ids, *body.stop_token_ids)))
    for p, raw in enumerate(checked.prompts):
        ids = raw.encode(tokenizer)
        ids = truncated(ids, body.truncate_prompt_tokens, checked.max_tokens, is_chat, facts, decoding)
        if not ids:
            raise invalid("prompt", "the prompt has no tokens; give at least one (an empty prompt cannot be continued)")
        max_tokens = fitting_max_tokens(len(ids), checked.max_tokens, is_chat, facts, limits, decoding)
        _check_min(body, max_tokens)
        prompts.append(Prompt(tuple(ids), raw.text if body.truncate_prompt_tokens is None else None))
        for i in range(body.n):
            request_id = f"{call_id}-{p * body.n + i}"
            requests.append(
                Request(
                    request_id,
                    prompts[-1].ids,
                    max_tokens,
                    sampling if i == 0 else replace(sampling, sample_index=i),
                    stop_ids,
                    priority=body.priority,
                    cache_salt=salt,
                    speculation=speculation,
                    model=facts.model,
                    decoding=decoding,
                    attention=checked.attention,
                    prompt_attention=checked.prompt_attention,
                )
            )
    total = sum(len(prompt.ids) for prompt in prompts)
    if total > facts.max_queued_tokens:
        raise invalid("prompt", f"the prompts have {total} tokens together, the limit is {facts.max_queued_tokens}")
    call = Call(checked, tuple(prompts), tuple(requests), _stop_conditions(checked))
    if call.num_logprobs > limits.max_logprob_entries:
        name = "logprobs" if checked.logprobs is not None else "prompt_logprobs"
        raise invalid(
            name,
            f"this call could give {call.num_logprobs} log-probabilities (tokens x samples x alternatives), the limit "
            f"is {limits.max_logprob_entries}; reduce max_tokens, n or {name}",
        )
    return call


def _stop_conditions(checked: Checked) -> StopConditions:
    return StopConditions(checked.stop, checked.body.include_stop_str_in_output, checked.body.min_tokens)


def _encode_bad_words(words: Sequence[str], tokenizer: Tokenizer, limits: Limits) -> tuple[tuple[int, ...], ...]:
    """Each word as it stands at the start of a text and after a space."""
    found: dict[tuple[int, ...], None] = {}
    total = 0
    for word in words:
        if not word.strip():
            raise invalid("bad_words", "bad_words contains an empty string")
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if ids and ids not in found:
                found[ids] = None
                total += len(ids)
        if total > limits.max_bad_word_tokens:
            raise invalid("bad_words", f"bad_words has more than {limits.max_bad_word_tokens} tokens")
    return tuple(found)
