"""What the HTTP side is allowed to do: every limit a client can run into, in one frozen value.

`server/config.py` builds it once from the command line and files; nothing here is written again. Documented in
`server/api/README.md` (a test compares the two).
"""

from __future__ import annotations

from dataclasses import dataclass, field

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]", "testserver")


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of what one request may ask for (robustness.md 0.1). Counts, characters, or as the name says.

    max_items          lists, objects and names in a body, all fields together
    max_logprob_entries  log-probabilities that one call may ask for, and a quarter of what all calls together may
    max_output_tokens  cap of max_tokens; None = what the context leaves
    """

    max_body_bytes: int = 2 << 20
    max_headers: int = 100
    max_header_bytes: int = 64 << 10
    max_depth: int = 64
    max_items: int = 1 << 15
    max_prompts: int = 128
    max_n: int = 128
    max_choices: int = 256
    max_output_tokens: int | None = None
    max_logprobs: int = 20
    max_logprob_entries: int = 1 << 20
    max_stop_strings: int = 4
    max_stop_chars: int = 256
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_allowed_token_ids: int = 1024
    max_bad_words: int = 128
    max_bad_word_tokens: int = 1024
    max_grammar_bytes: int = 8 << 10
    max_grammar_depth: int = 32
    max_label_chars: int = 128
    max_messages: int = 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `first_token_s` is how long a stream's status line waits for the first token; `request_s` ends any
    request; `write_s` ends a stream whose reader does not read."""

    body_s: float = 30.0
    first_token_s: float = 10.0
    request_s: float = 600.0
    write_s: float = 30.0
    keep_alive_s: float = 15.0
    health_generate_s: float = 10.0
    health_cache_s: float = 1.0
    template_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """served_model_names  accepted as `model`; the first is echoed in answers and metrics
    api_keys             bearer keys; none = no authentication
    allowed_hosts        values of the Host header (without port); None = any
    metrics_need_key     /metrics asks for a key too (when there are keys)
    max_requests         requests held at once, running and queued; a call with n samples of p prompts holds n * p;
                         None = what the engine runs and queues
    max_queued_tokens    prompt tokens of calls that have no output yet; None = the engine's own limit
    max_body_memory      bytes of all bodies on their way in
    text_threads, text_queue   workers and waiting jobs for tokenizing and rendering
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    metrics_need_key: bool = False
    max_requests: int | None = None
    max_queued_tokens: int | None = None
    max_body_memory: int = 64 << 20
    text_threads: int = 2
    text_queue: int = 64
    chat_template: str | None = None
    system_fingerprint: str | None = None
    version: str = "0.1.0"
    log_requests: bool = False
    status_interval_s: float = 10.0
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)
