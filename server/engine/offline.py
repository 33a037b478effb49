"""Engine: generate text in this process, in a few lines. For scripts, tests and notebooks; no HTTP, no second process.

    with Engine("braid-tiny") as engine:
        print(engine.generate(["sort: 7 3 9 ->"], max_tokens=16)[0].text)

The same core, scheduler and worker as the server's: the same seed gives the same tokens as there.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self

from scheduler.policies import make_diffusion
from scheduler.types import (
    Attention,
    DecodingUsage,
    Delta,
    Diffusion,
    FinishReason,
    Request,
    Sampling,
    Snapshot,
    Speculation,
    SpeculationMode,
    SpeculationUsage,
    TokenLogprob,
)
from server.engine.config import DENSE, EngineConfig, EngineInfo
from server.engine.decoding import AUTOREGRESSIVE, MAX_DELIMITERS, conflict, default_decoding, ordered_drafts, refusal
from server.engine.loop import build_core
from server.models.locate import resolve_model
from server.text.detokenizer import Detokenizer, StopConditions
from server.text.tokenizer import Tokenizer

IDLE_WAIT_S = 1.0


class GenerationError(Exception):
    """A request failed; the message says why."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt gave. `text` leaves out the stop string or token that ended it; `decoding` is what denoising
    took, None where it was generated token by token; `snapshots` are its blocks after each step, where asked for."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    speculation: SpeculationUsage = field(default_factory=SpeculationUsage)
    decoding: DecodingUsage | None = None
    snapshots: tuple[Snapshot, ...] = ()


class _Choice:
    """One prompt's output, growing."""

    def __init__(self, tokenizer: Tokenizer, prompt: tuple[int, ...], stop: tuple[str, ...], min_tokens: int) -> None:
        self._detokenizer = Detokenizer(tokenizer, StopConditions(stop, min_tokens=min_tokens), prompt=prompt)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._speculation = SpeculationUsage()
        self._decoding: DecodingUsage | None = None
        self._snapshots: list[Snapshot] = []
        self.finish_reason: FinishReason | None = None

    def absorb(self, delta: Delta) -> str:
        """The new text. Sets `finish_reason` at the end, which a stop string may bring early."""
        if delta.fault is not None:
            raise GenerationError(delta.fault.message)
        piece, num_taken = "", 0
        for num_taken, token in enumerate(delta.tokens, 1):
            is_stop_id = delta.stop_id is not None and num_taken == len(delta.tokens)
            piece += self._detokenizer.push(token, is_stop_id)
            if self._detokenizer.stopped is not None:
                break
        self._tokens += delta.tokens[:num_taken]
        self._logprobs += delta.logprobs[:num_taken]
        self._prompt_logprobs += delta.prompt_logprobs
        if delta.speculation is not None:
            self._speculation += delta.speculation
        if delta.decoding is not None:
            self._decoding = delta.decoding + (self._decoding or DecodingUsage())
        if delta.snapshot is not None:
            self._snapshots.append(delta.snapshot)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            piece += self._detokenizer.finish()
        if self._detokenizer.stopped is not None:
            self.finish_reason = FinishReason.STOP
        self._text.append(piece)
        return piece

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "the output has not ended"
        return Completion(
            "".join(self._text),
            tuple(self._tokens),
            self.finish_reason,
            tuple(self._logprobs),
            tuple(self._prompt_logprobs),
            self._speculation,
            self._decoding,
            tuple(self._snapshots),
        )


class Engine:
    """One model in this process. Not for several threads at once.

    model    a folder, an embedded name or a hub id
    options  fields of `EngineConfig`, such as dtype="float32", max_seqs=8
    Raises ValueError or OSError if the model cannot be loaded.
    """

    def __init__(self, model: str = "braid-tiny", **options: Any) -> None:
        config = replace(EngineConfig(model=model, progress=False, queue_timeout_s=None), **options)
        if config.also:
            raise ValueError("also is given, but an Engine is one model; make an Engine for each")
        self._ready = threading.Event()
        self._core, self.info = build_core(config, self._ready.set)
        self.tokenizer = Tokenizer.load(resolve_model(config.model, config.revision, config.download_dir))
        self._ids = itertools.count()

    info: EngineInfo

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model's memory. Idempotent."""
        if hasattr(self, "_core"):
            self._core.close()
            del self._core

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int = 16,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        speculation: Speculation | None = None,
        decoding: str | Diffusion | None = None,
        seeds: Sequence[int] | None = None,
        attention: Attention | Literal["dense"] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue all prompts, batched. Completions in the order of the prompts.

        max_tokens  0 = only evaluate (with prompt_logprobs)
        stop_ids    None = the model's end-of-sequence ids, () = ignore them
        speculation how drafts are used; None = as the engine was told (`EngineConfig.speculation`)
        decoding    how the text is denoised: a policy's name or all of it; "autoregressive" = token by token; None =
                    token by token, or the default policy of a model that can only denoise
        attention   how the output's rows read fewer keys; "dense" = they do not; None = as the engine was told
        seeds       one per prompt; `seed` among `sampling` is one for all, and their noise is then the same
        sampling    fields of `Sampling`: temperature, top_p, seed, logprobs, grammar ... (temperature 0 by default)
        Raises GenerationError if any of them fails, with all others aborted; ValueError for a prompt without tokens
        and for what the model cannot do.
        """
        choices = self._submit(prompts, max_tokens, stop, stop_ids, speculation, decoding, sampling, seeds, attention)
        try:
            for name, delta in self._deltas(choices):
                choices[name].absorb(delta)
        finally:
            self._abort(choices)
        return [choice.completion() for choice in choices.values()]

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 16,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        speculation: Speculation | None = None,
        decoding: str | Diffusion | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The text of one continuation, piece by piece. Closing the iterator aborts it."""
        choices = self._submit([prompt], max_tokens, stop, stop_ids, speculation, decoding, sampling)
        try:
            for name, delta in self._deltas(choices):
                if piece := choices[name].absorb(delta):
                    yield piece
        finally:
            self._abort(choices)

    def _submit(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int,
        stop: Sequence[str],
        stop_ids: Sequence[int] | None,
        speculation: Speculation | None,
        decoding: str | Diffusion | None,
        sampling: dict[str, Any],
        seeds: Sequence[int] | None = None,
        attention: Attention | Literal["dense"] | None = None,
    ) -> dict[str, _Choice]:
        if isinstance(prompts, str):
            raise TypeError("prompts is a string; give a list of prompts")
        if seeds is not None and ("seed" in sampling or len(seeds) != len(prompts)):
            raise ValueError("seeds is one for each prompt, and goes with no seed for all")
        values = Sampling(**{"temperature": 0.0, **sampling})
        drafting = self._checked(speculation)
        denoising = self._denoising(decoding, max_tokens == 0, values, speculation)
        if denoising is not None:
            drafting = Speculation(SpeculationMode.OFF)
        attending = self.info.default_attention if attention is None and denoising is None else None
        if attention not in (None, DENSE):
            assert isinstance(attention, Attention), f"attention is {attention!r}; expected an Attention, or {DENSE!r}"
            attending = attention
        ids = tuple(self.info.eos_ids if stop_ids is None else stop_ids)
        requests, choices = [], {}
        for number, prompt in enumerate(prompts):
            tokens = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
            wrong = [token for token in tokens if not 0 <= token < self.info.vocab_size]
            if not tokens or wrong:
                raise ValueError(
                    f"token id {wrong[0]} is not in [0, {self.info.vocab_size})" if wrong else "a prompt has no tokens"
                )
            seed = values.seed if "seed" in sampling else secrets.randbits(63) if seeds is None else seeds[number]
            name = f"offline-{next(self._ids)}"
            requests.append(
                Request(
                    name, tokens, max_tokens, replace(values, seed=seed), ids, speculation=drafting, decoding=denoising,
                    attention=attending,
                )
            )  # fmt: skip
            choices[requests[-1].id] = _Choice(self.tokenizer, tokens, tuple(stop), values.min_tokens)
        for request in requests:
            self._core.add(request)
        return choices

    def _checked(self, asked: Speculation | None) -> Speculation:
        """Raises ValueError for what this engine cannot do."""
        if asked is None:
            return Speculation(SpeculationMode.ON if self.info.speculation == "on" else SpeculationMode.AUTO)
        names = [name for name, _ in self.info.drafters]
        if (problem := refusal(asked, names, self.info.max_drafts, bool(asked.prediction))) is not None:
            raise ValueError(problem)
        return asked

    def _denoising(
        self, asked: str | Diffusion | None, is_empty: bool, sampling: Sampling, speculation: Speculation | None
    ) -> Diffusion | None:
        """Raises ValueError for what this model cannot do, or no denoising can."""
        model = self.info.diffusion
        found = default_decoding(model)
        if asked == AUTOREGRESSIVE and found is not None:
            raise ValueError("decoding is autoregressive, but this model can only denoise")
        if asked is not None and asked != AUTOREGRESSIVE:
            if model is None:
                raise ValueError("decoding is given, but this model generates token by token only")
            found = make_diffusion(asked, model.topology) if isinstance(asked, str) else asked
        if found is None:
            return None
        problem = conflict(found, is_empty, sampling.prompt_logprobs is not None, sampling.grammar is not None)
        if problem is not None:
            raise ValueError(f"{problem[0]} {problem[1]}, but the text is denoised (policy {found.policy})")
        if speculation is not None and (name := ordered_drafts(speculation)) is not None:
            raise ValueError(f"speculation.{name} asks for drafts, but the text is denoised (policy {found.policy})")
        if found.planner.name == "adablock" and not found.delimiters:
            found = replace(found, delimiters=self.tokenizer.line_end_ids(MAX_DELIMITERS))
        return found

    def _deltas(self, choices: dict[str, _Choice]) -> Iterator[tuple[str, Delta]]:
        """Run steps until every choice has ended; a stop string aborts the rest of its request."""
        open_ids = set(choices)
        while open_ids:
            deltas, stats = self._core.step()
            for delta in deltas:
                if delta.request_id not in open_ids:
                    continue
                yield delta.request_id, delta
                if choices[delta.request_id].finish_reason is not None:
                    open_ids.discard(delta.request_id)
                    if delta.finish_reason is None:
                        self._core.abort(delta.request_id)
            if stats is None and not deltas:
                self._ready.wait(IDLE_WAIT_S)
                self._ready.clear()

    def _abort(self, choices: dict[str, _Choice]) -> None:
        for name in choices:
            self._core.abort(name)
        self._core.drain()
