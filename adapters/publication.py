"""Preparing a publication: a PEFT directory becomes a checked, complete version, out of everyone's sight."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.content import describe
from adapters.errors import BaseMismatch, InvalidAdapter
from adapters.files import copy_file, store_errors, sync_directory, write_file
from adapters.layout import Limits, read_layout
from adapters.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, BaseReference, Manifest, TrainingInfo, canonical_json
from adapters.peft_config import canonical_config
from adapters.sources import open_source, read_origin
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE, read_header, read_json, refuse
from adapters.versions import VersionFiles


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """How strict a publication is, and what it adds to the manifest.

    `training` and `notes`, if not given, are those that a store's manifest in the source says. `allow_zero` takes
    an adapter without effect, `allow_base_mismatch` one that such a manifest says was made for another base.
    """

    training: TrainingInfo | None = None
    notes: str = ""
    limits: Limits = field(default_factory=Limits)
    allow_zero: bool = False
    allow_base_mismatch: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A version that only has to be put into place: `content` is its directory, `stage` the one around it."""

    stage: Path
    content: Path
    manifest: Manifest


@contextlib.contextmanager
def prepared(
    files: VersionFiles,
    source: Path,
    base: BaseReference,
    linears: Mapping[str, tuple[int, int]],
    options: PublishOptions,
) -> Iterator[Prepared]:
    """Copies a PEFT directory beside its later place, checks the copy and describes it; gone after the block.

    OSErrors of the block become the store's. Raises InvalidAdapter and its kinds, StoreFull, StoreUnavailable.
    """
    if options.training is not None and (names := options.training.not_finite()):
        raise InvalidAdapter(f"training: {', '.join(names)} must be finite", faults=names)
    limits = options.limits
    with open_source(source, CONFIG_FILE) as config_fd, open_source(source, WEIGHTS_FILE) as weights_fd:
        config = canonical_config(read_json(config_fd, CONFIG_FILE, limits.max_config_bytes))
        read_header(weights_fd, limits)  # refuse early what would be copied in vain
        origin = read_origin(source)
        trained_base = _trained_base(origin, base, options.allow_base_mismatch)
        needed = len(config) + os.fstat(weights_fd).st_size
        with store_errors(files.root, needed), files.staged() as stage:
            content = stage / "content"
            content.mkdir()
            write_file(content / CONFIG_FILE, config)
            copy_file(weights_fd, content / WEIGHTS_FILE)
            layout = read_layout(content, linears, limits, allow_zero=options.allow_zero)
            training = options.training or (origin.training if origin else None)
            notes = options.notes or (origin.notes if origin else "")
            manifest = describe(
                content, layout, linears, base, training=training, trained_base=trained_base, notes=notes
            )
            write_file(content / MANIFEST_FILE, _encoded(manifest))
            sync_directory(content)
            yield Prepared(stage, content, manifest)


def _encoded(manifest: Manifest) -> bytes:
    """As canonical JSON. Raises InvalidAdapter for text that is no Unicode, as file names can be, or too much."""
    try:
        raw = canonical_json(manifest)
    except UnicodeEncodeError as error:
        said = f"{error.object!a:.80} cannot be written in UTF-8; is it a note, or the base's name?"
        raise refuse(f"{MANIFEST_FILE}: {said}") from None
    if len(raw) > MAX_MANIFEST_BYTES:
        raise refuse(f"{MANIFEST_FILE}: {len(raw)} bytes; at most {MAX_MANIFEST_BYTES} are taken; shorten the notes")
    return raw


def _trained_base(origin: Manifest | None, base: BaseReference, allow_mismatch: bool) -> BaseReference | None:
    """The base that an adapter was trained on, if it is known and not `base`. Raises BaseMismatch."""
    if origin is None:
        return None
    trained = origin.trained_base or BaseReference(digest=origin.base_digest, name=origin.base_name)
    if trained.digest == base.digest:
        return None
    if origin.base_digest != base.digest and not allow_mismatch:
        raise BaseMismatch(
            f"the adapter was made for {origin.base_name} ({origin.base_digest}), not for {base.name} ({base.digest})",
            faults=[f"{MANIFEST_FILE}: base_digest is {origin.base_digest}"],
        )
    return trained
