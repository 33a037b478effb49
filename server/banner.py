"""What a person sees at start: a dozen lines with every number that decides what the server can hold."""

from __future__ import annotations

import json

from server.config import VERSION, ServerConfig
from server.engine.config import EngineInfo
from server.engine.decoding import DIFFUSION_SUFFIX


def banner(config: ServerConfig, facts: EngineInfo, port: int, phases: tuple[tuple[str, float], ...]) -> str:
    """The start-up report. `phases` are of the whole program, in order: (name, seconds)."""
    name = config.model_names()[0]
    host = config.host if config.host not in ("0.0.0.0", "::") else "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    slo = "auto" if facts.tbt_slo_s is None else f"{facts.tbt_slo_s * 1000:g} ms"
    output = config.max_output_tokens
    room = facts.kv_tokens / facts.model_len
    weights = "random weights" if config.random_weights else name
    lines = [
        f"Braid {VERSION}",
        f"model     {weights}: {_count(facts.num_parameters)} parameters, {facts.dtype}, {facts.device} ({facts.ops})",
        f"memory    weights {_bytes(facts.weight_bytes)}, KV {_bytes(facts.kv_bytes)} = {facts.num_pages} pages of "
        f"{facts.page_size} tokens: room for {room:.1f} sequences of {facts.model_len} tokens",
        *_device(facts),
        *(line for other in facts.also for line in _also(other)),
        f"limits    {facts.max_seqs} sequences at once, {facts.max_queued_requests} queued; "
        f"{facts.max_batched_tokens} tokens a step, time between tokens {slo}; "
        f"output {'as the context leaves' if output is None else output}",
        f"drafts    {_drafts(config, facts)}",
        *_attention(facts),
        *_prompt_attention(facts),
        *_denoising(name, facts),
        "start     " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in phases),
        f"API       {url}/v1      metrics {url}/metrics      health {url}/health",
    ]
    if config.quantization:
        lines.insert(
            2, f"          {config.quantization} weights: lossy, the text differs from the unquantised model's"
        )
    if config.kv_cache_dtype in ("fp8", "int8"):
        lines.insert(2, f"          {config.kv_cache_dtype} KV cache: lossy, the text differs from the one without")
    if not config.is_loopback() and not config.api_keys():
        lines.append(f"warning   anyone who reaches {config.host}:{port} may use this server: no --api-key is set")
    body = json.dumps({"model": name, "prompt": "def fibonacci(n):", "max_tokens": 64, "temperature": 0})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_keys() else ""
    lines += ["try", f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'"]
    return "\n".join(lines)


def _device(facts: EngineInfo) -> list[str]:
    """What holds a GPU's memory besides."""
    rest = [(what, size) for what, size in facts.memory if what not in ("weights", "KV pages")]
    return ["          " + ", ".join(f"{what} {_bytes(size)}" for what, size in rest)] if rest else []


def _also(facts: EngineInfo) -> tuple[str, str]:
    """A further model: what differs from the first."""
    return (
        f"model     {facts.name}: {_count(facts.num_parameters)} parameters, {facts.dtype}",
        f"memory    weights {_bytes(facts.weight_bytes)}, KV {_bytes(facts.kv_bytes)} = {facts.num_pages} pages of "
        f"{facts.page_size} tokens: room for {facts.kv_tokens / facts.model_len:.1f} sequences of {facts.model_len}",
    )


def _drafts(config: ServerConfig, facts: EngineInfo) -> str:
    """Who drafts, and how many; what makes the speed of a test server unreal is said."""
    if not facts.drafters:
        return "none: speculation is off"
    text = f"{', '.join(name for name, _ in facts.drafters)}: up to {facts.max_drafts} tokens a step, "
    text += f"policy {config.speculation_policy}, requests {config.speculation}"
    if facts.synthetic_acceptance is not None:
        share = f"{facts.synthetic_acceptance:g} of the drafts of repeated requests are right"
        text += f"; SYNTHETIC: {share}, so speeds are those of a test"
    return text


def _attention(facts: EngineInfo) -> list[str]:
    """The sparse methods that requests may choose, and what those get that do not."""
    if not facts.attention:
        return []
    methods = ", ".join(f"{offer.method} (from {offer.least_budget} keys)" for offer in facts.attention)
    default = facts.default_attention
    unasked = "dense" if default is None else f"{default.method}, {default.budget} keys: lossy, the text differs"
    if default is not None and default.correct_every:
        unasked += f", corrected every {default.correct_every} tokens"
    return [f"attention {methods}; unless asked: {unasked}"]


def _prompt_attention(facts: EngineInfo) -> list[str]:
    """The same for prompts."""
    if not facts.prompt_attention:
        return []
    default, offers = facts.default_prompt_attention, facts.prompt_attention
    unasked = "dense" if default is None else f"{default.method}, {default.threshold:g} kept: lossy, the text differs"
    methods = ", ".join(offer.method for offer in offers)
    return [f"prompts   {methods}, from token {offers[0].dense} on; unless asked: {unasked}"]


def _denoising(name: str, facts: EngineInfo) -> list[str]:
    """How the model denoises, if it can, and under which name."""
    model = facts.diffusion
    if model is None:
        return []
    kind = model.topology.replace("_", "-")
    text = f"decoding  {kind} diffusion, blocks of {model.block_size} tokens, policy {model.policy}"
    return [f"{text}: ask for {name}{DIFFUSION_SUFFIX}" if model.is_dual else text]


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
