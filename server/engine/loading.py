"""One adapter's way into memory, what the step loop hears of it, and the counting of it."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from time import perf_counter
from typing import TypeVar

from adapters.errors import LorikeetError, StoreUnavailable
from server.engine.messages import AdapterLoad, AdapterRef
from server.lora.pool import Ranges
from server.lora.weights import PackedAdapter

T = TypeVar("T")


class Stage(StrEnum):
    """Where a load is, as CallProgress says it."""

    QUEUED = "queued"
    READING = "reading"
    WAITING = "waiting"
    COPYING = "copying"
    CHECKING = "checking"


@dataclass(slots=True)
class Loading:
    """`packed` once read, `ranges` once rows are taken. `stage` may go from COPYING to CHECKING on the worker."""

    adapter: AdapterRef
    stage: Stage = Stage.QUEUED
    told: Stage = Stage.QUEUED
    is_waited_for: bool = False  # by sequences
    is_called: bool = False  # by LoadAdapter
    is_leaving: bool = False  # by UnloadAdapter: what comes of it is for those that wait now, and not kept
    pin: bool = False
    packed: PackedAdapter | None = None
    ranges: Ranges | None = None
    reading: Future[tuple[PackedAdapter, float]] | None = None
    copying: Future[float] | None = None

    @property
    def is_wanted(self) -> bool:
        return self.is_waited_for or self.is_called


@dataclass(frozen=True, slots=True)
class Progress:
    """A load that was called for has come to another stage; `num_bytes` are those it moves, 0 before they are known."""

    digest: str
    stage: Stage
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What changed since the last poll: digests now resident (of `unpinned` the pin was refused), those refused with
    their error, those unloaded once their leases ended, and how far loads are that were called for."""

    loaded: list[str] = field(default_factory=list)
    unpinned: dict[str, LorikeetError] = field(default_factory=dict)
    failed: dict[str, LorikeetError] = field(default_factory=dict)
    unloaded: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)


@dataclass(slots=True)
class TierCounters:
    """By tier; they only grow, but for `load_times`: those since they were last taken."""

    loads: dict[str, int] = field(default_factory=lambda: {"host": 0, "device": 0})
    hits: dict[str, int] = field(default_factory=lambda: {"host": 0, "device": 0})
    misses: dict[str, int] = field(default_factory=lambda: {"host": 0, "device": 0})
    failures: Counter[str] = field(default_factory=Counter)  # by the error's reason
    load_times: list[AdapterLoad] = field(default_factory=list)


def timed_load(load: Callable[[AdapterRef], PackedAdapter], adapter: AdapterRef) -> tuple[PackedAdapter, float]:
    began = perf_counter()
    return load(adapter), perf_counter() - began


def outcome(work: Future[T], digest: str) -> T:
    """The worker's result; an error that is not ours becomes one that names the adapter."""
    try:
        return work.result()
    except LorikeetError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"adapter {digest} cannot be read: {error}", retry_after=1.0) from error
