"""The versions of a remote store: brought to the bucket, and into this machine's cache, where each is checked."""

import contextlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from adapters.bucket import Bucket
from adapters.content import manifest_faults
from adapters.errors import AdapterNotFound, InvalidAdapter
from adapters.files import replace_file, store_errors, sync_directory, write_chunks, write_file
from adapters.ids import check_digest, is_digest
from adapters.manifest import MANIFEST_FILE, Manifest, canonical_json, decode_json
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE
from adapters.versions import Collected, VersionFiles


class RemoteVersions:
    """`files` is the cache; it holds `max_cache_bytes`, and what is leased besides."""

    def __init__(self, bucket: Bucket, files: VersionFiles, max_cache_bytes: int) -> None:
        self._bucket = bucket
        self._files = files
        self._max_cache_bytes = max_cache_bytes
        self._manifests = files.root / "manifests"
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def manifest(self, digest: str) -> Manifest:
        """A version's manifest, which never changes: from the cache, or the bucket. Raises AdapterNotFound,
        InvalidAdapter when it is not of that version."""
        path = self._manifest_path(digest)
        with contextlib.suppress(OSError, ValueError):
            manifest = decode_json(path.read_bytes(), Manifest)
            if not manifest_faults(manifest, digest):
                return manifest
        manifest = self._manifest_in_bucket(digest)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, canonical_json(manifest))
        return manifest

    def _manifest_in_bucket(self, digest: str) -> Manifest:
        found = self._bucket.read(_key(digest, MANIFEST_FILE))
        if found is None:
            raise AdapterNotFound(f"no version {digest} in the store at {self._bucket.location}")
        try:
            manifest = decode_json(found.data, Manifest)
            faults = manifest_faults(manifest, digest)
        except ValueError as error:
            faults = [f"{MANIFEST_FILE}: {error}"]
        if faults:
            raise self._damaged(digest, faults)
        return manifest

    def fetch(self, digest: str) -> Path:
        """The version's directory in the cache, brought there if it is not. Raises AdapterNotFound, InvalidAdapter
        when it is not what was published, StoreFull."""
        path = self._files.path(digest)
        with self._fetching[digest]:  # one of many threads brings it
            if path.is_dir():
                return path
            if faults := self._bring(self.manifest(digest)):
                raise self._damaged(digest, faults)
        return path

    def faults(self, digest: str) -> list[str]:
        """What of the bucket's files is not as published, whatever the cache holds; it holds what is, then."""
        try:
            return self._bring(self._manifest_in_bucket(digest))
        except AdapterNotFound:
            return [f"{MANIFEST_FILE}: is not in the bucket"]
        except InvalidAdapter as error:
            return list(error.faults)

    def upload(self, digest: str) -> None:
        """Bring from the cache what the bucket has not; the manifest always, last, so that the version looks recent."""
        path = self._files.path(digest)
        there = {stored.key: stored.size_bytes for stored in self._bucket.find(_key(digest))}
        with store_errors(self._files.root):
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if there.get(_key(digest, name)) != (path / name).stat().st_size:
                    self._bucket.overwrite(_key(digest, name), path / name)
        try:
            manifest = self.manifest(digest)  # the first that was published, if there is one
        except (AdapterNotFound, InvalidAdapter):
            manifest = self._files.manifest(digest)
        self._bucket.overwrite(_key(digest, MANIFEST_FILE), canonical_json(manifest))

    def collect(self, used: Callable[[], set[str]], written_before: float) -> Collected:
        """Remove the versions that are not in `used()` and were last published before `written_before` (seconds since
        1970), from the bucket; and from the cache unless leased."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        sizes: defaultdict[str, int] = defaultdict(int)
        for stored in self._bucket.find("versions"):
            digest = stored.key.split("/")[1].replace("-", ":", 1)
            if is_digest(digest):
                found[digest].append(stored.key)
                sizes[digest] += stored.size_bytes
        keep = used()
        collected = Collected()
        for digest in sorted(found.keys() - keep):
            if self._last_written(digest, found[digest]) >= written_before:
                collected.recent.append(digest)
                continue
            for key in sorted(found[digest], reverse=True):  # the manifest first: without it there is no version
                self._bucket.delete(key)
            with contextlib.suppress(OSError):
                self._manifest_path(digest).unlink()
            collected.removed.append(digest)
            collected.freed_bytes += sizes[digest]
        with store_errors(self._files.root):
            collected.leased = self._files.collect(lambda: keep | set(collected.recent)).leased
        return collected

    def _last_written(self, digest: str, keys: list[str]) -> float:
        """Asked for just before a version would be removed: every publication writes the manifest again."""
        times = [self._bucket.modified(key) for key in {*keys, _key(digest, MANIFEST_FILE)}]
        return max((when for when in times if when is not None), default=0.0)

    def _bring(self, manifest: Manifest) -> list[str]:
        """Put a version into the cache, or mend it there; what is wrong with it in the bucket, one line a fault."""
        with store_errors(self._files.root, manifest.size_bytes), self._files.staged() as stage:
            content = stage / "content"
            content.mkdir()
            if faults := self._download(manifest, content):
                return faults
            write_file(content / MANIFEST_FILE, canonical_json(manifest))
            sync_directory(content)
            with self._files.locked():
                self._files.place(content, manifest.digest)
        self._trim(manifest.digest)
        return []

    def _download(self, manifest: Manifest, directory: Path) -> list[str]:
        """Bring a version's files into `directory`; what is wrong with them, one line a fault."""
        faults = []
        for name, info in manifest.files.items():
            chunks = self._bucket.chunks(_key(manifest.digest, name))
            try:
                found = write_chunks(directory / name, chunks, info.size_bytes)
            except FileNotFoundError:
                faults.append(f"{name}: is not in the bucket")
                continue
            if found is None:
                faults.append(f"{name}: is larger than the {info.size_bytes} bytes published")
            elif found != info.sha256:
                faults.append(f"{name}: its sha256 is {found}, not {info.sha256}")
        return faults

    def _trim(self, newest: str) -> None:
        """Make room in the cache: the least recently used versions go, unless leased."""
        if sum(version.size_bytes for version in self._files.present()) > self._max_cache_bytes:
            with store_errors(self._files.root):
                self._files.collect(lambda: self._recent() | {newest})

    def _recent(self) -> set[str]:
        """The most recently used versions that the cache has room for."""
        recent = list(reversed(self._files.present()))
        totals = itertools.accumulate(version.size_bytes for version in recent)
        return {version.digest for version, total in zip(recent, totals, strict=True) if total <= self._max_cache_bytes}

    def _damaged(self, digest: str, faults: list[str]) -> InvalidAdapter:
        message = f"version {digest} in {self._bucket.location} is damaged: {'; '.join(faults)}"
        return InvalidAdapter(message, faults=faults)

    def _manifest_path(self, digest: str) -> Path:
        return self._manifests / f"{check_digest(digest).replace(':', '-')}.json"


def _key(digest: str, *name: str) -> str:
    return "/".join(("versions", check_digest(digest).replace(":", "-"), *name))
