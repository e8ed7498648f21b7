"""Adapters in and out of a store: from a directory or the Hugging Face hub, and to a plain PEFT directory."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from adapters.content import damage
from adapters.errors import AdapterNotFound, InvalidAdapter, StoreUnavailable
from adapters.files import expand_user
from adapters.manifest import MANIFEST_FILE, canonical_json
from adapters.stores import Store
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE
from adapters.versions import Version

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_source(path_or_hub_id: str, progress: Callable[[str], None]) -> Path:
    """The directory of a PEFT adapter: itself, or that of a hub id (owner/name) in the Hugging Face cache, fetched
    first. Of the hub, the config and the safetensors file alone. `progress` hears a line before anything is fetched.

    Raises AdapterNotFound, InvalidAdapter when it has no such files, StoreUnavailable when the hub is away.
    """
    path = expand_user(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(path_or_hub_id) or ".." in path_or_hub_id:
        raise AdapterNotFound(f"{path_or_hub_id}: no such directory, and not a hub id (owner/name)")
    progress(f"looking for {path_or_hub_id} on the Hugging Face hub")
    found = _from_hub(path_or_hub_id)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (found / name).exists():
            raise InvalidAdapter(
                f"{path_or_hub_id}: has no {name} on the hub; only PEFT adapters in safetensors are taken",
                faults=[f"{name}: not found"],
            )
    return found


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except GatedRepoError as error:
        raise AdapterNotFound(
            f"{repo_id}: access is restricted; accept its terms on the hub and run `hf auth login`, or pass a directory"
        ) from error
    except RepositoryNotFoundError as error:
        raise AdapterNotFound(
            f"{repo_id}: no such directory here and no such adapter on the hub (a private one needs `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise StoreUnavailable(
            f"{repo_id}: not in the Hugging Face cache and the hub cannot be reached; "
            "try again with network, or pass a directory"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreUnavailable(
            f"{repo_id}: the hub download failed ({reason}); try again, or pass a directory"
        ) from error


def export_version(store: Store, version: Version, directory: Path) -> None:
    """Make `directory`, which must not exist or be empty, a PEFT directory of the version; all or nothing.

    PeftModel loads it, and a store that it is published to again knows what it was trained on by its manifest.
    Raises FileExistsError, and OSError when it cannot be written; InvalidAdapter when the version is damaged.
    """
    if not directory.name:  # "." or "/"
        raise FileExistsError(f"{directory}: cannot be replaced; name a directory in it")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory}: is there already, and not an empty directory")
    path = store.fetch(version.digest)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with store.lease(version.digest):
        stage = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        stage.mkdir()
        try:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(path / name, stage / name)
            (stage / MANIFEST_FILE).write_bytes(canonical_json(version.manifest))
            if faults := damage(stage, version.manifest, version.digest):
                raise InvalidAdapter(f"version {version.digest} is damaged: {'; '.join(faults)}", faults=faults)
            stage.replace(directory)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
