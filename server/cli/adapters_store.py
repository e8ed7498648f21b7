"""`lorikeet adapters label`, `rollback`, `remove`, `verify` and `gc`: they change or check a store. Running servers
see every change at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.adapters_fields import version_fields
from server.cli.exits import ExitCode, Failure
from server.cli.options import AdapterId, Debug, Json, Store
from server.cli.output import human_size, print_json, print_note, print_text, short_digest

if TYPE_CHECKING:
    from adapters.records import NameRecord
    from adapters.stores import Store as AnyStore

Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name.")]
Label = Annotated[str, typer.Argument(metavar="LABEL", help="One of its labels, or a new one.")]
Expect = Annotated[
    str | None,
    typer.Option(metavar="VERSION|absent", help="Refuse unless the label points there now, or is not there."),
]
_MIN_PREFIX = 6


def label(
    name: Name,
    label: Label,
    version: Annotated[
        str,
        typer.Argument(metavar="VERSION", help="sha256:…, the digest's first six digits or more, or another label."),
    ],
    expect: Expect = None,
    store: Store = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Point a label to a version, in one step."""
    target = open_existing(store)
    record = target.record(name)
    moved = target.move_label(name, label, _digest(record, version), expected=_expected(record, expect))
    print_json(version_fields(moved)) if json else print(f"{name}@{label} is {moved.digest} now")


def rollback(
    name: Name,
    label: Annotated[str, typer.Argument(metavar="LABEL", help="One of its labels.")] = "latest",
    expect: Expect = None,
    store: Store = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Point a label to where it was before its last move; doing it again undoes it."""
    target = open_existing(store)
    expected = _expected(target.record(name), expect) if expect is not None else None
    moved = target.rollback(name, label, expected=expected)
    print_json(version_fields(moved)) if json else print(f"{name}@{label} is {moved.digest} again")


def remove(adapter: AdapterId, store: Store = None, json: Json = False, debug: Debug = False) -> None:
    """Remove an adapter (name), one of its labels (name@label) or of its versions (name@sha256:…).

    What runs on it goes on. The files stay until `lorikeet adapters gc`.
    """
    from adapters.ids import parse_adapter_id

    target, parsed = open_existing(store), parse_adapter_id(adapter)
    if "@" not in adapter:
        target.remove(parsed.name)
    elif parsed.digest is not None:
        target.remove_version(parsed.name, parsed.digest)
    else:
        assert parsed.label is not None, "an id has a label or a digest"
        target.remove_label(parsed.name, parsed.label)
    print_json({"removed": adapter}) if json else print(f"removed {adapter}")


def verify(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="An adapter's name. Without it: all.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB_ID", help="Check the versions made for this base against its layers, too."),
    ] = None,
    store: Store = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hash and check every version again, and list every fault. Ends with exit code 4 if there is one."""
    from adapters.audit import CheckedBase, audit
    from server.base.resolve import resolve_base

    target = open_existing(store)
    checked = None
    if base is not None:
        model = resolve_base(base, print_note)
        checked = CheckedBase(model.digest, model.spec.linears())
    findings = list(audit(target, name, checked))
    if json:
        entries = [
            {
                "name": finding.name,
                "digest": finding.digest,
                "faults": list(finding.faults),
                "checked_against_base": finding.against_base,
            }
            for finding in findings
        ]
        print_json({"versions": entries})
    for finding in findings if not json else ():
        what = f"{finding.name} {short_digest(finding.digest) if finding.digest else ''}".strip()
        for fault in finding.faults:
            print_text(f"{what}: {fault}")
        if not finding.faults:
            print_text(f"{what}: good")
    if num_bad := sum(1 for finding in findings if finding.faults):
        raise Failure(f"{num_bad} of {len(findings)} versions are bad", ExitCode.REFUSED)


def gc(store: Store = None, json: Json = False, debug: Debug = False) -> None:
    """Delete the files of versions that no adapter has any more and no server uses."""
    done = open_existing(store).gc()
    if json:
        fields = {"removed": done.removed, "leased": done.leased, "recent": done.recent}
        print_json(fields | {"freed_bytes": done.freed_bytes})
        return
    kept = [f"{len(done.leased)} in use"] * bool(done.leased) + [f"{len(done.recent)} too recent"] * bool(done.recent)
    print(
        f"deleted {len(done.removed)} versions ({human_size(done.freed_bytes)})"
        + (f"; kept {' and '.join(kept)}" if kept else "")
    )


def open_existing(location: str | None) -> "AnyStore":
    """A store that something is in. Raises Failure where there is none: a mistyped --store is not an empty one."""
    from adapters.stores import open_store

    store = open_store(location)
    if location is not None and not store.is_remote and not Path(store.location).is_dir():
        raise Failure(f"--store {location}: no such directory", ExitCode.USAGE)
    return store


def _digest(record: "NameRecord", text: str) -> str:
    """The version that a label, a digest or its beginning means. Raises Failure when that is none or several."""
    if text in record.labels:
        return record.labels[text]
    prefix = text.removeprefix("sha256:")
    found = [digest for digest in record.versions if digest.removeprefix("sha256:").startswith(prefix)]
    if len(prefix) >= _MIN_PREFIX and len(found) == 1:
        return found[0]
    if len(prefix) >= _MIN_PREFIX and found:
        raise Failure(f"{text!r} is the beginning of {len(found)} versions of {record.name!r}", ExitCode.USAGE)
    raise Failure(f"adapter {record.name!r} has no label or version {text!r}", ExitCode.NOT_FOUND)


def _expected(record: "NameRecord", text: str | None) -> str | None:
    from adapters.records import ABSENT

    return text if text is None or text == ABSENT else _digest(record, text)
