"""ServerConfig: what is accepted, how it is refused, and that each part is handed what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from server.config import ServerConfig, parse_count
from server.flags import ConfigError, dump, parse, read_file, table, validate

ROOT = Path(__file__).resolve().parents[2]


def config_of(*arguments: str) -> ServerConfig:
    return parse(arguments)[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("32k", 32_000), ("1M", 10**6), ("2GiB", 2 << 30), ("64Ki", 65_536), ("7", 7), ("1.5g", 1500000000)],
)
def test_counts_take_suffixes(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "1"], "unknown flag --prot; did you mean --port?"),
        (["--max-modle-len=5"], "unknown flag --max-modle-len; did you mean --max-model-len?"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--port", "99999"], "--port is '99999': input should be less than or equal to 65535"),
        (["--port", "http"], "--port is 'http'"),
        (["--port"], "--port: expected one argument"),
        (["--dtype", "fp8"], "--dtype is 'fp8': input should be 'auto', 'bfloat16', 'float16' or 'float32'"),
        (["--max-model-len", "much"], "--max-model-len is 'much': expected a whole number"),
        (["--max-num-seqs", "0"], "--max-num-seqs is '0'"),
        (["--max-num-seqs", "2000"], "max-num-seqs is 2000"),
        (["--tbt-slo-ms", "-1"], "--tbt-slo-ms is '-1'"),
        (["--step-timeout", "nan"], "--step-timeout is 'nan'"),
        (["--api-key-file", "/nowhere"], "api-key-file: there is no file '/nowhere'"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: "),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert message in str(caught.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--port", "x", "--dtype", "y"])
    assert len(str(caught.value).splitlines()) == 2


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: some/model\nport: 9000\nmax_model_len: 4k\napi-key: [a, b]\nenable-prefix-caching: false\n")
    config = config_of("--config", str(file), "--port", "9001")
    assert (config.model, config.port, config.max_model_len) == ("some/model", 9001, 4000)
    assert config.api_keys() == ("a", "b")
    assert not config.enable_prefix_caching
    assert config_of("other", "--config", str(file)).model == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown setting 'prot'; did you mean port?"),
        ("- a", "expected settings as `name: value`, found a list"),
        ("a: [", "while parsing"),
        ("max-n: 1\nmax_n: 2", "'max_n' is given twice"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_what_is_printed_can_be_read_again(tmp_path: Path) -> None:
    config = config_of("--max-model-len", "2k", "--tbt-slo-ms", "50", "--served-model-name", "a", "--no-quiet")
    file = tmp_path / "c.yaml"
    file.write_text(dump(config))
    assert config_of("--config", str(file)) == config


def test_printing_hides_keys() -> None:
    assert "secret" not in dump(config_of("--api-key", "secret"))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_files_in_the_tree_are_valid(file: Path) -> None:
    assert config_of("--config", str(file)).model


def test_settings_reach_the_parts_they_are_for(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    config = validate(
        {
            "max_num_seqs": 5,
            "tbt_slo_ms": 40,
            "block_size": 32,
            "max_n": 3,
            "request_timeout": 7,
            "api_key_file": keys,
            "kv_cache_memory": "1MiB",
        }
    )
    engine, api = config.engine_config(), config.api_settings()
    assert (engine.max_seqs, engine.tbt_slo_s, engine.page_size, engine.kv_cache_bytes) == (5, 0.04, 32, 1 << 20)
    assert (api.limits.max_n, api.timeouts.request_s, api.api_keys) == (3, 7.0, ("one", "two"))


def test_host_names_are_checked_on_loopback_only_unless_told() -> None:
    assert "localhost" in (config_of().host_names() or ())
    assert config_of("--host", "0.0.0.0").host_names() is None
    assert config_of("--allowed-hosts", "*").host_names() is None
    assert config_of("--allowed-hosts", "a.example").host_names() == ("a.example",)


def test_a_folder_is_served_under_its_last_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert config_of(str(folder)).model_names() == ("my-model",)


def test_every_setting_is_in_the_readme_as_it_is_declared() -> None:
    readme = (ROOT / "server" / "README.md").read_text()
    for line in table().splitlines():
        assert line in readme, f"server/README.md lacks {line!r}"
    assert all(field.description for field in ServerConfig.model_fields.values())


def test_the_configuration_file_of_make_serve_names_the_embedded_model() -> None:
    assert yaml.safe_load((ROOT / "configs" / "embedded.yaml").read_text())["model"] == "braid-tiny"
