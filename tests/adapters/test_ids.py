import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterNotFound, InvalidAdapterId
from adapters.ids import AdapterId, parse_adapter_id
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from adapters.versions import VersionFiles
from tests.adapters.builders import BASE_DIGEST, PUBLISH, write_adapter

DIGEST = "sha256:" + "0f" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pirate", AdapterId("pirate", "latest", None)),
        ("a", AdapterId("a", "latest", None)),
        ("7b.v2_x-y", AdapterId("7b.v2_x-y", "latest", None)),
        ("pirate@prod", AdapterId("pirate", "prod", None)),
        (f"pirate@{DIGEST}", AdapterId("pirate", None, DIGEST)),
        ("n" * 128 + "@" + "l" * 64, AdapterId("n" * 128, "l" * 64, None)),
    ],
)
def test_reads_the_three_forms(text: str, expected: AdapterId) -> None:
    assert parse_adapter_id(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "@",
            "a@",
            "@a",
            "A",
            "a b",
            "a/b",
            "../a",
            "a/../b",
            "a..b",
            ".a",
            "-a",
            "_a",
            "a\n",
            "a\0",
            "é",
            "a@b@c",
        ],
        *["a@B", "a@..", "a@x/y", "a@sha256:", f"a@{DIGEST[:-1]}", f"a@{DIGEST}0", f"a@{DIGEST.upper()}", "٣", "ａ"],
        *["n" * 129, "a@" + "l" * 65, "a@sha256:" + "g" * 64, "a@sha512:" + "0" * 64, "~", "%2e%2e", "a\\b", "c:a"],
    ],
)
def test_refuses_all_else(text: str) -> None:
    with pytest.raises(InvalidAdapterId) as caught:
        parse_adapter_id(text)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


HOSTILE = st.one_of(
    st.text(max_size=20),
    st.text("./\\@~%:\0a-z sh256", max_size=12),
    st.lists(st.sampled_from(["..", ".", "/", "\\", "@", "a", "\0", "~", "sha256:", "%2e"]), max_size=6).map("".join),
)


class WatchedFiles(VersionFiles):
    """Notes every path it makes of a digest."""

    def __init__(self, root: Path, touched: list[Path]) -> None:
        super().__init__(root)
        self._touched = touched

    def path(self, digest: str) -> Path:
        self._touched.append(super().path(digest))
        return self._touched[-1]


class WatchedStore(AdapterStore):
    """A store that notes every path it makes of a name or digest."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.touched: list[Path] = []
        self._files = WatchedFiles(root, self.touched)

    def _record_path(self, name: str) -> Path:
        self.touched.append(super()._record_path(name))
        return self.touched[-1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> WatchedStore:
    root = tmp_path_factory.mktemp("watched")
    store = WatchedStore(root / "store")
    store.publish(write_adapter(root / "source"), "a", **PUBLISH)
    return store


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(HOSTILE, min_size=50, max_size=50))  # 10,000 ids
def test_no_id_reaches_a_path_outside_the_store(store: WatchedStore, texts: list[str]) -> None:
    store.touched.clear()
    registry = AdapterRegistry(store, BASE_DIGEST)
    for text in texts:
        try:
            version = registry.resolve(text)
        except (InvalidAdapterId, AdapterNotFound):
            pass
        else:
            assert version.name == "a" == text.partition("@")[0]
    store.resolve("a")
    assert {path.parent.name for path in store.touched} == {"names", "versions"}
    for path in store.touched:
        assert path.parent in (store.root / "names", store.root / "versions")
        assert os.path.normpath(path) == str(path)
