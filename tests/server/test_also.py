"""Further models of one server: how they are named, what of the first model's settings reaches them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.also import AlsoServed, read_also
from server.config import ServerConfig
from server.flags import ConfigError, parse, read_file, validate


def config_of(*arguments: str) -> ServerConfig:
    return parse(arguments)[0]


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("small=owner/name", AlsoServed("small", "owner/name")),
        ("owner/name", AlsoServed("owner/name", "owner/name")),
        ("b = /models/x=y", AlsoServed("b", "/models/x=y")),
    ],
)
def test_a_name_stands_before_the_first_equals_sign(entry: str, found: AlsoServed) -> None:
    assert read_also(entry) == found


def test_a_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert read_also(str(tmp_path / "mine")).name == "mine"


def test_the_others_have_the_first_models_settings_but_for_its_own_files_and_lengths() -> None:
    config = config_of(
        *("first", "--also-serve", "b=second", "--also-serve", "third", "--dtype", "float32", "--max-num-seqs", "7"),
        *("--max-model-len", "512", "--revision", "main", "--draft-model", "d", "--speculation", "on"),
        *("--random-weights", "hidden=64", "--denoise-block-size", "8", "--tbt-slo-ms", "50"),
        *("--kv-cache-dtype", "fp8", "--kv-cache-scales", "scales.json"),
    ).engine_config()
    assert [(model.name, model.model) for model in (config, *config.also)] == [
        ("", "first"),
        ("b", "second"),
        ("third", "third"),
    ]
    assert (config.max_model_len, config.revision, config.speculation.draft_model) == (512, "main", "d")
    for other in config.also:
        assert (other.dtype, other.max_seqs, other.tbt_slo_s, other.speculation.mode) == ("float32", 7, 0.05, "on")
        assert (other.max_model_len, other.revision, other.random_weights) == (None, None, None)
        assert (other.speculation.draft_model, other.denoise_block_size, other.also) == (None, None, ())
        assert (config.kv_cache_scales, other.kv_cache_scales) == ("scales.json", None)


def test_drafters_of_the_first_model_alone_leave_the_others_without() -> None:
    flags = ("--also-serve", "b=second", "--draft-model", "d", "--drafters")
    both = config_of(*flags, "suffix,draft_model").engine_config()
    assert both.also[0].speculation.drafters == ("suffix",)
    alone = config_of(*flags, "draft_model").engine_config()
    assert alone.also[0].speculation.mode == "off"
    assert alone.speculation.mode == "auto"


@pytest.mark.parametrize(
    ("shares", "parts", "of_the_rest"),
    [((), (333, 333, 333), (1 / 3, 1 / 2, 1.0)), (("--kv-shares", "2,1,1"), (500, 250, 250), (0.5, 0.5, 1.0))],
)
def test_memory_is_divided_by_shares(
    shares: tuple[str, ...], parts: tuple[int, ...], of_the_rest: tuple[float, ...]
) -> None:
    pair = ("--also-serve", "b", "--also-serve", "c", *shares)
    sized = config_of(*pair, "--kv-cache-memory", "1000").engine_config()
    assert tuple(model.kv_cache_bytes for model in (sized, *sized.also)) == parts
    free = config_of(*pair).engine_config()
    assert [model.kv_cache_bytes for model in (free, *free.also)] == [None] * 3
    assert tuple(model.kv_share for model in (free, *free.also)) == pytest.approx(of_the_rest)


def test_a_single_model_is_told_nothing_of_it() -> None:
    config = config_of("--kv-cache-memory", "1000").engine_config()
    assert (config.kv_cache_bytes, config.kv_share, config.also, config.name) == (1000, 1.0, (), "")


def test_a_file_lists_them(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text("also-serve: [b=second, third]\nkv-shares: [4, 1, 1]\n")
    config = validate(read_file(path))
    assert [other.name for other in config.also()] == ["b", "third"]
    assert config.kv_shares == (4, 1, 1)
    path.write_text("also-serve: b=second\nkv-shares: 4,1\n")
    assert validate(read_file(path)).kv_shares == (4, 1)
    path.write_text("also-serve: [b=second, b=third]\n")
    with pytest.raises(ConfigError, match="'b' is the name of two models"):
        validate(read_file(path))
