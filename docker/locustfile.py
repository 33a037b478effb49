"""Load for a running server, from a browser or headless: streamed completions, TTFT and TBT as metrics of their own.

    locust --locustfile docker/locustfile.py --host http://127.0.0.1:8000
    locust --locustfile docker/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --run-time 30s

Shown beside the request itself: `TTFT` (until the first text), `TBT` (each later gap) and `tokens` (output tokens of a
request, in the column of response lengths). A 429 is the server protecting itself: it appears as `429 refused`, not as
a failure.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from locust import HttpUser, between, events, task
from locust.argument_parser import LocustArgumentParser
from requests import RequestException

PATH = "/v1/completions"
TEXT = "a server reads the request makes one step for all of them and sends each token as soon as it is known"
WORDS = TEXT.split()


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    parser.add_argument("--model-name", default="", help="model to ask for (otherwise the first of /v1/models)")
    parser.add_argument("--prompt-words", type=int, default=64, help="words of each prompt")
    parser.add_argument("--output-tokens", type=int, default=48, help="max_tokens of each request")
    parser.add_argument("--key", default="", is_secret=True, help="API key of the server")


class Reader(HttpUser):
    """A person who reads an answer as it comes and asks again after a pause."""

    wait_time = between(0.2, 1.0)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.auth = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        self.model = options.model_name or self.client.get("/v1/models", headers=self.auth).json()["data"][0]["id"]
        self.rng = random.Random()

    @task
    def complete(self) -> None:
        options = self.environment.parsed_options
        body = {
            "model": self.model,
            "prompt": " ".join(self.rng.choices(WORDS, k=options.prompt_words)),
            "max_tokens": options.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        with self.client.post(PATH, json=body, headers=self.auth, stream=True, catch_response=True) as response:
            if response.status_code == 429:
                self.report("429 refused", time.perf_counter() - start)
                response.success()
                return
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            try:
                problem = self.read(response, start)
            except (RequestException, ValueError) as broken:
                problem = f"broken stream: {type(broken).__name__}"
            if problem:
                response.failure(problem)
            else:
                response.success()

    def read(self, response: Any, start: float) -> str | None:
        """Follow the events to [DONE]; returns what was wrong, None if all was well."""
        last: float | None = None
        num_tokens = 0
        # chunk_size None: a line is there as soon as its chunk is, not when a buffer is full.
        for line in response.iter_lines(chunk_size=None, decode_unicode=True):
            if not line.startswith("data:"):
                continue
            content = line[5:].strip()
            if content == "[DONE]":
                self.report("tokens", 0.0, num_tokens)
                return None if last is not None else "an answer without text"
            event = json.loads(content)
            if event.get("error"):
                return str(event["error"].get("message"))
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
            if any(choice.get("text") for choice in event.get("choices", ())):
                now = time.perf_counter()
                self.report("TTFT" if last is None else "TBT", now - (start if last is None else last))
                last = now
        return "the stream ended without [DONE]"

    def report(self, name: str, seconds: float, length: int = 0) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=1e3 * seconds,
            response_length=length,
            exception=None,
            context={},
        )
