"""Where a quantized checkpoint comes from: `lorikeet quantize` leaves a record, by which the copy keeps its identity.

An adapter fits a base by digest, and NF4 is a format of that base, not another base: what was trained on the 16-bit
checkpoint serves on the 4-bit one. The record holds for the weight files that it names by hash, and for no others.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.base.cache import write_whole
from server.errors import BaseModelError

RECORD = "lorikeet.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """The base that a checkpoint was quantized from, and sha256 of the weight files it was written to, by name."""

    digest: str
    name: str
    weights: tuple[str, ...]

    def write(self, directory: Path) -> None:
        record = {"quantized_from": {"digest": self.digest, "name": self.name}, "weights": list(self.weights)}
        write_whole(directory / RECORD, json.dumps(record, indent=2) + "\n")


def read_origin(directory: Path, weights: Sequence[str]) -> Origin | None:
    """The record in a directory whose weight files have these sha256; None without one. Raises BaseModelError for one
    that cannot be read, or is of other files."""
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        base = record["quantized_from"]
        origin = Origin(str(base["digest"]), str(base["name"]), tuple(record["weights"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{path}: is not what `lorikeet quantize` writes ({error})") from error
    if origin.weights != tuple(weights):
        raise BaseModelError(
            f"{path}: was written for other weight files than lie here; quantize again, or delete it, and the "
            "checkpoint counts as a base of its own"
        )
    return origin
