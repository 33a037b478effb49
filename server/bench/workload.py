"""Synthetic requests of known length: token ids where the server takes them, words otherwise.

The same seed gives the same prompts and the same arrival times. Prompts share nothing but what `prefix_share` says, so
a prefix cache helps exactly as much as asked for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from server.bench.client import BenchError, Target, get_json, stream

# Ordinary ids: past the byte and control tokens at the low end, below the smallest vocabulary served.
TOKEN_IDS = range(300, 3000)
TEXT = """
the of and to in that is was he for it with as his on be at by had not are but from or have an they which one you were
all her she there would their we him been has when who will no more if out so up said what its about than into them can
only other time new some could these two may first then do any like my now over such our man me even most
"""
WORDS = TEXT.split()


@dataclass(frozen=True, slots=True)
class Workload:
    """The shape of every request. Lengths in tokens; `prefix_share` is the part of a prompt all have in common."""

    input_len: int = 256
    output_len: int = 64
    prefix_share: float = 0.0
    ignore_eos: bool = True
    temperature: float = 0.0
    is_chat: bool = False
    seed: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"


@dataclass(frozen=True, slots=True)
class Server:
    """What the probe found: the model's name, whether prompts may be token ids, tokens per word, longest context."""

    model: str
    takes_token_ids: bool
    tokens_per_word: float
    max_model_len: int | None = None


async def probe(target: Target, workload: Workload, model: str | None = None) -> Server:
    """Ask the server what it serves and how it counts. Raises BenchError with the server's own words if it refuses."""
    max_model_len = None
    status, answer = await get_json(target, "/v1/models")
    if status == 401:
        raise BenchError(f"{target.url} wants an API key: pass --api-key")
    entries = answer.get("data", []) if isinstance(answer, dict) else []
    if model is None:
        if status != 200 or not entries:
            raise BenchError(f"{target.url}/v1/models gave status {status} and no model; pass --model")
        model = str(entries[0]["id"])
    for entry in entries:
        if entry.get("id") == model:
            max_model_len = entry.get("max_model_len")
    refusal = None
    if not workload.is_chat:
        refusal = await _try(target, workload, model, [TOKEN_IDS[0], TOKEN_IDS[1]])
        if isinstance(refusal, int):
            return Server(model, True, 1.0, max_model_len)
    counts = [await _try(target, workload, model, " ".join(WORDS[:n])) for n in (20, 60)]
    if not isinstance(counts[0], int) or not isinstance(counts[1], int):
        raise BenchError(f"{target.url} refuses a plain prompt for model {model!r}: {counts[0]}")
    return Server(model, False, max(0.25, (counts[1] - counts[0]) / 40), max_model_len)


async def _try(target: Target, workload: Workload, model: str, prompt: str | list[int]) -> int | str:
    """The prompt's length in the server's tokens, or its refusal in words."""
    body = request_body(workload, model, prompt) | {"max_tokens": 1}
    sample = await stream(target, workload.path, body, timeout_s=60.0)
    if sample.status != 200 or (sample.error and not sample.prompt_tokens):
        return f"{sample.status} {sample.error}"
    return sample.prompt_tokens


def request_body(workload: Workload, model: str, prompt: str | list[int]) -> dict[str, Any]:
    """The JSON body of one request. `continuous_usage_stats` makes each event carry the exact token count so far."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": workload.output_len,
        "temperature": workload.temperature,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    body |= {"messages": [{"role": "user", "content": prompt}]} if workload.is_chat else {"prompt": prompt}
    if workload.ignore_eos:
        # Past its end a model may write nothing but end tokens; unseen, they would bring no events to time.
        body |= {"ignore_eos": True, "skip_special_tokens": False}
    return body | dict(workload.extra)


def make_prompts(workload: Workload, server: Server, count: int) -> list[str | list[int]]:
    """`count` prompts of `input_len` tokens each (for text: about; the report states what the server counted)."""
    rng = random.Random(workload.seed)
    num_shared = round(workload.input_len * workload.prefix_share)
    if server.takes_token_ids:
        shared_ids = rng.choices(TOKEN_IDS, k=num_shared)
        return [shared_ids + rng.choices(TOKEN_IDS, k=workload.input_len - num_shared) for _ in range(count)]
    num_words = max(1, round(workload.input_len / server.tokens_per_word))
    shared_words = rng.choices(WORDS, k=round(num_words * workload.prefix_share))
    return [" ".join(shared_words + rng.choices(WORDS, k=num_words - len(shared_words))) for _ in range(count)]


def arrival_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which an open loop sends: a Poisson process of `rate` requests per second."""
    rng = random.Random(seed + 1)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    return times
