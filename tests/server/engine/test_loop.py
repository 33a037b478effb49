"""From the engine's settings to what worker and scheduler are told of speculation."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.types import SpeculationSettings
from server.config import ServerConfig
from server.engine.config import DRAFTERS, EngineConfig, SpeculationConfig
from server.engine.loop import speculation_settings, speculator_config, worker_config
from server.worker.drafters.build import DRAFTERS as BUILDERS
from server.worker.drafters.config import DEFAULT_DRAFTERS, SpeculatorConfig

SYNTHETIC = "synthetic"


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
