"""The small routes: models, health, tokenizing, version, metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from scheduler.types import FinishReason, Request, Sampling
from server.api.body import read_body
from server.api.errors import ApiError, JsonResponse, invalid, shown
from server.api.facts import check_model
from server.api.lengths import too_long
from server.api.parse import parse_body
from server.api.prompts import RawPrompt, read_conversation, read_prompts
from server.api.schema import DetokenizeBody, TokenizeBody, read_fields
from server.api.services import STATE_WORDS, Services
from server.engine.client import EngineUnavailable
from server.engine.config import EngineState
from server.engine.decoding import AUTOREGRESSIVE, DIFFUSION_SUFFIX, default_decoding

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ModelRoutes:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def list_models(self) -> Response:
        return JsonResponse({"object": "list", "data": [self._card(name) for name in self._services.by_name]})

    async def get_model(self, request: HttpRequest) -> Response:
        name = request.path_params["model"]
        if name not in self._services.by_name:
            raise ApiError(404, f"the model {shown(name)} does not exist", "model", "model_not_found")
        return JsonResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        services = self._services.of(name)
        state = services.engine.state
        is_known = state in (EngineState.READY, EngineState.HUNG, EngineState.DRAINING)
        info = services.info
        decoding: dict[str, Any] = {"policy": AUTOREGRESSIVE}
        if (model := info.diffusion) is not None and (not model.is_dual or name.endswith(DIFFUSION_SUFFIX)):
            decoding = {"policy": model.policy, "topology": model.topology, "block_size": model.block_size}
        return {
            "id": name,
            "object": "model",
            "created": services.created,
            "owned_by": "braid",
            "root": services.model_names[0],
            "parent": None,
            "max_model_len": info.model_len if is_known else None,
            "decoding": decoding,
        }


class HealthRoutes:
    """Readiness, liveness, and a real token; the last is measured at most once a second however many ask."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._probe: asyncio.Task[None] | None = None
        self._probed_at = float("-inf")

    async def ready(self) -> Response:
        state = self._services.engine.state
        if state is EngineState.READY:
            return Response(b"", 200)
        return ApiError(503, STATE_WORDS[state], code=state.value).response()

    async def live(self) -> Response:
        return Response(b"", 200)

    async def generate(self) -> Response:
        """200 when one token of each model came within 10 s, now or in the last second. Raises ApiError 503."""
        timeouts = self._services.settings.timeouts
        is_fresh = time.monotonic() - self._probed_at < timeouts.health_cache_s
        if self._probe is None or (self._probe.done() and not is_fresh):
            self._probe = asyncio.create_task(self._generate_from_all())
        try:
            # Shielded: one prober's leaving must not cancel the token that the others wait for.
            await asyncio.wait_for(asyncio.shield(self._probe), timeouts.health_generate_s)
        except TimeoutError as error:
            raise ApiError(503, f"no token within {timeouts.health_generate_s:g} s") from error
        return Response(b"", 200)

    async def _generate_from_all(self) -> None:
        try:
            for services in self._services.all:
                await self._generate_one(services)
        finally:
            self._probed_at = time.monotonic()

    async def _generate_one(self, services: Services) -> None:
        decoding = default_decoding(services.info.diffusion)
        greedy, model = Sampling(temperature=0.0), services.engine_model
        request = Request(f"health-{secrets.token_hex(8)}", (0,), 1, greedy, decoding=decoding, model=model)
        try:
            stream = self._services.engine.generate(request)
            try:
                delta = await stream.__anext__()
                while delta.finish_reason is None:
                    delta = await stream.__anext__()
            finally:
                stream.close()
        except (EngineUnavailable, StopAsyncIteration) as error:
            raise ApiError(503, str(error) or "the engine gave no token") from error
        if delta.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise ApiError(503, "the engine failed on a one-token request")


class TextRoutes:
    """/tokenize and /detokenize, with the limits of a prompt."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def tokenize(self, request: HttpRequest) -> Response:
        raw = await read_body(request.scope, request.receive, self._services.settings, self._services.bodies)
        return await self._services.pool.run(len(raw) * 4, lambda: self._tokenize(raw))

    def _tokenize(self, raw: bytes) -> Response:
        services = self._services
        limits = services.settings.limits
        body, unknown = read_fields(TokenizeBody, parse_body(raw, limits.max_depth, limits.max_items))
        services.log_unknown_fields(unknown)
        services = services.of(body.model)
        facts = services.facts()
        check_model(body.model, facts)
        if body.messages:
            if body.prompt is not None:
                raise invalid("prompt", "prompt and messages are both given; give one")
            prompt = read_conversation(body, services.chat_template, limits)
        else:
            if body.prompt is None:
                raise invalid("prompt", "give prompt, a string, or messages")
            specials = True if body.add_special_tokens is None else body.add_special_tokens
            prompt = read_prompts(body.prompt, facts.vocab_size, limits, specials)[0] if body.prompt else RawPrompt("")
        longest = services.tokenizer.max_bytes_per_token
        if longest is not None and prompt.num_bytes > facts.model_len * longest:
            raise too_long(prompt.num_bytes // longest, None, facts.model_len, "at least ")
        ids = list(prompt.encode(services.tokenizer))
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": facts.model_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [services.tokenizer.token_text(token) for token in ids]
        return JsonResponse(answer)

    async def detokenize(self, request: HttpRequest) -> Response:
        raw = await read_body(request.scope, request.receive, self._services.settings, self._services.bodies)
        return await self._services.pool.run(len(raw) * 4, lambda: self._detokenize(raw))

    def _detokenize(self, raw: bytes) -> Response:
        services = self._services
        limits = services.settings.limits
        body, unknown = read_fields(DetokenizeBody, parse_body(raw, limits.max_depth, limits.max_items))
        services.log_unknown_fields(unknown)
        services = services.of(body.model)
        facts = services.facts()
        check_model(body.model, facts)
        tokens = body.tokens
        if not isinstance(tokens, list):
            raise invalid("tokens", "tokens must be a list of token ids")
        if len(tokens) > facts.model_len:
            raise invalid("tokens", f"tokens has {len(tokens)} entries, the limit is {facts.model_len}")
        for token in tokens:
            if type(token) is not int or not 0 <= token < facts.vocab_size:
                raise invalid("tokens", f"tokens must hold token ids of this model, 0 to {facts.vocab_size - 1}")
        return JsonResponse({"prompt": services.tokenizer.decode(tokens, skip_special_tokens=False)})


class ServerRoutes:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._page: asyncio.Task[bytes] | None = None

    async def version(self) -> Response:
        services = self._services
        answer: dict[str, Any] = {"version": services.settings.version}
        if services.engine.state is EngineState.READY and services.engine.info.synthetic_acceptance is not None:
            # Speeds of such a server are made up (--synthetic-acceptance): nobody should measure it unawares.
            answer["synthetic_acceptance"] = services.engine.info.synthetic_acceptance
        return JsonResponse(answer)

    async def metrics(self) -> Response:
        services = self._services
        for its in services.all:
            its.metrics.observe_engine(services.engine.state is EngineState.READY, services.engine.restarts)
        if self._page is None or self._page.done():
            # Some milliseconds, for whoever asks however often: off the loop, and once at a time.
            self._page = asyncio.create_task(asyncio.to_thread(services.metrics.render))
        return Response(await asyncio.shield(self._page), media_type=METRICS_TYPE)
