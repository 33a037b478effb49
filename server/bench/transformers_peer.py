"""transformers' continuous batching on a model of the same shape, with random weights: the peer in `gpu_serving.py`.

It runs with the library's own choices (CUDA graphs, batch sizes, flash attention where installed) but for the size of
its cache. Its times are those that it records for each token itself.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch

from server.bench.gpu_loads import Load
from server.models.loading import parse_spec

_PAGE = 256
"""Its default. Its cache holds a quarter more than the loads need, for pages that are not full."""


class PeerError(Exception):
    """The peer did not do the load; the message says why."""


class TransformersPeer:
    """One model, its cache and its thread, which waits for requests until `close`.

    kv_tokens  keys that its cache holds at least: those of the largest load
    Raises ImportError without transformers, or whatever it raises for this shape.
    """

    def __init__(self, spec: str, dtype: torch.dtype, device: torch.device, kv_tokens: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.generation import ContinuousBatchingConfig, GenerationConfig

        fields = parse_spec(spec)
        fields.pop("on_device")
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        self._vocab_size = int(config.vocab_size)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        batching = ContinuousBatchingConfig(
            allow_block_sharing=False, page_size=_PAGE, num_blocks=5 * kv_tokens // (4 * _PAGE) + 2
        )  # fmt: skip
        self._open = ExitStack()
        self._manager = self._open.enter_context(
            model.continuous_batching_context_manager(
                generation_config=generation, continuous_batching_config=batching, timeout=5.0
            )
        )

    def close(self) -> None:
        """Ends its thread. Idempotent."""
        self._open.close()

    def decode_step_s(self, num_streams: int, prompt_len: int, num_steps: int) -> float:
        """Median seconds between two tokens of a stream once all streams decode."""
        # The first streams write while the last prompts are read; its steps take about 1,000 tokens and more.
        output_len = num_steps + 4 + -(-num_streams * prompt_len // 1024)
        outputs = self._generate(Load(((prompt_len, output_len),) * num_streams))
        all_started = max(times[0] for times in outputs)
        first_end = min(times[-1] for times in outputs)
        gaps = [
            later - earlier
            for times in outputs
            for earlier, later in pairwise(times)
            if earlier >= all_started and later <= first_end
        ]
        if not gaps:
            raise PeerError(f"never decoded all {num_streams} streams at once")
        return statistics.median(gaps)

    def run_s(self, load: Load) -> float:
        """Seconds from the arrival of all streams to the last token."""
        outputs = self._generate(load)
        return max(times[-1] for times in outputs) - self._arrived_at

    def _generate(self, load: Load) -> list[list[float]]:
        """When each stream's tokens came."""
        prompts = load.prompts(self._vocab_size)
        self._arrived_at = time.perf_counter()  # the clock of its own times
        ids = {
            self._manager.add_request(prompt, max_new_tokens=output_len, record_timestamps=True): output_len
            for prompt, (_, output_len) in zip(prompts, load.streams, strict=True)
        }
        return _collect(self._manager, ids)


def _collect(manager: Any, ids: dict[str, int]) -> list[list[float]]:
    found: list[list[float]] = []
    missing = dict(ids)
    while missing:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise PeerError("its generation thread ended")
            continue
        if not result.is_finished():
            continue
        if result.error is not None:
            raise PeerError(f"failed: {result.error}")
        wanted = missing.pop(result.request_id)
        times = list(result.timestamps or ())
        if len(times) != wanted:
            raise PeerError(f"gave {len(times)} token times instead of {wanted}")
        found.append(times)
    return found
