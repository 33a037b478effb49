"""From the engine's settings to what worker and scheduler are told of speculation and diffusion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scheduler.types import DiffusionModel, SpeculationSettings, Topology
from server.config import ServerConfig
from server.engine.config import DRAFTERS, EngineConfig, SpeculationConfig
from server.engine.loop import diffusion_model, speculation_settings, speculator_config, worker_config
from server.flags import parse
from server.models.registry import parse_config
from server.worker.drafters.build import DRAFTERS as BUILDERS
from server.worker.drafters.config import DEFAULT_DRAFTERS, SpeculatorConfig
from server.worker.info import diffusion_model as block_of_model
from tests.tiny import tiny_config

SYNTHETIC = "synthetic"
CHECKPOINT = parse_config(tiny_config())


def test_the_names_that_can_be_asked_for_are_those_that_can_be_built() -> None:
    assert set(DRAFTERS) | {SYNTHETIC} == set(BUILDERS)
    assert ",".join(DEFAULT_DRAFTERS) in (ServerConfig.model_fields["drafters"].description or "")


@pytest.mark.parametrize(
    ("asked", "drafters"),
    [
        ({}, DEFAULT_DRAFTERS),
        ({"draft_model": "m"}, (*DEFAULT_DRAFTERS, "draft_model")),
        ({"layer_subset": "exit"}, (*DEFAULT_DRAFTERS, "layer_subset")),
        ({"drafters": ("history",)}, ("history",)),
        ({"drafters": ("history",), "synthetic_acceptance": 0.5}, (SYNTHETIC,)),
    ],
)
def test_drafters_are_the_default_ones_and_those_that_have_a_setting(
    asked: dict[str, Any], drafters: tuple[str, ...]
) -> None:
    config = speculator_config(SpeculationConfig(**asked))
    assert config is not None
    assert config.drafters == drafters


def test_off_builds_nothing_and_plans_nothing() -> None:
    assert worker_config(EngineConfig(speculation=SpeculationConfig(mode="off"))).speculation is None
    assert speculation_settings(SpeculationConfig(mode="off"), ()) is None


def test_every_setting_arrives() -> None:
    asked = SpeculationConfig(
        drafters=("draft_model", "suffix"),
        max_drafts=5,
        policy="table",
        table=((2, 5),),
        draft_model="m",
        draft_stop="fixed",
        draft_tree=True,
        layer_subset=None,
        store_bytes=7,
        store_file="f",
    )
    wanted = SpeculatorConfig(("draft_model", "suffix"), 5, "m", "fixed", True, None, 7, "f")
    assert worker_config(EngineConfig(speculation=asked)).speculation == wanted
    settings = speculation_settings(asked, (("draft_model", True), ("suffix", False)))
    assert settings == SpeculationSettings("table", 5, ((2, 5),), has_sequential=True)


def test_masks_are_asked_where_their_drafter_is_loaded() -> None:
    model = DiffusionModel(mask_id=1, block_size=4, is_dual=True)
    settings = speculation_settings(SpeculationConfig(), (("suffix", False), ("diffusion", False)), model)
    assert settings == SpeculationSettings(mask_drafter="diffusion", mask_block=4)
    assert speculation_settings(SpeculationConfig(), (("suffix", False),), model) == SpeculationSettings()
    for asked, has_masks in (({}, True), ({"drafters": ("suffix",)}, False), ({"synthetic_acceptance": 0.5}, False)):
        config = speculator_config(SpeculationConfig(**asked))
        assert config is not None
        assert config.with_masks is has_masks


def test_how_a_gpus_memory_is_used_arrives_from_the_command_line() -> None:
    flags = ["--gpu-memory-utilization", "0.5", "--enforce-eager", "--max-cudagraph-capture-size", "64"]
    flags += ["--async-scheduling", "off"]
    worker = worker_config(parse([*flags, "--kv-cache-memory", "2GiB"])[0].engine_config())
    assert (worker.gpu_memory_utilization, worker.enforce_eager, worker.max_graph_tokens) == (0.5, True, 64)
    assert worker.kv_cache_bytes == 2 << 30
    assert not worker.plans_ahead("cuda")
    plain = worker_config(parse([])[0].engine_config())
    assert (plain.gpu_memory_utilization, plain.enforce_eager, plain.max_graph_tokens) == (0.9, False, None)
    assert (plain.plans_ahead("cuda"), plain.plans_ahead("cpu")) == (True, False)


def test_the_default_policy_is_the_configured_one_where_the_model_can_have_it() -> None:
    model = DiffusionModel(5, 8)
    assert diffusion_model(EngineConfig(), model) == model
    assert diffusion_model(EngineConfig(), None) is None
    found = diffusion_model(EngineConfig(default_decoding="sdar_static"), model)
    assert found == replace(model, policy="sdar_static")
    with pytest.raises(ValueError, match="default-decoding: policy is dual, which is for bidirectional models"):
        diffusion_model(EngineConfig(default_decoding="dual"), model)
    with pytest.raises(ValueError, match="default-decoding: selector is learn2pd, which needs a filter"):
        diffusion_model(EngineConfig(default_decoding="learn2pd"), model)
    with pytest.raises(ValueError, match=r"default-decoding is auto, but some/model cannot denoise"):
        diffusion_model(EngineConfig(model="some/model", default_decoding="auto"), None)
    assert ServerConfig(default_decoding="dual", denoise_block_size=4).engine_config() == replace(
        ServerConfig().engine_config(), default_decoding="dual", denoise_block_size=4
    )
    assert worker_config(EngineConfig(denoise_block_size=4)).denoise_block_size == 4


def test_a_block_size_is_taken_where_the_checkpoint_leaves_it_open() -> None:
    def found(asked: int | None, **fields: Any) -> tuple[int, Topology] | None:
        model = block_of_model(replace(CHECKPOINT, **fields), asked)
        return None if model is None else (model.block_size, model.topology)

    causal, whole = Topology.BLOCK_CAUSAL, Topology.BIDIRECTIONAL
    assert found(None) is None
    assert found(None, mask_token_id=5) is None
    assert found(16, mask_token_id=5) == (16, causal)
    assert found(8, mask_token_id=5, block_size=8) == found(None, mask_token_id=5, block_size=8) == (8, causal)
    fields: dict[str, Any] = {"mask_token_id": 5, "block_size": 8, "block_size_is_default": True}
    assert found(16, **fields, bidirectional=True) == (16, whole)
    assert found(None, mask_token_id=5, block_size=8, bidirectional=True) == (8, whole)
    with pytest.raises(ValueError, match="trained on blocks of 8 tokens"):
        found(16, mask_token_id=5, block_size=8)
    with pytest.raises(ValueError, match="has no mask token and cannot denoise"):
        found(16)
