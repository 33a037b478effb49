"""How long prompts and outputs may be: the context, the canvas of bidirectional models, and the words of refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scheduler.types import Diffusion, Topology
from server.api.errors import ApiError
from server.api.facts import ModelFacts
from server.api.prompts import RawPrompt
from server.api.settings import Limits
from server.text.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
DEFAULT_CANVAS = 128
"""Tokens of a chat's answer by a bidirectional model where nothing is said (LLaDA's own default). The rest of the
context, as for other models, would be a canvas that no step holds."""


def fitting_max_tokens(
    num_prompt: int,
    asked: int | None,
    is_chat: bool,
    facts: ModelFacts,
    limits: Limits,
    decoding: Diffusion | None = None,
) -> int:
    """The output length of one request: what was asked, else the default; it must fit the context."""
    if decoding is not None and is_bidirectional(facts):
        return _fitting_canvas(num_prompt, asked, is_chat, facts, limits, decoding)
    room = facts.model_len - num_prompt
    if asked is not None:
        if asked > room or (room < 1 and asked > 0):
            raise too_long(num_prompt, asked, facts.model_len)
        return asked
    if room < 1:
        raise too_long(num_prompt, 1, facts.model_len)
    default = room if is_chat else min(room, DEFAULT_COMPLETION_TOKENS)
    return min(default, limits.max_output_tokens or default)


def is_bidirectional(facts: ModelFacts) -> bool:
    return facts.diffusion is not None and facts.diffusion.topology is Topology.BIDIRECTIONAL


def block_of(facts: ModelFacts, decoding: Diffusion) -> int:
    """Tokens of a block, as this request is denoised."""
    assert facts.diffusion is not None
    return decoding.block_size or facts.diffusion.block_size


def canvas_of(max_tokens: int, facts: ModelFacts, decoding: Diffusion) -> int:
    """Tokens that a bidirectional model denoises for an output of `max_tokens`: whole blocks (reference 9.6)."""
    block = block_of(facts, decoding)
    return decoding.gen_length or math.ceil(max_tokens / block) * block


def _fitting_canvas(
    num_prompt: int, asked: int | None, is_chat: bool, facts: ModelFacts, limits: Limits, decoding: Diffusion
) -> int:
    """As `fitting_max_tokens`; what must fit is the canvas, into the context and into a step."""
    block = block_of(facts, decoding)
    most = min(facts.model_len, facts.max_step)
    max_tokens = asked
    if max_tokens is None:
        default = decoding.gen_length or (DEFAULT_CANVAS if is_chat else DEFAULT_COMPLETION_TOKENS)
        max_tokens = min(default, limits.max_output_tokens or default)
        if decoding.gen_length is None:
            max_tokens = max(1, min(max_tokens, (most - num_prompt) // block * block))
    canvas = canvas_of(max_tokens, facts, decoding)
    if num_prompt + canvas <= most:
        return max_tokens
    param = "max_tokens" if decoding.gen_length is None else "decoding.gen_length"
    param = "prompt" if num_prompt + block > most else param
    parts = f"({num_prompt} in the prompt, {canvas} in the canvas, which is max_tokens in whole blocks of {block}"
    parts += ")" if decoding.gen_length is None else ", or decoding.gen_length)"
    if num_prompt + canvas > facts.model_len:
        message = f"This model's maximum context length is {facts.model_len} tokens. However, you requested "
        message += f"{num_prompt + canvas} tokens {parts}. Please shorten the prompt or reduce {param}."
        raise ApiError(400, message, param, "context_length_exceeded")
    message = f"a bidirectional model computes prompt and canvas in one step, which holds {facts.max_step} tokens here "
    message += f"(--max-num-batched-tokens), but you requested {num_prompt + canvas} {parts}"
    raise ApiError(400, message, param, "context_length_exceeded")


def too_long(num_prompt: int, num_output: int | None, model_len: int, qualifier: str = "") -> ApiError:
    """The refusal that clients recognise by its words (C-04)."""
    message = f"This model's maximum context length is {model_len} tokens. However, "
    if num_output is None:
        message += f"your prompt has {qualifier}{num_prompt} tokens. Please shorten it."
    else:
        message += (
            f"you requested {num_prompt + num_output} tokens ({num_prompt} in the prompt, {num_output} for the "
            f"completion). Please shorten the prompt or reduce max_tokens."
        )
    param = "prompt" if num_output is None or num_prompt >= model_len else "max_tokens"
    return ApiError(400, message, param, "context_length_exceeded")


def check_prompt_bytes(prompt: RawPrompt, is_truncated: bool, facts: ModelFacts, tokenizer: Tokenizer) -> int:
    """Refuse what cannot fit, from the number of bytes alone; returns the estimated tokens."""
    if prompt.ids is not None:
        if not is_truncated and len(prompt.ids) > facts.model_len:
            raise too_long(len(prompt.ids), None, facts.model_len)
        return min(len(prompt.ids), facts.model_len)
    longest = tokenizer.max_bytes_per_token
    if longest is not None:
        at_least = math.ceil(prompt.num_bytes / longest)
        if at_least > facts.model_len and not is_truncated:
            raise too_long(at_least, None, facts.model_len, "at least ")
    return min(prompt.num_bytes // 4 + 1, facts.model_len)


def truncated(
    ids: Sequence[int],
    keep: int | None,
    asked: int | None,
    is_chat: bool,
    facts: ModelFacts,
    decoding: Diffusion | None = None,
) -> Sequence[int]:
    """The last `keep` ids; -1 = as many as leave room for the output."""
    if keep is None:
        return ids
    if keep == -1:
        keep = max(1, facts.model_len - (asked if asked is not None else 1 if is_chat else DEFAULT_COMPLETION_TOKENS))
        if decoding is not None and is_bidirectional(facts):
            default = DEFAULT_CANVAS if is_chat else DEFAULT_COMPLETION_TOKENS
            canvas = canvas_of(default if asked is None else asked, facts, decoding)
            keep = max(1, min(facts.model_len, facts.max_step) - canvas)
    return ids[-keep:]
