"""What every handler needs, put together once by `app.create_app`, and the engine as the HTTP side sees it."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.types import Delta, Request, SpeculationMode, StepStats
from server.api.admission import Admission
from server.api.attention import AttentionFacts
from server.api.body import BodyMemory
from server.api.errors import ApiError, shown
from server.api.facts import ModelFacts
from server.api.pool import TextPool
from server.api.prompt_attention import PromptAttentionFacts
from server.api.settings import ApiSettings
from server.api.speculation import SpeculationFacts
from server.engine.config import EngineInfo, EngineState
from server.metrics import Metrics
from server.text.chat import ChatTemplate
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_UNKNOWN_FIELDS_LOGGED = 200


class Stream(Protocol):
    """The deltas of one request; closing it aborts the request unless it has ended."""

    async def __anext__(self) -> Delta: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """The part of `EngineClient` that the HTTP side uses."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def state(self) -> EngineState: ...
    @property
    def stats(self) -> StepStats: ...
    @property
    def restarts(self) -> int: ...
    def generate(self, request: Request) -> Stream: ...


@dataclass(frozen=True, slots=True)
class Services:
    """Of one model; what is not the model's is shared.

    tokenizer, metrics, admission, chat_template, model_names   the model's; the first name is echoed in answers
    engine_model   its name in the engine (`Request.model`)
    by_name        the services of every model of the server, by the names of the API; the first model's come first
    """

    settings: ApiSettings
    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    admission: Admission
    pool: TextPool
    bodies: BodyMemory
    chat_template: ChatTemplate | None
    model_names: tuple[str, ...]
    delimiters: tuple[int, ...]
    created: int
    engine_model: str = ""
    by_name: dict[str, Services] = field(default_factory=dict)
    logged_fields: set[str] = field(default_factory=set)

    @property
    def all(self) -> tuple[Services, ...]:
        """Those of each model once, the first model's first."""
        return tuple({services.engine_model: services for services in self.by_name.values()}.values())

    @property
    def info(self) -> EngineInfo:
        return self.engine.info.of(self.engine_model)

    def of(self, name: str | None) -> Services:
        """Those of the model that a client names; our own for no name, and for one that is nobody's (`check_model`)."""
        return self if name is None else self.by_name.get(name, self)

    def facts(self) -> ModelFacts:
        """What validation needs of the model. Raises ApiError 503 while there is no engine."""
        self.require_engine()
        info = self.info
        return ModelFacts(
            names=tuple(self.by_name),
            model=self.engine_model,
            model_len=info.model_len,
            vocab_size=info.vocab_size,
            eos_ids=info.eos_ids,
            max_logprobs=info.max_logprobs,
            max_choices=self.admission.max_requests,
            max_queued_tokens=max(self.admission.max_tokens, info.model_len),
            speculation=SpeculationFacts(
                SpeculationMode(info.speculation),
                tuple(name for name, _ in info.drafters),
                info.max_drafts,
                info.model_len,
                max(self.admission.max_tokens, info.model_len),
            ),
            attention=AttentionFacts(
                info.attention, info.default_attention, info.attention_budget, info.attention_correct_every
            ),
            prompt_attention=PromptAttentionFacts(info.prompt_attention, info.default_prompt_attention),
            diffusion=info.diffusion,
            delimiters=self.delimiters,
            max_step=info.max_batched_tokens,
        )

    def require_engine(self) -> None:
        state = self.engine.state
        if state in (EngineState.READY, EngineState.HUNG):
            return
        self.metrics.count_rejection("unavailable")
        retry_after = None if state is EngineState.DEAD else 2
        raise ApiError(503, STATE_WORDS[state], code="service_unavailable", retry_after=retry_after)

    def cache_salt(self, key: str | None, asked: str | None) -> str:
        """Prefix pages are shared inside a salt: one per API key where there are several, and per asked salt (S-50)."""
        owner = ""
        if key is not None and len(self.settings.api_keys) > 1:
            owner = hashlib.sha256(key.encode()).hexdigest()[:32]
        return f"{owner}/{asked or ''}" if owner or asked else ""

    def log_unknown_fields(self, names: tuple[str, ...]) -> None:
        """Each name once, and not without end: names come from clients."""
        for name in names:
            if name not in self.logged_fields and len(self.logged_fields) < MAX_UNKNOWN_FIELDS_LOGGED:
                self.logged_fields.add(name)
                logger.info("ignoring the unknown request field %s", shown(name))


STATE_WORDS = {
    EngineState.LOADING: "the model is being loaded",
    EngineState.RESTARTING: "the engine is restarting",
    EngineState.DRAINING: "the server is shutting down",
    EngineState.HUNG: "the engine does not answer",
    EngineState.DEAD: "the engine has failed",
    EngineState.READY: "ready",
}
