"""The committed models: tokenizer, configuration and weights fit each other and the limits of the repository."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from server.embedded.evaluate import Vocabulary, decode_autoregressive, load_folder
from server.embedded.tasks import chat_prompt
from server.embedded.tokenizer import SPECIAL_TOKENS
from server.embedded.train import HERE

FOLDERS = [HERE / "braid-tiny", HERE / "braid-tiny-draft"]
MAX_WEIGHT_BYTES = 24 << 20


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_weights_are_finite_bfloat16_and_small_enough_for_the_repository(folder: Path) -> None:
    path = folder / "model.safetensors"
    assert path.stat().st_size <= MAX_WEIGHT_BYTES
    for name, tensor in load_file(path).items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_configuration_names_the_tokens_of_the_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["eos_token_id"] == [0, 2]
    assert (config["mask_token_id"], config["pad_token_id"], config["block_size"]) == (3, 4, 8)
    assert config["model_type"] == "qwen3"


def test_both_models_have_one_tokenizer() -> None:
    first, second = ((folder / "tokenizer.json").read_bytes() for folder in FOLDERS)
    assert first == second


@pytest.mark.parametrize(
    "text",
    [
        "def fibonacci(n):\n    return n\n",
        "sort: 7 3 9 ->",
        "  two  spaces \t\r\n",
        "Grüße, 世界 🙂 e\u0301",
        "\x00\x7f",
        "",
    ],
)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDERS[0] / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_tokens_of_their_own() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDERS[0] / "tokenizer.json"))
    tokens = tokenizer.encode("12 + 345 = 357").tokens
    assert tokens == ["1", "2", "Ġ+", "Ġ3", "4", "5", "Ġ=", "Ġ3", "5", "7"]


def test_the_chat_template_makes_the_prompts_of_the_training_data() -> None:
    config = json.loads((FOLDERS[0] / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Environment(autoescape=False, keep_trailing_newline=True).from_string(config["chat_template"])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages=messages, add_generation_prompt=True) == chat_prompt("Hi", "Be brief.")


@pytest.mark.parametrize(
    ("prompt", "answer"), [("copy: 7 3 9 ->", " 7 3 9\n"), ("def add(a, b):", "\n    return a + b\n")]
)
def test_the_model_has_learned_its_first_examples(prompt: str, answer: str) -> None:
    model = load_folder(FOLDERS[0])
    tokenizer = Tokenizer.from_file(str(FOLDERS[0] / "tokenizer.json"))
    with torch.inference_mode():
        (ids,), _ = decode_autoregressive(model, [tokenizer.encode(prompt).ids], Vocabulary.of(tokenizer))
    assert tokenizer.decode(ids) == answer
