"""`python -m server.embedded.export`: writes a checkpoint as a Hugging Face folder (Qwen3ForCausalLM, bfloat16).

The parameters already have Hugging Face's names but for the `model.` before them; the head is tied and not written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from server.embedded import checkpoint
from server.embedded.model import BLOCK_SIZE, PRESETS, Shape, TinyModel
from server.embedded.pairs import make_tokenizer
from server.embedded.tokenizer import END_OF_TEXT, IM_END, MASK, PAD, token_id, write_tokenizer
from server.embedded.train import HERE, RETRIEVAL


def config_json(
    shape: Shape, tokenizer: Tokenizer, dtype: torch.dtype, bidirectional: bool = False, denoises: bool = True
) -> dict[str, object]:
    """`config.json`: Qwen3's fields, and `mask_token_id` and `block_size` for the diffusion mode.

    bidirectional  the model fills canvases and does nothing else
    denoises       it has a diffusion mode
    """
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position,
        "initializer_range": 0.02,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": [token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, IM_END)],
        "pad_token_id": token_id(tokenizer, PAD),
    }
    if denoises:
        config |= {"mask_token_id": token_id(tokenizer, MASK), "block_size": BLOCK_SIZE}
    return config | {"bidirectional": True} if bidirectional else config


def export_model(
    model: TinyModel,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    bidirectional: bool = False,
    denoises: bool = True,
) -> None:
    """Write weights, configuration and tokenizer. Raises ValueError if a weight is not finite."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has values that are not finite: the run diverged, do not publish it")
        tensors[f"model.{name}"] = value.detach().to("cpu", dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = config_json(model.shape, tokenizer, dtype, bidirectional, denoises)
    generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"], "do_sample": False}
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder, model.shape.max_position, has_chat=denoises)


def main(argv: list[str] | None = None) -> None:
    """Export the checkpoint in `--checkpoint` to `server/embedded/<preset without -quick>` or `--output`."""
    parser = argparse.ArgumentParser(prog="python -m server.embedded.export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--tokenizer", type=Path, default=HERE / "braid-tiny" / "tokenizer.json")
    args = parser.parse_args(argv)
    state = checkpoint.load_state(args.checkpoint)
    model = TinyModel(PRESETS[state.preset])
    checkpoint.load_weights(args.checkpoint, model)
    output = args.output or HERE / state.preset.removesuffix("-quick")
    if state.preset == RETRIEVAL:
        export_model(model, make_tokenizer(), output, denoises=False)
    else:
        bidirectional = state.preset == "braid-tiny-bidirectional"
        export_model(model, Tokenizer.from_file(str(args.tokenizer)), output, bidirectional=bidirectional)
    shutil.copy(args.checkpoint / checkpoint.STATE, output / "training.json")
    print(f"{output}: step {state.step}, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
