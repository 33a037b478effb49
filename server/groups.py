"""Settings of `ServerConfig` that go to the engine together, by their names there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.engine.config import AttentionConfig, SpeculationConfig

if TYPE_CHECKING:
    from server.config import ServerConfig


def speculation_config(config: ServerConfig) -> SpeculationConfig:
    return SpeculationConfig(
        mode=config.speculation,
        drafters=config.drafters,
        max_drafts=config.num_speculative_tokens,
        policy=config.speculation_policy,
        table=config.speculation_table,
        draft_model=config.draft_model,
        draft_stop=config.draft_stop,
        draft_tree=config.draft_tree,
        layer_subset=config.layer_subset,
        store_bytes=config.draft_store_memory,
        store_file=None if config.draft_store_file is None else str(config.draft_store_file),
        synthetic_acceptance=config.synthetic_acceptance,
    )


def attention_config(config: ServerConfig) -> AttentionConfig:
    return AttentionConfig(
        methods=config.sparse_attention or (),
        default=config.attention_method,
        budget=config.attention_budget,
        correct_every=config.attention_correct_every,
        prefill=config.attention_prefill,
        prefill_threshold=config.attention_prefill_threshold,
        prefill_from=config.attention_prefill_from,
        calibration=config.attention_calibration,
        num_channels=config.attention_channels,
        label_dtype=config.attention_label_dtype,
        offload=config.kv_offload,
        offload_bytes=config.kv_offload_memory,
    )
