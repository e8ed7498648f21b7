"""The content of a version: what its digest is made of, its description, and whether it is still intact."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from adapters.files import hash_file
from adapters.layout import AdapterLayout
from adapters.manifest import (
    MANIFEST_FILE,
    BaseReference,
    FileInfo,
    Manifest,
    TrainingInfo,
    canonical_json,
    utc_now,
)
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE

_FORMAT = "lorikeet-adapter-v1"


def content_digest(base_digest: str, hashes: Mapping[str, str]) -> str:
    """`sha256:<hex>` over each file's sha256 (hex, by name) and the base's digest: an adapter is its content and what
    it was made for."""
    description = {"format": _FORMAT, "base_digest": base_digest, "files": dict(hashes)}
    return "sha256:" + hashlib.sha256(canonical_json(description)).hexdigest()


def describe(
    directory: Path,
    layout: AdapterLayout,
    linears: Mapping[str, tuple[int, int]],
    base: BaseReference,
    *,
    training: TrainingInfo | None,
    trained_base: BaseReference | None,
    notes: str,
) -> Manifest:
    """The manifest of a directory that was checked against `base`."""
    files = {
        name: FileInfo(sha256=hash_file(directory / name), size_bytes=(directory / name).stat().st_size)
        for name in (CONFIG_FILE, WEIGHTS_FILE)
    }
    ranks = tuple(sorted({module.rank for module in layout.modules.values()}))
    return Manifest(
        digest=content_digest(base.digest, _hashes(files)),
        base_digest=base.digest,
        base_name=base.name,
        rank=ranks[-1],
        ranks=ranks,
        alpha=float(json.loads((directory / CONFIG_FILE).read_bytes()).get("lora_alpha", 8)),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in layout.modules})),
        dtype=layout.dtype,
        num_parameters=sum(module.rank * sum(linears[path]) for path, module in layout.modules.items()),
        size_bytes=sum(info.size_bytes for info in files.values()),
        created_at=utc_now(),
        files=files,
        training=training,
        trained_base=trained_base,
        notes=notes,
    )


def manifest_faults(manifest: Manifest, digest: str) -> list[str]:
    """Why this cannot be the manifest of the version `digest`: a digest speaks for the files and the base."""
    if manifest.digest != digest:
        return [f"{MANIFEST_FILE}: does not belong to {digest}"]
    if manifest.files.keys() != {CONFIG_FILE, WEIGHTS_FILE}:
        return [f"{MANIFEST_FILE}: does not list {CONFIG_FILE} and {WEIGHTS_FILE} alone"]
    if content_digest(manifest.base_digest, _hashes(manifest.files)) != digest:
        return [f"{MANIFEST_FILE}: its files and base do not give {digest}"]
    return []


def damage(directory: Path, manifest: Manifest, digest: str) -> list[str]:
    """What is not as the version `digest` has to be, one line a fault; empty when intact. Reads every byte."""
    faults = manifest_faults(manifest, digest)
    if faults:
        return faults
    for name, info in manifest.files.items():
        try:
            found = hash_file(directory / name)
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
            continue
        if found != info.sha256:
            faults.append(f"{name}: its sha256 is {found}, not {info.sha256}")
    return faults


def _hashes(files: Mapping[str, FileInfo]) -> dict[str, str]:
    return {name: info.sha256 for name, info in files.items()}
