"""A scripted OpenAI-like server for the load generator's tests: known token times, counts and failures, no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from server.bench.client import Target

Answer = Callable[["FakeServer", dict[str, Any], asyncio.StreamWriter], Any]


@dataclass
class FakeServer:
    """`gap_s` before each token; `refuse` maps a request's number (from 0) to a status; `cut_after` ends the connection
    after that many tokens; `bursts` maps a model's name to the tokens of each of its events, 1 for others."""

    gap_s: float = 0.002
    takes_token_ids: bool = True
    counts_tokens: bool = True
    max_model_len: int | None = 4096
    refuse: dict[int, int] = field(default_factory=dict)
    cut_after: int | None = None
    names: tuple[str, ...] = ("fake",)
    bursts: dict[str, int] = field(default_factory=dict)
    is_chunked: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    _answering: set[asyncio.Task[Any]] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Target]:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        try:
            yield Target("127.0.0.1", server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for task in (left := list(self._answering)):
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection is handled by a task"
        self._answering.add(task)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.headers.append(head)
            if head.startswith("GET /v1/models"):
                length = {"max_model_len": self.max_model_len} if self.max_model_len else {}
                entries = [{"id": name, "object": "model"} | length for name in self.names]
                self._plain(writer, 200, {"object": "list", "data": entries})
                return
            size = int(head.lower().split("content-length:")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(size))
            await self._answer(body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._answering.discard(task)
            self.in_flight -= 1
            writer.close()

    def _plain(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        payload = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        if isinstance(prompt, list) and not self.takes_token_ids:
            self._plain(writer, 400, {"error": {"message": "prompt must be a string"}})
            return
        if number in self.refuse:
            self._plain(writer, self.refuse[number], {"error": {"message": f"refused with {self.refuse[number]}"}})
            return
        prompt_tokens = len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split()) + 1
        framing = "Transfer-Encoding: chunked" if self.is_chunked else "Connection: close"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n\r\n".encode())
        burst, total = self.bursts.get(body.get("model", ""), 1), body["max_tokens"]
        for number_out in (min(i + burst, total) for i in range(0, total, burst)):
            await asyncio.sleep(self.gap_s)
            if self.cut_after is not None and number_out > self.cut_after:
                return
            text = {"text": "x"} if "prompt" in body else {"delta": {"content": "x"}}
            event: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": None} | text]}
            if self.counts_tokens:
                event["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": number_out}
            self._event(writer, json.dumps(event))
            await writer.drain()
        last: dict[str, Any] = {"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "length"}]}
        self._event(writer, json.dumps(last))
        if self.counts_tokens:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": total}
            self._event(writer, json.dumps({"choices": [], "usage": usage}))
        self._event(writer, "[DONE]")
        if self.is_chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, content: str) -> None:
        payload = f"data: {content}\n\n".encode()
        writer.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n" if self.is_chunked else payload)
