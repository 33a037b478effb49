"""From the name a person gives (`--model`) to a folder on this machine. Imports no torch: the front end uses it too."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = ("braid-tiny", "braid-tiny-draft", "braid-tiny-bidirectional", "braid-tiny-retrieval")

# Weights in one safe format, and what describes them; never Python files or pickles.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelNotFoundError(ValueError):
    """No folder, embedded model or hub repository answers to this name; the message says what was tried."""


def resolve_model(name_or_path: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The checkpoint folder of a local path, an embedded model's name, or a hub id (downloaded if need be).

    revision, download_dir  apply to hub ids: a branch, tag or commit; where to keep files instead of the hub's cache
    Honours the hub library's own environment (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN).
    Raises ModelNotFoundError.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return path
    if name_or_path in EMBEDDED:
        embedded = Path(__file__).resolve().parent.parent / "embedded" / name_or_path
        if not (embedded / "config.json").is_file():
            raise ModelNotFoundError(f"the embedded model {name_or_path} is missing from this tree ({embedded})")
        return embedded
    if name_or_path and path.exists():
        raise ModelNotFoundError(f"model {name_or_path!r} is a file; give the checkpoint's folder")
    if not _HUB_ID.fullmatch(name_or_path) or name_or_path.startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"model {name_or_path!r} is neither a folder here, nor an embedded model ({', '.join(EMBEDDED)}), "
            "nor a hub id like 'owner/name'"
        )
    return _download(name_or_path, revision, download_dir)


def _download(hub_id: str, revision: str | None, download_dir: str | None) -> Path:
    # Half a second of import that a local folder need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, cache_dir=download_dir, allow_patterns=_WANTED))
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"model {hub_id!r} is no folder here, not in the hub cache, and the hub cannot be reached: {error}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelNotFoundError(f"model {hub_id!r} cannot be fetched from the hub: {error}") from error
