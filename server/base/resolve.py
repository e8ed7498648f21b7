"""From what a person names (`--base`) to a base model on disk: a local directory, a hub id, or the embedded default.

Imports neither torch nor transformers; huggingface_hub only when a hub id is asked for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.files import expand_user
from server.base.cache import cache_root
from server.base.checkpoint import checkpoint_digest, read_spec, weight_files
from server.base.embedded import EMBEDDED_NAME, prepare_embedded
from server.base.spec import ModelSpec
from server.errors import BaseModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "LICENSE*"]
HUB_COPIES = ["consolidated*"]  # Mistral's: all weights once more, under other names


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model, found: `name` is for people, `digest` ("sha256:…") is what it is, `path` is its directory."""

    name: str
    path: Path
    digest: str
    spec: ModelSpec


def _silent(message: str) -> None:
    """The default of `progress`: say nothing."""


def resolve_base(base: str | None, progress: Callable[[str], None] = _silent) -> BaseModel:
    """Find `base` (a directory, a hub id, or None for the embedded default), check and hash it.

    `progress` hears one line before each step that may take long. Raises BaseModelError, or
    UnsupportedModel, with a message that names the directory, id, file or setting at fault.
    """
    name, directory = locate_base(base, progress)
    spec = read_spec(directory)
    files = weight_files(directory)
    digest = checkpoint_digest(spec, files, cache_root(), progress)
    return BaseModel(name=name, path=directory, digest=digest, spec=spec)


def locate_base(base: str | None, progress: Callable[[str], None] = _silent) -> tuple[str, Path]:
    """Name and directory of `base`, without a look into it. Raises BaseModelError."""
    if base is None:
        return EMBEDDED_NAME, prepare_embedded(cache_root(), progress)
    path = expand_user(base)
    if path.is_dir():
        return path.resolve().name, path.resolve()
    if path.exists():
        raise BaseModelError(f"{base}: is a file; --base takes a model directory or a hub id")
    if not HUB_ID.fullmatch(base) or ".." in base:
        raise BaseModelError(f"{base}: no such directory, and not a hub id (owner/name)")
    return base, _from_hub(base, progress)


def _from_hub(repo_id: str, progress: Callable[[str], None]) -> Path:
    """The snapshot of a hub model in the usual Hugging Face cache, fetched if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    progress(f"looking for {repo_id} on the Hugging Face hub")
    try:
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
    except GatedRepoError as error:
        raise BaseModelError(
            f"{repo_id}: access is restricted; accept its terms on the hub and run `hf auth login`, or pass a directory"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"{repo_id}: no such directory here and no such model on the hub (a private one needs `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"{repo_id}: not in the Hugging Face cache and the hub cannot be reached; "
            "run once with network, or pass a local directory"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"{repo_id}: the hub download failed ({reason}); try again, or pass a directory"
        ) from error
