"""`create_app`: the ASGI application, put together. The list of routes is here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.admission import Admission
from server.api.body import BodyMemory
from server.api.chat import ChatForm
from server.api.completions import CompletionForm, DenoiseForm
from server.api.errors import ApiError, shown
from server.api.facts import served_names
from server.api.handler import Form, GenerationResponse
from server.api.middleware import EdgeMiddleware
from server.api.monitor import monitoring
from server.api.pool import TextPool
from server.api.routes import HealthRoutes, ModelRoutes, ServerRoutes, TextRoutes
from server.api.schema import ChatBody, CompletionBody, DenoiseBody, DetokenizeBody, TokenizeBody
from server.api.services import Engine, Services
from server.api.settings import ApiSettings
from server.engine.config import EngineInfo
from server.engine.decoding import MAX_DELIMITERS
from server.metrics import Metrics
from server.text.chat import ChatTemplate
from server.text.tokenizer import Tokenizer


class Application:
    """The ASGI callable: the edge around FastAPI's routes."""

    def __init__(self, api: FastAPI, services: Services) -> None:
        self.api, self.services = api, services
        self._edge = EdgeMiddleware(api, services)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._edge(scope, receive, send)


def create_app(
    settings: ApiSettings,
    client: Engine,
    tokenizer: Tokenizer,
    metrics: Metrics,
    others: Sequence[tuple[str, Tokenizer, Metrics]] = (),
) -> Application:
    """The application over an engine; give each model's `metrics.observe_step` to the engine client as `on_step`.

    others  the engine's further models: name (the engine's and the API's), tokenizer, metrics (`beside` the first's)
    Raises ChatTemplateError if a model's template does not compile, ValueError for a served name that would be two.
    """
    template = _template(settings.chat_template, tokenizer, settings)
    services = Services(
        settings=settings,
        engine=client,
        tokenizer=tokenizer,
        metrics=metrics,
        admission=Admission(settings, lambda: client.info, metrics),
        pool=TextPool(settings.text_threads, settings.text_queue, metrics),
        bodies=BodyMemory(settings.max_body_memory),
        chat_template=template,
        **_names_and_delimiters(settings.served_model_names, client.info, tokenizer),
        created=int(time.time()),
    )
    for its in (services, *(_beside(services, *parts) for parts in others)):
        if twice := [name for name in its.model_names if name in services.by_name]:
            raise ValueError(f"{twice[0]} is the name of two models; give one another: also-serve NAME=MODEL")
        services.by_name.update(dict.fromkeys(its.model_names, its))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with monitoring(services):
            yield

    api = FastAPI(
        title="Braid",
        version=settings.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_routes(api, services)
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(ApiError, _on_api_error)
    return Application(api, services)


def _template(source: str | None, tokenizer: Tokenizer, settings: ApiSettings) -> ChatTemplate | None:
    """source: used instead of the tokenizer's own."""
    source = tokenizer.chat_template if source is None else source
    return None if source is None else ChatTemplate(source, tokenizer, deadline_s=settings.timeouts.template_s)


def _beside(first: Services, name: str, tokenizer: Tokenizer, metrics: Metrics) -> Services:
    """The services of a further model."""
    return replace(
        first,
        tokenizer=tokenizer,
        metrics=metrics,
        admission=Admission(first.settings, lambda: first.engine.info.of(name), metrics),
        chat_template=_template(None, tokenizer, first.settings),
        engine_model=name,
        **_names_and_delimiters((name,), first.engine.info.of(name), tokenizer),
    )


def _names_and_delimiters(names: tuple[str, ...], info: EngineInfo, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields of `Services` that depend on how the model can generate."""
    delimiters = tokenizer.line_end_ids(MAX_DELIMITERS) if info.diffusion is not None else ()
    return {"model_names": served_names(names, info.diffusion), "delimiters": delimiters}


def _add_routes(api: FastAPI, services: Services) -> None:
    models, health = ModelRoutes(services), HealthRoutes(services)
    text, server = TextRoutes(services), ServerRoutes(services)
    routes: list[tuple[str, str, Callable[..., Any], type[BaseModel] | None]] = [
        ("POST", "/v1/completions", _generation(services, CompletionForm), CompletionBody),
        ("POST", "/v1/chat/completions", _generation(services, ChatForm), ChatBody),
        ("POST", "/v1/denoise/stream", _generation(services, DenoiseForm), DenoiseBody),
        ("GET", "/v1/models", models.list_models, None),
        ("GET", "/v1/models/{model:path}", models.get_model, None),
        ("POST", "/tokenize", text.tokenize, TokenizeBody),
        ("POST", "/detokenize", text.detokenize, DetokenizeBody),
        ("GET", "/health", health.ready, None),
        ("GET", "/health/live", health.live, None),
        ("GET", "/health/generate", health.generate, None),
        ("GET", "/ping", health.ready, None),
        ("GET", "/version", server.version, None),
        ("GET", "/metrics", server.metrics, None),
    ]
    for method, path, endpoint, body in routes:
        name = path.strip("/").replace("/", "_")
        api.add_api_route(
            path, endpoint, methods=[method], response_model=None, openapi_extra=_documented(body), name=name
        )


def _generation(services: Services, form: Form) -> Callable[..., Any]:
    async def endpoint() -> Response:
        return GenerationResponse(services, form)

    return endpoint


def _documented(body: type[BaseModel] | None) -> dict[str, Any] | None:
    """The body's schema for /openapi.json; FastAPI itself must not read bodies (it takes NaN and lone surrogates)."""
    if body is None:
        return None
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


async def _on_http_exception(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = shown(request.scope["path"], 100)
    if error.status_code == 404:
        return ApiError(404, f"there is no route {path}").response()
    if error.status_code == 405:
        response = ApiError(405, f"the method {shown(request.method, 10)} is not allowed for {path}").response()
        allow = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow")
        if allow:
            response.headers["allow"] = allow
        return response
    return ApiError(error.status_code, "the request was refused").response()


async def _on_api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()
