"""An engine that says what a script tells it: the HTTP side is tested without tensors or processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from scheduler.types import Delta, DiffusionModel, FinishReason, Request, RequestTimes, StepStats, TokenLogprob
from server.engine.client import EngineUnavailable
from server.engine.config import EngineInfo, EngineState
from server.text.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MODEL_LEN = 512


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """One token per byte, plus <bos>, <eos>, <|start|>, <|end|>: every character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<bos>", "<eos>", "<|start|>", "<|end|>")])
    return Tokenizer(raw, {"bos_token": "<bos>", "eos_token": "<eos>"}, chat_template)


Script = Callable[[Request], Iterator[Delta | float]]
"""Deltas of a request; a float is a pause in seconds."""


def says(tokenizer: Tokenizer, text: str, chunk: int = 1, pause_s: float = 0.0) -> Script:
    """The text's tokens, `chunk` at a time, then EOS; ends with LENGTH at max_tokens. Logprobs where asked."""

    def script(request: Request) -> Iterator[Delta | float]:
        eos = tokenizer.eos_id
        assert eos is not None
        tokens = [*tokenizer.encode(text, add_special_tokens=False), eos]
        ends_by_length = len(tokens) > request.max_tokens
        tokens = tokens[: request.max_tokens]
        yield Delta(request.id, cached_tokens=0, prompt_logprobs=_prompt_logprobs(request))
        for start in range(0, len(tokens), chunk):
            part = tuple(tokens[start : start + chunk])
            is_last = start + chunk >= len(tokens)
            if pause_s:
                yield pause_s
            yield Delta(
                request.id,
                part,
                logprobs=tuple(_logprob(token, request.sampling.logprobs) for token in part),
                finish_reason=(FinishReason.LENGTH if ends_by_length else FinishReason.STOP) if is_last else None,
                stop_id=eos if is_last and not ends_by_length else None,
                times=RequestTimes(0.01, 0.02, 0.03) if is_last else None,
            )
        if not tokens:
            yield Delta(request.id, finish_reason=FinishReason.LENGTH)

    return script


def endless(token: int = 65, pause_s: float = 0.005) -> Script:
    def script(request: Request) -> Iterator[Delta | float]:
        while True:
            yield pause_s
            yield Delta(request.id, (token,))

    return script


def silent(request: Request) -> Iterator[Delta | float]:
    while True:
        yield 0.05


def _logprob(token: int, num_top: int | None) -> TokenLogprob:
    top = [(token, -0.5), ((token + 1) % 256, -1.5), ((token + 2) % 256, -2.5)]
    return TokenLogprob(token, -0.5, 1, tuple(top[: num_top or 0]))


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob, ...]:
    asked = request.sampling.prompt_logprobs
    return () if asked is None else tuple(_logprob(token, asked) for token in request.prompt[1:])


class FakeStream:
    def __init__(self, engine: FakeEngine, request: Request, deltas: Iterator[Delta | float]) -> None:
        self._engine, self._request, self._deltas = engine, request, deltas
        self._is_closed = False

    async def __anext__(self) -> Delta:
        try:
            for item in self._deltas:
                if self._is_closed:
                    break
                if isinstance(item, float):
                    await asyncio.sleep(item)
                    continue
                await asyncio.sleep(0)
                if item.finish_reason is not None:
                    self._end()
                return item
        except asyncio.CancelledError:
            self.close()
            raise
        raise StopAsyncIteration

    def close(self) -> None:
        if not self._is_closed and self._request.id in self._engine.in_flight:
            self._engine.aborted.append(self._request.id)
        self._end()

    def _end(self) -> None:
        self._is_closed = True
        self._engine.in_flight.pop(self._request.id, None)


class FakeEngine:
    """`requests` is all that ever came, `in_flight` what has not ended, `aborted` what was closed before its end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Script | None = None,
        max_seqs: int = 8,
        queue: int = 32,
        diffusion: DiffusionModel | None = None,
    ) -> None:
        self.script = script or says(tokenizer, "hello")
        self.state = EngineState.READY
        self.stats = StepStats()
        self.restarts = 0
        self.requests: list[Request] = []
        self.in_flight: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.info = EngineInfo(
            model="fake",
            model_len=MODEL_LEN,
            vocab_size=tokenizer.vocab_size,
            num_parameters=1,
            num_pages=64,
            page_size=16,
            weight_bytes=1,
            kv_bytes=1,
            dtype="float32",
            device="cpu",
            ops="fake",
            eos_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
            max_batched_tokens=256,
            max_seqs=max_seqs,
            max_queued_requests=queue,
            max_queued_tokens=8 * MODEL_LEN,
            max_logprobs=20,
            tbt_slo_s=None,
            enable_prefix_caching=True,
            pid=1,
            diffusion=diffusion,
        )

    def generate(self, request: Request) -> FakeStream:
        if self.state not in (EngineState.READY, EngineState.HUNG):
            raise EngineUnavailable("the engine is restarting", 2.0)
        self.requests.append(request)
        self.in_flight[request.id] = request
        return FakeStream(self, request, self.script(request))
