"""A generation request from body to last byte: read, judge, admit, tokenize, run, write. Both routes take this way.

Errors are decided before the first byte wherever they can be, so that streamed and whole answers fail alike.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.admission import Permit
from server.api.body import ClientGone, read_body
from server.api.chat import ChatForm
from server.api.choice import Piece
from server.api.completions import CompletionForm
from server.api.errors import ApiError, JsonResponse
from server.api.facts import ModelFacts
from server.api.generation import Generation
from server.api.parse import parse_body
from server.api.prompts import read_conversation
from server.api.schema import ChatBody, read_fields
from server.api.services import Services
from server.api.stream import Envelope, write_stream
from server.api.validation import Call, Checked, check_chat, check_completion, prepare
from server.engine.decoding import DIFFUSION_SUFFIX

logger = logging.getLogger(__name__)

Form = type[CompletionForm] | type[ChatForm]
BYTES_PER_LOGPROB = 48


class GenerationResponse(Response):
    """The answer to a generation request, whatever it turns out to be. Reads its own body and watches its client."""

    def __init__(self, services: Services, form: Form) -> None:
        super().__init__()
        self._services, self._form = services, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = _Tracked(send)
        try:
            await self._serve(scope, receive, sending)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except ClientGone:
            pass
        except Exception:
            logger.exception("a request failed")
            if sending.has_started:
                raise
            await ApiError(500, "internal error").response()(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.monotonic()
        services = self._services
        raw = await read_body(scope, receive, services.settings, services.bodies)
        services.require_engine()
        services, facts, checked = await services.pool.run(len(raw), lambda: self._check(raw))
        # From here on it is one model's.
        self._services = services
        permit = services.admission.admit(checked.num_choices, checked.cost_tokens)
        try:
            call = await self._prepare(checked, facts, permit, scope)
            async with Generation(services, call, permit, receive, started_at) as generation:
                await self._answer(generation, scope, receive, send)
        finally:
            permit.release()

    def _check(self, raw: bytes) -> tuple[Services, ModelFacts, Checked]:
        services = self._services
        limits = services.settings.limits
        body = parse_body(raw, limits.max_depth, limits.max_items)
        if issubclass(self._form, CompletionForm):
            completion, unknown = read_fields(self._form.body_kind, body)
            services = services.of(completion.model)
            facts = services.facts()
            checked = check_completion(completion, facts, limits, services.tokenizer)
        else:
            chat, unknown = read_fields(ChatBody, body)
            services = services.of(chat.model)
            facts = services.facts()
            prompt = read_conversation(chat, services.chat_template, limits)
            checked = check_chat(chat, prompt, facts, limits, services.tokenizer)
        services.log_unknown_fields(unknown)
        return services, facts, checked

    async def _prepare(self, checked: Checked, facts: ModelFacts, permit: Permit, scope: Scope) -> Call:
        services = self._services
        limits = services.settings.limits
        salt = services.cache_salt(scope.get("braid_key"), checked.body.cache_salt)
        call_id = secrets.token_hex(12)
        # A conversation's cost is its template's, which may loop: never on the event loop.
        size = sum(prompt.num_bytes + (prompt.conversation is not None) * (1 << 20) for prompt in checked.prompts)
        size += sum(len(word) * 2 for word in checked.body.bad_words) + len(checked.prediction)
        call = await services.pool.run(size, lambda: prepare(checked, facts, limits, services.tokenizer, call_id, salt))
        permit.settle(call.num_prompt_tokens)
        permit.hold_logprobs(call.num_logprobs)
        return call

    async def _answer(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._services.settings
        is_stream = generation.call.checked.body.stream
        kind = self._form.chunk_kind if is_stream else self._form.kind
        answer_id = self._form.id_prefix + generation.call.requests[0].id.partition("-")[0]
        name = self._services.model_names[0]
        if generation.is_denoised and name + DIFFUSION_SUFFIX in self._services.model_names:
            name += DIFFUSION_SUFFIX
        envelope = Envelope(answer_id, kind, int(time.time()), name, settings.system_fingerprint)
        form = self._form(generation, envelope, self._services.tokenizer)
        if is_stream:
            await write_stream(generation, form, envelope, send, settings.timeouts)
            return
        pieces: list[Piece] = []
        while not generation.is_finished:
            pieces += await generation.take()
        response = await self._services.pool.run(_answer_bytes(pieces, generation), _writing(form.whole, pieces))
        await response(scope, receive, send)


def _writing(whole: Callable[[list[Piece]], dict[str, Any]], pieces: list[Piece]) -> Callable[[], Response]:
    return lambda: JsonResponse(whole(pieces))


def _answer_bytes(pieces: list[Piece], generation: Generation) -> int:
    """Size of the work of formatting logprobs, which can be large for prompts."""
    checked = generation.call.checked
    width = BYTES_PER_LOGPROB * (1 + max(checked.logprobs or 0, checked.prompt_logprobs or 0))
    num_entries = sum(len(piece.judged) for piece in pieces)
    return width * (num_entries + sum(len(choice.prompt_logprobs) for choice in generation.choices))


class _Tracked:
    """`send` that remembers whether the status line is out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_started = False

    async def __call__(self, message: Any) -> None:
        self.has_started = True
        await self._send(message)
