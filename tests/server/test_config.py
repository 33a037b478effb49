"""ServerConfig: what is accepted, how it is refused, and that each part is handed what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scheduler.types import AttentionMethod, PromptAttention, PromptMethod
from server.config import ServerConfig
from server.engine.config import AttentionConfig, SpeculationConfig
from server.engine.loop import worker_config
from server.flags import ConfigError, dump, parse, read_file, table, validate
from server.values import parse_count

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
        (["--drafters", "suffix,eagle"], "drafters names 'eagle'; there are prediction,"),
        (["--drafters", "suffix,suffix"], "--drafters is 'suffix,suffix': a name is given twice"),
        (["--drafters", "suffix,draft_model"], "drafters has draft_model: set draft-model"),
        (["--drafters", "suffix", "--draft-model", "m"], "draft-model is set, but drafters leaves draft_model out"),
        (["--speculation", "fast"], "--speculation is 'fast': input should be 'auto', 'on' or 'off'"),
        (["--num-speculative-tokens", "64"], "--num-speculative-tokens is 64"),
        (["--speculation-policy", "table"], "speculation-policy table and speculation-table 1:8,4:4 need each other"),
        (["--speculation-table", "1:8"], "speculation-policy table and speculation-table 1:8,4:4 need each other"),
        (["--speculation-policy", "table", "--speculation-table", "1:9"], "speculation-table has 1:9"),
        (["--speculation-table", "4:1,1:4"], "--speculation-table is '4:1,1:4': the numbers of sequences must ascend"),
        (["--speculation-table", "4"], "--speculation-table is '4': expected pairs such as 1:8,4:4"),
        (["--layer-subset", "half"], "layer-subset is 'half': expected uniform:0.5"),
        (["--draft-store-file", "/nowhere/store"], "draft-store-file: there is no folder '/nowhere'"),
        (["--synthetic-acceptance", "1.5"], "--synthetic-acceptance is '1.5'"),
        (["--default-decoding", "fast"], "--default-decoding is 'fast': there are auto, sequential"),
        (["--default-decoding", "autoregressive"], "--default-decoding is 'autoregressive': there are auto,"),
        (["--denoise-block-size", "0"], "--denoise-block-size is 0: input should be greater than 0"),
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
    config = config_of(
        *("--max-model-len", "2k", "--tbt-slo-ms", "50", "--served-model-name", "a", "--no-quiet"),
        *("--speculation", "off", "--drafters", "suffix,history", "--speculation-policy", "table"),
        *("--speculation-table", "1:8,4:2", "--draft-store-memory", "1MiB"),
    )
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


def test_speculation_reaches_the_engine_as_plain_data(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("speculation: on\ndrafters: [prediction, draft_model]\nspeculation-table: 1:5,4:2\n")
    config = config_of(
        *("--config", str(file), "--num-speculative-tokens", "5", "--speculation-policy", "table", "--draft-tree"),
        *("--draft-model", "braid-tiny-draft", "--draft-stop", "fixed", "--draft-store-memory", "1MiB"),
        *("--draft-store-file", str(tmp_path / "store")),
    )
    assert config.engine_config().speculation == SpeculationConfig(
        mode="on",
        drafters=("prediction", "draft_model"),
        max_drafts=5,
        policy="table",
        table=((1, 5), (4, 2)),
        draft_model="braid-tiny-draft",
        draft_stop="fixed",
        draft_tree=True,
        store_bytes=1 << 20,
        store_file=str(tmp_path / "store"),
    )
    file.write_text("speculation: off\n")
    assert config_of("--config", str(file)).engine_config().speculation == SpeculationConfig(mode="off")
    assert config_of().engine_config().speculation == SpeculationConfig()


@pytest.mark.parametrize("method", ["double_sparsity", "double_sparsity_pages"])
def test_labels_of_4_bits_reach_the_worker_and_need_labels(method: str, tmp_path: Path) -> None:
    flags = ("--attention-label-dtype", "int4", "--attention-calibration", str(tmp_path / "c.safetensors"))
    engine = config_of("--sparse-attention", f"{method},quest", *flags).engine_config()
    assert engine.attention.without_files() == AttentionConfig(methods=("quest",))
    worker = worker_config(engine).attention
    assert worker is not None
    assert worker.label_dtype == "int4"
    with pytest.raises(ConfigError, match=f"{method} needs the model's label channels"):
        config_of("--sparse-attention", method)
    with pytest.raises(
        ConfigError, match="attention-label-dtype is int4, but only double_sparsity and double_sparsity_pages"
    ):
        config_of("--sparse-attention", "quest", "--attention-label-dtype", "int4")


def test_offloading_reaches_the_worker_with_its_limit_and_needs_double_sparsity_alone(tmp_path: Path) -> None:
    labels = ("--attention-calibration", str(tmp_path / "c.safetensors"), "--kv-offload")
    engine = config_of("--sparse-attention", "double_sparsity", *labels, "--kv-offload-memory", "3GiB").engine_config()
    worker = worker_config(engine)
    assert worker.attention is not None
    assert (worker.attention.offload, worker.attention.offload_bytes) == (True, 3 << 30)
    assert worker.speculation is not None
    assert "sparse_attention" not in worker.speculation.drafters, "its passes need the keys of all layers"
    assert not engine.attention.without_files().offload
    of_pages = ("--sparse-attention", "double_sparsity_pages", *labels)
    for methods in (("--sparse-attention", "double_sparsity,quest", *labels), of_pages, ("--kv-offload",)):
        with pytest.raises(ConfigError, match="kv-offload fetches keys for double_sparsity: name it alone"):
            config_of(*methods)
    with pytest.raises(ConfigError, match="block-sparse prompts choose among keys that are here"):
        config_of("--sparse-attention", "double_sparsity,xattention", *labels)
    with pytest.raises(ConfigError, match="kv-offload-memory is set, but kv-offload is not"):
        config_of("--kv-offload-memory", "1GiB")


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


def test_methods_for_prompts_stand_in_the_same_list_and_have_their_own_default() -> None:
    found = config_of("--sparse-attention", "quest,xattention", "--attention-prefill-threshold", "0.7")
    asked = found.engine_config().attention
    assert asked.allowed() == (AttentionMethod.QUEST,)
    assert asked.for_prompts() == (PromptAttention(PromptMethod.XATTENTION, 0.7, 4096),)
    assert asked.default_for_prompts() is None
    default = config_of("--attention-prefill", "pbs").engine_config().attention
    assert default.allowed() == ()
    assert default.for_prompts() == (default.default_for_prompts(),) == (PromptAttention(PromptMethod.PBS),)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ("--sparse-attention", "lsh"),
            "there are quest, double_sparsity, tidal, double_sparsity_pages, xattention, pbs",
        ),
        (("--attention-prefill", "pbs", "--attention-prefill-from", "640"), "must be a multiple of 512"),
    ],
)
def test_methods_for_prompts_that_cannot_be_are_refused(flags: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of(*flags)
