"""`draft_model`: a second, smaller model with the target's vocabulary drafts for it.

Its KV is a pool of its own under the target's page ids, so that a page costs both and the scheduler knows one number.
A page shared by a prefix hit is written by every sequence that drafts on it, always with the same values: the keys of a
token depend on the tokens before it alone, and those are what the page is shared by.
Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (2023).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.ops import Ops
from server.models.loading import load_model
from server.models.locate import resolve_model
from server.models.registry import Model, read_config
from server.worker.drafters.acceptance_head import load_head
from server.worker.drafters.draft_kv import DraftKV
from server.worker.drafters.paged_forward import PagedForward
from server.worker.drafters.sequential import SequentialDrafter
from server.worker.drafters.stopping import AcceptanceEstimate, stop_rule
from server.worker.kv_pool import KVPool
from server.worker.sequences import SequenceTable

CATCH_UP_TOKENS = 256
"""Most tokens of backlog fed in one step, over all sequences: about a prompt's chunk, so that no step stalls."""


@dataclass(frozen=True)
class DraftModel:
    """A loaded draft model and the folder it came from; `build_draft_model` makes it a drafter."""

    model: Model
    folder: Path
    max_len: int

    def page_bytes(self, ops: Ops, page_size: int, dtype: torch.dtype, device: torch.device) -> int:
        """What its KV adds to every page of the pool, the back end's padding included: small heads are padded."""
        return KVPool(ops, self.model.config, 4, page_size, dtype, device).num_bytes // 4


def load_draft_model(
    name: str,
    target_folder: Path | None,
    target_vocab_size: int,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None,
    progress: bool,
    revision: str | None = None,
    download_dir: str | None = None,
) -> DraftModel:
    """Load the draft model `name` for a target with this tokenizer folder (None = it has none) and vocabulary.

    max_model_len  longest sequence served; beyond the draft's own positions it offers nothing
    Raises ValueError with a sentence if the vocabularies differ, OSError if a file cannot be read.
    """
    folder = resolve_model(name, revision, download_dir)
    check_vocabulary(name, folder, target_folder, read_config(folder).vocab_size, target_vocab_size)
    longest = read_config(folder).max_position
    max_len = min(longest, max_model_len or longest)
    return DraftModel(load_model(folder, ops, dtype, device, progress, max_len), folder, max_len)


def check_vocabulary(
    name: str, folder: Path, target_folder: Path | None, vocab_size: int, target_vocab_size: int
) -> None:
    """Refuse a draft model whose ids do not mean what the target's mean. Padding of the embedding may differ.

    Raises ValueError.
    """
    if target_folder is None or not (target_folder / "tokenizer.json").exists():
        if vocab_size != target_vocab_size:
            raise ValueError(
                f"draft model {name} has {vocab_size} tokens, but the model it drafts for has {target_vocab_size}, and "
                "without a tokenizer.json of that model nothing shows that the ids agree; use a draft of its family"
            )
        return
    if not (folder / "tokenizer.json").exists():
        raise ValueError(
            f"draft model {name} has no tokenizer.json, so nothing shows that its tokens mean what the target's mean"
        )
    if _digest(folder) == _digest(target_folder):
        return
    difference = _difference(_vocabulary(folder), _vocabulary(target_folder))
    if difference is not None:
        raise ValueError(
            f"draft model {name} has another vocabulary than the model it drafts for: {difference}; "
            "a draft model must share the tokenizer"
        )


def _digest(folder: Path) -> bytes:
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).digest()


def _vocabulary(folder: Path) -> dict[str, int]:
    """Every token of a tokenizer.json and its id, added tokens included."""
    path = folder / "tokenizer.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocab = raw["model"]["vocab"]
        # Unigram models list [token, score] pairs, all others map tokens to ids.
        found = {entry[0]: i for i, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        return found | {added["content"]: added["id"] for added in raw.get("added_tokens", ())}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer with a vocabulary: {error!r}") from None


def _difference(draft: dict[str, int], target: dict[str, int]) -> str | None:
    """The first token, by id, that the two do not agree on."""
    if draft == target:
        return None
    token, _ = min(draft.items() ^ target.items(), key=lambda item: item[1])
    return f"{token!r} is id {draft.get(token, 'none')} there and {target.get(token, 'none')} here"


def build_draft_model(
    draft: DraftModel,
    pool: KVPool,
    sequences: SequenceTable,
    ops: Ops,
    vocab_size: int,
    max_drafts: int,
    stop: str,
) -> SequentialDrafter:
    """The drafter, with a KV pool of as many pages as the target's `pool` has.

    Raises ValueError for an unknown stop rule, or acc_head without a head in the draft's folder.
    """
    dtype, device = pool.dtype, pool.device
    head: AcceptanceEstimate | None = None
    if stop == "acc_head":
        head = load_head(draft.folder, draft.model.config.hidden_size, device)
    rule = stop_rule(stop, head)
    own_pool = KVPool(ops, draft.model.config, pool.num_pages, pool.page_size, dtype, device)
    return SequentialDrafter(
        name="draft_model",
        forward=PagedForward(draft.model, own_pool.layers, sequences, vocab_size, device),
        reach=DraftKV(CATCH_UP_TOKENS, near=max_drafts + 2),
        stop=rule,
        ops=ops,
        max_len=draft.max_len,
        vocab_size=vocab_size,
        num_bytes=draft.model.num_weight_bytes + own_pool.num_bytes,
    )
