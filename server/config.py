"""ServerConfig: every setting of the server, declared once. Flags, YAML keys, `--help` and README table come from here.

Frozen: read once, validated, handed on as the small values that each part needs. Names are vLLM's where the setting is.
No environment variable is read. The command line and files are parsed in flags.py.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from scheduler.types import MAX_TREE_NODES
from server.also import AlsoServed, check_models, name_of, read_also, with_others
from server.api.settings import LOOPBACK_HOSTS, ApiSettings, Limits, Timeouts
from server.engine.config import EngineConfig, LabelDtype
from server.groups import attention_config, speculation_config
from server.values import Auto, AutoCount, Count, Listed, Names, PolicyName, Seconds, Shares, Switch, Table, settings_of

VERSION = "0.1.0"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_GROUPS = (
    "model",
    "engine",
    "speculation",
    "attention",
    "diffusion",
    "HTTP",
    "limits of one request",
    "life cycle and logs",
)
_model, _engine, _drafts, _sparse, _denoise, _http, _limits, _life = map(settings_of, _GROUPS)


class ServerConfig(BaseModel):
    """`python -m server [serve] [MODEL] [--flag value ...]`"""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    model: str = _model("braid-tiny", "folder, hub id, or an embedded model (braid-tiny)", min_length=1)
    served_model_name: Names = _model((), "name in the API, repeatable; the first is echoed (default: MODEL)")
    also_serve: Names = _model((), "a further model, NAME=MODEL or MODEL, repeatable; models take turns, step by step")
    revision: str | None = _model(None, "branch, tag or commit of a hub model")
    download_dir: str | None = _model(None, "where hub models are kept (default: the hub library's cache)")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _model("auto", "auto = bfloat16 where it is native")
    device: Literal["auto", "cpu", "cuda"] = _model("auto", "auto = cuda if there is one")
    quantization: Literal["int8", "int4"] | None = _model(None, "weight-only, lossy: the text changes")
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8", "int8"] = _model(
        "auto", "auto = the model's; fp8, int8: lossy, the text changes; refused where the back end has none"
    )
    kv_cache_scales: str | None = _model(None, "file of scales for fp8; auto = the checkpoint's, else 1", min_length=1)
    deterministic: bool = _model(False, "attention never depends on the batch; on a GPU slower, products still may")
    random_weights: str | None = _model(
        None, "serve a shape without downloading it, e.g. hidden=768,layers=12,heads=12,kv_heads=4,mlp=3072,vocab=8192"
    )
    seed: int = _model(0, "seed of random weights; requests have their own", ge=0)
    max_model_len: AutoCount = _model(None, "longest prompt + output in tokens (32k); auto = the model's, if it fits")
    chat_template: Path | None = _model(None, "Jinja file used instead of the model's own chat template")

    max_num_batched_tokens: Count = _engine(1024, "most tokens in a step; the step-time target may choose fewer")
    max_num_seqs: Count = _engine(64, "sequences running at once")
    max_num_queued_reqs: AutoCount = _engine(None, "sequences waiting before 429; auto = 4 x max-num-seqs")
    max_num_queued_tokens: AutoCount = _engine(None, "prompt tokens waiting before 429; auto = 8 x context")
    queue_timeout: Seconds = _engine(30.0, "seconds a request may wait for its first step before 503")
    tbt_slo_ms: Annotated[Seconds | None, Auto] = _engine(
        None, "time between tokens that 99 in 100 steps keep; auto = 2.1 x a step of all who are here"
    )
    max_prefill_share: float = _engine(0.5, "most of a step's prefill budget for one prompt if others wait", gt=0, le=1)
    block_size: AutoCount = _engine(None, "tokens of a KV page; auto = what measured best on the device")
    kv_cache_memory: AutoCount = _engine(None, "bytes of the KV pool (2GiB); auto = a share of what is free")
    kv_shares: Shares = _engine((), "parts of that memory for each model, the first one first (3,1); auto = equal")
    gpu_memory_utilization: float = _engine(
        0.9, "part of a GPU's memory for weights, a step, CUDA graphs and, of what is left, KV pages", gt=0, le=1
    )
    enforce_eager: bool = _engine(False, "no CUDA graphs: a faster start, slower small steps")
    max_cudagraph_capture_size: AutoCount = _engine(
        None, "tokens of the largest step in a CUDA graph; auto = 512, or max-num-batched-tokens"
    )
    async_scheduling: Annotated[Literal["auto", "on", "off"], Switch] = _engine(
        "auto", "a step is planned and launched while the one before it runs; auto = on a GPU; never the text"
    )
    enable_prefix_caching: bool = _engine(True, "reuse the KV of prompts that begin alike")
    threads: AutoCount = _engine(None, "CPU threads of a step; auto = physical cores")
    grammar_timeout: Seconds = _engine(5.0, "seconds to compile a structured-output constraint")
    delta_interval_ms: float = _engine(10.0, "tokens of faster steps share a message this long; 0 = one a step", ge=0)
    step_timeout: Seconds = _engine(120.0, "seconds without a step's end before the engine is restarted")

    speculation: Annotated[Literal["auto", "on", "off"], Switch] = _drafts(
        "auto", "auto = as many drafts as pay, on = all that are offered, off = no drafter is loaded; never the text"
    )
    drafters: Listed = _drafts(
        None, "names, preferred first; auto = prediction,grammar,suffix, those set below, diffusion where it can be"
    )
    num_speculative_tokens: Count = _drafts(8, "most drafts of a sequence in a step", le=MAX_TREE_NODES - 1)
    speculation_policy: Literal["marginal", "uniform", "fixed", "table"] = _drafts(
        "marginal", "who gets how many drafts; fixed = always num-speculative-tokens"
    )
    speculation_table: Table = _drafts((), "for table: drafts up to so many decoding sequences, 1:8,4:4; beyond none")
    draft_model: str | None = _drafts(None, "folder, hub id or embedded model (braid-tiny-draft), same tokenizer")
    draft_stop: Literal["fixed", "confidence", "acc_head"] = _drafts(
        "confidence", "when a model drafter stops early; fixed = never"
    )
    draft_tree: bool = _drafts(False, "drafts may branch, where a request does not say")
    layer_subset: str | None = _drafts(
        None, "draft with a part of the model's own layers: uniform:<share skipped>, search or exit"
    )
    draft_store_memory: Count = _drafts(256 << 20, "bytes of what lookup drafters remember of all requests (256MiB)")
    draft_store_file: Path | None = _drafts(None, "file that keeps it over a restart")
    synthetic_acceptance: Annotated[float, Field(gt=0, le=1)] | None = _drafts(
        None, "capacity tests only: repeated requests get drafts that are right this often; the text stays the model's"
    )

    sparse_attention: Listed = _sparse(
        None,
        "methods that requests may choose: quest,tidal,double_sparsity,double_sparsity_pages for answers (their KV "
        "metadata takes memory), xattention,pbs for prompts",
    )
    attention_method: Literal["dense", "quest", "double_sparsity", "tidal", "double_sparsity_pages"] = _sparse(
        "dense", "of requests that say nothing; not dense: the text is another"
    )
    attention_budget: Count = _sparse(1024, "keys that a token of the output reads, where a request does not say")
    attention_correct_every: int = _sparse(0, "output tokens whose KV is computed again at a time; 0 = never", ge=0)
    attention_prefill: Literal["dense", "xattention", "pbs"] = _sparse(
        "dense", "of the prompts of requests that say nothing; not dense: the text is another"
    )
    attention_prefill_threshold: float = _sparse(0.9, "share of a prompt's attention that is kept", gt=0, le=1)
    attention_prefill_from: Count = _sparse(
        4096, "rows of a prompt before this position read everything; a multiple of 512"
    )
    attention_calibration: Names = _sparse((), "files of calibration, repeatable: .safetensors channels, .json layers")
    attention_channels: AutoCount = _sparse(
        None, "label channels of double_sparsity and its pages; auto = head size / 4, of int4 / 2"
    )
    kv_offload: bool = _sparse(False, "K and V of the middle layers in host memory; for double_sparsity alone")
    kv_offload_memory: AutoCount = _sparse(None, "most host memory for them (64GiB); auto = half of what is free")
    attention_label_dtype: LabelDtype = _sparse("model", "of these labels; int4: less memory and reads, coarser choice")

    default_decoding: PolicyName = _denoise(None, "policy of diffusion requests that name none; auto = the model's")
    denoise_block_size: AutoCount = _denoise(None, "tokens of a block; auto = the checkpoint's or its family's")

    host: str = _http("127.0.0.1", "address to bind; 0.0.0.0 = all interfaces")
    port: int = _http(8000, "port to bind; 0 = any free one", ge=0, le=65535)
    api_key: Names = _http((), "bearer key, repeatable; none = no authentication")
    api_key_file: Path | None = _http(None, "file with one key a line")
    metrics_need_key: bool = _http(False, "/metrics asks for a key too")
    allowed_hosts: Names = _http(
        (), "Host headers served, repeatable; * = any (default: any, on loopback only its names)"
    )
    max_connections: Count = _http(1024, "open connections before 503")
    max_header_size: Count = _http(64 << 10, "bytes of a request's header block")
    max_headers: Count = _http(100, "headers of a request")
    max_body_size: Count = _http(2 << 20, "bytes of a request's body (2MiB)", le=32 << 20)
    max_body_memory: Count = _http(64 << 20, "bytes of all bodies on their way in")
    body_timeout: Seconds = _http(30.0, "seconds to receive a body")
    write_timeout: Seconds = _http(30.0, "seconds a reader may take nothing before its request is aborted")
    header_timeout: Seconds = _http(10.0, "seconds to receive a request's head")
    keep_alive_timeout: Seconds = _http(15.0, "seconds an idle connection is kept")

    max_output_tokens: AutoCount = _limits(None, "cap of max_tokens; auto = what the context leaves")
    max_logprobs: int = _limits(20, "cap of logprobs, top_logprobs and prompt_logprobs", ge=0, le=1000)
    max_logprob_entries: Count = _limits(
        1 << 20, "log-probabilities a call may ask for: tokens x samples x (1 + logprobs)"
    )
    max_prompts: Count = _limits(128, "prompts in a call")
    max_n: Count = _limits(128, "samples of a prompt")
    max_choices: Count = _limits(256, "prompts x n")
    max_stop_strings: Count = _limits(4, "stop strings")
    max_stop_chars: Count = _limits(256, "characters of a stop string")
    max_stop_token_ids: Count = _limits(128, "stop token ids")
    max_logit_bias: Count = _limits(1024, "entries of logit_bias")
    max_allowed_token_ids: Count = _limits(1024, "entries of allowed_token_ids")
    max_bad_words: Count = _limits(128, "entries of bad_words")
    max_bad_word_tokens: Count = _limits(1024, "tokens in all bad_words")
    max_grammar_size: Count = _limits(8 << 10, "bytes of a schema, regex or grammar")
    max_grammar_depth: Count = _limits(32, "nesting of a schema")
    max_messages: Count = _limits(1024, "messages of a chat")
    max_json_depth: Count = _limits(64, "nesting of a body")
    max_json_items: Count = _limits(1 << 15, "lists, objects and names in a body")
    request_timeout: Seconds = _limits(600.0, "seconds from arrival to the last token")

    drain_delay: float = _life(0.0, "seconds of accepting connections after SIGTERM, readiness already 503", ge=0)
    drain_timeout: float = _life(25.0, "seconds that requests in flight may take to finish after SIGTERM", ge=0)
    log_format: Literal["text", "json"] = _life("text", "form of the lines on standard error")
    log_level: Literal["debug", "info", "warning", "error"] = _life("info", "least level logged")
    log_requests: bool = _life(False, "one line per request: sizes and times, never text")
    status_interval: Seconds = _life(10.0, "seconds between status lines while busy")
    quiet: bool = _life(False, "print nothing at start")

    @field_validator("quantization", mode="before")
    @classmethod
    def _none_is_none(cls, value: object) -> object:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _fits_together(self) -> ServerConfig:
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max-num-seqs is {self.max_num_seqs}, but a step of max-num-batched-tokens "
                f"{self.max_num_batched_tokens} cannot hold a token of each; lower the one or raise the other"
            )
        for name in ("api_key_file", "chat_template"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name.replace('_', '-')}: there is no file {str(path)!r}")
        if self.api_key_file is not None and not self.api_keys():
            raise ValueError(f"api-key-file: {str(self.api_key_file)!r} holds no key")
        if self.draft_store_file is not None and not self.draft_store_file.parent.is_dir():
            raise ValueError(f"draft-store-file: there is no folder {str(self.draft_store_file.parent)!r}")
        speculation_config(self).check()
        attention_config(self).check()
        check_models(self.model_names(), self.also(), self.kv_shares)
        return self

    def also(self) -> tuple[AlsoServed, ...]:
        """The models besides the first."""
        return tuple(read_also(entry) for entry in self.also_serve)

    def api_keys(self) -> tuple[str, ...]:
        keys = [*self.api_key]
        if self.api_key_file is not None:
            keys += [line.strip() for line in self.api_key_file.read_text().splitlines()]
        return tuple(key for key in keys if key)

    def model_names(self) -> tuple[str, ...]:
        """As the API knows the first model."""
        return self.served_model_name or (name_of(self.model),)

    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    def host_names(self) -> tuple[str, ...] | None:
        """Host headers that are served, None = any (S-83)."""
        default = LOOPBACK_HOSTS if self.is_loopback() else None
        return None if "*" in self.allowed_hosts else self.allowed_hosts or default

    def engine_config(self) -> EngineConfig:
        same = {field.name for field in fields(EngineConfig)} & ServerConfig.model_fields.keys() - {"speculation"}
        first = EngineConfig(
            **{name: getattr(self, name) for name in same},
            kv_cache_bytes=self.kv_cache_memory,
            max_graph_tokens=self.max_cudagraph_capture_size,
            page_size=self.block_size,
            max_batched_tokens=self.max_num_batched_tokens,
            max_seqs=self.max_num_seqs,
            num_threads=self.threads,
            max_queued_requests=self.max_num_queued_reqs,
            max_queued_tokens=self.max_num_queued_tokens,
            tbt_slo_s=None if self.tbt_slo_ms is None else self.tbt_slo_ms / 1000,
            queue_timeout_s=self.queue_timeout,
            grammar_timeout_s=self.grammar_timeout,
            step_timeout_s=self.step_timeout,
            delta_interval_s=self.delta_interval_ms / 1000,
            progress=not self.quiet,
            speculation=speculation_config(self),
            attention=attention_config(self),
        )
        return with_others(first, self.also(), self.kv_shares)

    def api_settings(self) -> ApiSettings:
        same = {field.name for field in fields(Limits)} & ServerConfig.model_fields.keys()
        limits = Limits(
            **{name: getattr(self, name) for name in same},
            max_body_bytes=self.max_body_size,
            max_header_bytes=self.max_header_size,
            max_depth=self.max_json_depth,
            max_items=self.max_json_items,
            max_grammar_bytes=self.max_grammar_size,
        )
        return ApiSettings(
            served_model_names=self.model_names(),
            api_keys=self.api_keys(),
            allowed_hosts=self.host_names(),
            max_body_memory=self.max_body_memory,
            metrics_need_key=self.metrics_need_key,
            chat_template=None if self.chat_template is None else self.chat_template.read_text(),
            version=VERSION,
            log_requests=self.log_requests,
            status_interval_s=self.status_interval,
            limits=limits,
            timeouts=Timeouts(
                body_s=self.body_timeout,
                request_s=self.request_timeout,
                write_s=self.write_timeout,
                keep_alive_s=self.keep_alive_timeout,
            ),
        )
