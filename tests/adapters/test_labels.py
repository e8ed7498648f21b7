"""Labels: moved only from where they are expected, taken back, removed; by many processes at once."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterInUse, AdapterNotFound, InvalidAdapterId, LabelMoved
from adapters.records import ABSENT, NameRecord, new_record
from adapters.store import AdapterStore
from tests.adapters.builders import PUBLISH, write_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """With three versions of `a`."""
    store = AdapterStore(tmp_path / "store")
    for seed in range(3):
        store.publish(write_adapter(tmp_path / f"source{seed}", seed=seed), "a", **PUBLISH)
    return store


@pytest.fixture
def digests(store: AdapterStore) -> tuple[str, ...]:
    return store.record("a").versions


def test_a_label_moves_from_where_it_is_expected(store: AdapterStore, digests: tuple[str, ...]) -> None:
    assert store.move_label("a", "prod", digests[0], expected=ABSENT).labels == ("prod",)
    assert store.move_label("a", "prod", digests[1], expected=digests[0]).digest == digests[1]
    assert store.resolve("a@prod").digest == digests[1]
    for stale in (digests[0], ABSENT):
        with pytest.raises(LabelMoved, match=rf"'prod' of adapter 'a' is {digests[1]}, not {stale}") as caught:
            store.move_label("a", "prod", digests[2], expected=stale)
        assert (caught.value.code, caught.value.reason) == ("ABORTED", "LABEL_MOVED")
    assert store.resolve("a@prod").digest == digests[1]
    assert store.move_label("a", "prod", digests[2]).digest == digests[2]
    assert store.record("a").labels == {"latest": digests[2], "prod": digests[2]}


def test_moving_to_where_it_is_already_is_no_move(store: AdapterStore, digests: tuple[str, ...]) -> None:
    before, stamp = store.record("a"), store.stamp("a")
    store.move_label("a", "latest", digests[2], expected=digests[2])
    assert (store.record("a"), store.stamp("a")) == (before, stamp)


def test_a_publication_can_expect_too(store: AdapterStore, digests: tuple[str, ...], tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "more", seed=9)
    for name, expected in (("a", digests[0]), ("new", digests[0])):
        with pytest.raises(LabelMoved):
            store.publish(source, name, expected=expected, **PUBLISH)
    assert store.names() == ["a"]
    assert store.record("a").versions == digests
    store.publish(source, "new", expected=ABSENT, **PUBLISH)
    assert store.publish(source, "a", expected=digests[2], **PUBLISH).labels == ("latest",)


def test_rollback_goes_to_the_version_before_and_is_a_move(store: AdapterStore, digests: tuple[str, ...]) -> None:
    assert store.rollback("a").digest == digests[1]
    assert store.resolve("a").digest == digests[1]
    move = store.record("a").history[-1]
    assert (move.label, move.previous, move.digest) == ("latest", digests[2], digests[1])
    assert store.rollback("a", expected=digests[1]).digest == digests[2], "a second one undoes the first"
    with pytest.raises(LabelMoved):
        store.rollback("a", expected=digests[0])
    store.move_label("a", "prod", digests[0])
    with pytest.raises(AdapterNotFound, match="'prod' of adapter 'a' has no earlier version"):
        store.rollback("a", "prod")
    with pytest.raises(AdapterNotFound, match="no earlier version"):
        store.rollback("a", "never")


def test_rollback_needs_the_version_still_there(store: AdapterStore, digests: tuple[str, ...]) -> None:
    store.remove_version("a", digests[1])
    with pytest.raises(AdapterNotFound, match=f"no version {digests[1]} any more"):
        store.rollback("a")
    assert store.resolve("a").digest == digests[2]


def test_labels_and_versions_are_removed(store: AdapterStore, digests: tuple[str, ...]) -> None:
    store.move_label("a", "prod", digests[0])
    with pytest.raises(AdapterInUse, match="is labelled prod"):
        store.remove_version("a", digests[0])
    store.remove_label("a", "prod")
    assert store.record("a").history[-1].digest is None
    with pytest.raises(AdapterNotFound, match="no label 'prod'"):
        store.remove_label("a", "prod")
    assert store.move_label("a", "prod", digests[1], expected=ABSENT).digest == digests[1]
    store.remove_version("a", digests[0])
    assert store.record("a").versions == digests[1:]
    for gone in (f"a@{digests[0]}", f"b@{digests[0]}"):
        with pytest.raises(AdapterNotFound):
            store.resolve(gone)
    with pytest.raises(AdapterNotFound):
        store.remove_version("a", digests[0])
    with pytest.raises(AdapterNotFound):
        store.move_label("a", "prod", digests[0])
    with pytest.raises(AdapterInUse, match="move it, or remove the adapter"):
        store.remove_label("a", "latest")
    with pytest.raises(AdapterInUse):
        store.remove_version("a", digests[2])


def test_what_is_malformed_or_missing_changes_nothing(store: AdapterStore, digests: tuple[str, ...]) -> None:
    before = store.record("a")
    for name, label, digest in (("a", "../x", digests[0]), ("a", "x", "sha256:1"), ("A", "x", digests[0])):
        with pytest.raises(InvalidAdapterId):
            store.move_label(name, label, digest)
    for expected in ("", "sha256:1", "latest"):
        with pytest.raises(InvalidAdapterId):
            store.move_label("a", "x", digests[0], expected=expected)
        with pytest.raises(InvalidAdapterId):
            store.rollback("a", expected=expected)
    for name in ("b", "latest"):
        with pytest.raises(AdapterNotFound):
            store.move_label(name, "x", digests[0])
    with pytest.raises(AdapterNotFound):
        store.rollback("b")
    assert store.record("a") == before
    assert list((store.root / "staging").iterdir()) == []


MOVER = """
import sys
from pathlib import Path
from adapters.errors import LabelMoved
from adapters.store import AdapterStore
store, moved = AdapterStore(Path(sys.argv[1])), 0
digests = store.record("a").versions
while moved < int(sys.argv[2]):
    now = store.resolve("a@count")
    target = digests[(digests.index(now.digest) + 1) % len(digests)]
    try:
        store.move_label("a", "count", target, expected=now.digest)
        moved += 1
    except LabelMoved:
        pass
"""


def test_of_many_movers_none_overwrites_another(store: AdapterStore, digests: tuple[str, ...]) -> None:
    """Four processes move a label on by one step each time: with a lost update it would end elsewhere."""
    store.move_label("a", "count", digests[0])
    movers = [subprocess.Popen([sys.executable, "-c", MOVER, store.root, "20"], cwd=ROOT) for _ in range(4)]
    assert [mover.wait(240) for mover in movers] == [0] * 4
    assert store.resolve("a@count").digest == digests[80 % 3]
    moves = [move for move in store.record("a").history if move.label == "count"]
    assert len(moves) == 81
    assert all(later.previous == earlier.digest for earlier, later in itertools.pairwise(moves))


DIGESTS = [f"sha256:{i:064x}" for i in range(4)]
LABELS = ["latest", "prod", "beta"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("publish"), st.sampled_from(LABELS), st.sampled_from(DIGESTS)),
            st.tuples(st.just("roll back"), st.sampled_from(LABELS), st.just("")),
            st.tuples(st.just("remove label"), st.sampled_from(LABELS), st.just("")),
            st.tuples(st.just("remove version"), st.just(""), st.sampled_from(DIGESTS)),
        ),
        max_size=30,
    )
)
def test_whatever_is_done_a_record_stays_sound_and_its_history_tells_it(steps: list[tuple[str, str, str]]) -> None:
    record = new_record("a", "latest", DIGESTS[0], "t")
    for kind, label, digest in steps:
        before = record
        try:
            if kind == "publish":
                record = record.with_label(label, digest, "t")
            elif kind == "roll back":
                record = record.rolled_back(label, "t")
            elif kind == "remove label":
                record = record.without_label(label, "t")
            else:
                record = record.without_version(digest)
        except (AdapterNotFound, AdapterInUse):
            assert record == before
        _check(record)


def _check(record: NameRecord) -> None:
    labels: dict[str, str] = {}
    for move in record.history:
        assert labels.get(move.label) == move.previous
        labels.pop(move.label, None)
        if move.digest is not None:
            labels[move.label] = move.digest
    assert labels == record.labels
    assert record.labels["latest"] in record.versions
    assert len(set(record.versions)) == len(record.versions)
