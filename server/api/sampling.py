"""Sampling parameters of a body, every one of them bounded, as the scheduler's `Sampling`. No I/O, no text.

Part of the one choke point (`validation.py` calls it): the engine never sees a value that has not passed here.
"""

from __future__ import annotations

import secrets

from scheduler.types import Grammar, Sampling
from server.api.errors import invalid, shown, unsupported
from server.api.schema import GenerationBody
from server.api.settings import Limits

GREEDY_BELOW = 0.01
"""Temperatures below this divide logits beyond what float32 keeps apart; they are served as greedy (0)."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise invalid(name, f"{name} is {shown(value)}, but must be between {low:g} and {high:g}")


def check_ids(name: str, ids: list[int], vocab_size: int, max_count: int) -> None:
    if len(ids) > max_count:
        raise invalid(name, f"{name} has {len(ids)} entries, the limit is {max_count}")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise invalid(name, f"{name} contains {shown(token)}; token ids of this model are 0 to {vocab_size - 1}")


def check_numbers(body: GenerationBody, limits: Limits) -> None:
    """Every plain number of a generation body."""
    check_range("temperature", body.temperature, 0, 2)
    check_range("top_p", body.top_p, 0, 1)
    if body.top_p == 0:
        raise invalid("top_p", "top_p is 0, but must be above 0 (for greedy decoding set temperature to 0)")
    check_range("top_k", body.top_k, -1, 1 << 31)
    check_range("min_p", body.min_p, 0, 1)
    check_range("presence_penalty", body.presence_penalty, -2, 2)
    check_range("frequency_penalty", body.frequency_penalty, -2, 2)
    check_range("repetition_penalty", body.repetition_penalty, 0.01, 100)
    check_range("n", body.n, 1, limits.max_n)
    if body.best_of is not None and body.best_of != body.n:
        raise unsupported("best_of", f"best_of is {shown(body.best_of)}, but only best_of equal to n is supported")
    if body.seed is not None:
        check_range("seed", body.seed, -(1 << 63), (1 << 63) - 1)
    check_range("priority", body.priority, -(1 << 31), (1 << 31) - 1)
    if body.prompt_logprobs is not None:
        check_range("prompt_logprobs", body.prompt_logprobs, 0, limits.max_logprobs)
        if body.stream:
            raise invalid("prompt_logprobs", "prompt_logprobs cannot be streamed; set stream to false")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options needs stream to be true")


def check_stop(body: GenerationBody, limits: Limits) -> tuple[str, ...]:
    """The stop strings, bounded in number and length."""
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if len(stops) > limits.max_stop_strings:
        raise invalid("stop", f"stop has {len(stops)} strings, the limit is {limits.max_stop_strings}")
    for stop in stops:
        if not stop:
            raise invalid("stop", "stop contains an empty string, which would end every output at once")
        if len(stop) > limits.max_stop_chars:
            raise invalid("stop", f"stop has a string of {len(stop)} characters, the limit is {limits.max_stop_chars}")
    return tuple(dict.fromkeys(stops))


def read_logit_bias(body: GenerationBody, vocab_size: int, limits: Limits) -> tuple[tuple[int, float], ...]:
    if len(body.logit_bias) > limits.max_logit_bias:
        count = len(body.logit_bias)
        raise invalid("logit_bias", f"logit_bias has {count} entries, the limit is {limits.max_logit_bias}")
    bias: dict[int, float] = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid("logit_bias", f"logit_bias has the key {shown(key)}; keys are token ids in decimal digits")
        check_ids("logit_bias", [int(key)], vocab_size, 1)
        check_range("logit_bias", value, -100, 100)
        bias[int(key)] = value
    return tuple(bias.items())


def make_sampling(
    body: GenerationBody,
    *,
    vocab_size: int,
    limits: Limits,
    logprobs: int | None,
    prompt_logprobs: int | None,
    bad_words: tuple[tuple[int, ...], ...],
    grammar: Grammar | None,
) -> Sampling:
    """The scheduler's value; `check_numbers` has been called. A missing seed becomes a random one."""
    allowed = body.allowed_token_ids
    if allowed is not None:
        if not allowed:
            raise invalid("allowed_token_ids", "allowed_token_ids is empty, so no token could be chosen")
        check_ids("allowed_token_ids", allowed, vocab_size, limits.max_allowed_token_ids)
    return Sampling(
        temperature=body.temperature if body.temperature >= GREEDY_BELOW else 0.0,
        top_p=body.top_p,
        top_k=0 if body.top_k <= 0 or body.top_k >= vocab_size else body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=read_logit_bias(body, vocab_size, limits),
        allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
        bad_words=bad_words,
        min_tokens=body.min_tokens,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )
