"""Clients that ask for adapters by name, label and digest, and keep what they were answered."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from lorikeet.v1 import adapter_pb2
from tests.support.churn.catalog import LABELS, Catalog
from tests.support.client import Answer, Client, Failure, failure_of, generation

MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Record:
    """One answer: what was asked for, when (the digest was chosen between `since` and `until`), what came."""

    name: str
    label: str | None  # None: the digest itself was asked for
    prompt: int
    since: float
    until: float
    digest: str
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Journal:
    """What the actors of a churn saw. Lists and counters are only added to; `problems` should stay empty."""

    records: list[Record] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)  # by reason: those that the churn makes rightful
    calls: Counter[str] = field(default_factory=Counter)  # what was done to adapters, by kind
    problems: list[str] = field(default_factory=list)


class Actors:
    """Threads that each repeat something until they are stopped; what one raises is a problem and ends it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, repeat: Callable[[], None], pause: float = 0.0) -> None:
        """Call `repeat` over and over, `pause` seconds apart."""

        def run() -> None:
            try:
                while not self._stopping.is_set():
                    repeat()
                    self._stopping.wait(pause)
            except BaseException as error:  # noqa: BLE001 (told in the end)
                self._journal.problems.append(f"{name}: {error!r}")

        thread = threading.Thread(target=run, name=name)
        self._threads.append(thread)
        thread.start()

    def stop(self, timeout: float = 120.0) -> None:
        """Returns when each has ended what it was at."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout)
            if thread.is_alive():
                self._journal.problems.append(f"{thread.name}: hangs")


class Asker:
    """One client: greedy generations, streamed or not, some cut short."""

    def __init__(self, port: int, catalog: Catalog, prompts: Sequence[list[int]], journal: Journal, seed: int) -> None:
        self._client = Client(port)
        self._catalog = catalog
        self._prompts = prompts
        self._journal = journal
        self._rng = random.Random(seed)

    def ask(self) -> None:
        rng = self._rng
        name, label = rng.choice(self._catalog.names), rng.choice((*LABELS, None))
        digest = rng.choice(self._catalog.known(name)) if label is None else None
        adapter_id = f"{name}@{digest or label}" if label != "latest" or rng.random() < 0.5 else name
        prompt = rng.randrange(len(self._prompts))
        fields = generation(self._prompts[prompt], adapter_id, rng.randrange(1, MAX_TOKENS + 1))
        since = time.monotonic()
        try:
            until, found, token_ids = self._streamed(fields) if rng.random() < 0.5 else self._whole(fields)
        except grpc.RpcError as error:
            self._refused(adapter_id, digest, failure_of(error))
            return
        if digest not in (None, found):
            self._journal.problems.append(f"{adapter_id} was answered by {found}")
        if token_ids:
            self._journal.records.append(Record(name, label, prompt, since, until, found, tuple(token_ids)))

    def _whole(self, fields: dict[str, object]) -> tuple[float, str, list[int]]:
        response = self._client.generate(fields)
        return time.monotonic(), response.adapter_digest, list(response.token_ids)

    def _streamed(self, fields: dict[str, object]) -> tuple[float, str, list[int]]:
        """A fifth of the streams is cancelled on the way: what came until then has to be right as well."""
        cut = self._rng.randrange(1, MAX_TOKENS) if self._rng.random() < 0.2 else None
        stream, answer, until = self._client.open(fields), Answer(), 0.0
        for piece in stream:
            until = until or time.monotonic()
            answer.add(piece)
            if cut is not None and len(answer.token_ids) >= cut:
                stream.cancel()
                break
        (digest,) = answer.digests
        return until, digest, answer.token_ids

    def _refused(self, adapter_id: str, digest: str | None, failure: Failure) -> None:
        """A digest may have been forgotten since; nothing else is refused."""
        if digest is None or failure.reason != "ADAPTER_NOT_FOUND":
            self._journal.problems.append(f"{adapter_id} was refused: {failure}")
        self._journal.refusals[failure.reason] += 1

    def close(self) -> None:
        self._client.close()


class Operator:
    """Loads and unloads adapters under the feet of those who use them."""

    RIGHTFUL = ("ADAPTER_IN_USE", "ADAPTER_NOT_FOUND", "ADAPTER_LOAD_CANCELLED")

    def __init__(self, port: int, catalog: Catalog, journal: Journal, seed: int) -> None:
        self._client = Client(port)
        self._catalog = catalog
        self._journal = journal
        self._rng = random.Random(seed)

    def unload(self) -> None:
        mode = self._rng.choice((adapter_pb2.UNLOAD_MODE_REFUSE, adapter_pb2.UNLOAD_MODE_DRAIN))
        request = adapter_pb2.UnloadAdapterRequest(adapter_id=self._some_id(), mode=mode)
        self._call("unload", lambda: self._client.adapters.UnloadAdapter(request, timeout=60))

    def load(self) -> None:
        request = adapter_pb2.LoadAdapterRequest(adapter_id=self._some_id())
        self._call("load", lambda: self._client.adapters.LoadAdapter(request, timeout=60))

    def _some_id(self) -> str:
        name = self._rng.choice(self._catalog.names)
        return f"{name}@{self._rng.choice((*LABELS, *self._catalog.known(name)))}"

    def _call(self, kind: str, call: Callable[[], object]) -> None:
        try:
            call()
            self._journal.calls[kind] += 1
        except grpc.RpcError as error:
            failure = failure_of(error)
            if failure.reason not in self.RIGHTFUL:
                self._journal.problems.append(f"{kind}: {failure}")
            self._journal.refusals[failure.reason] += 1

    def close(self) -> None:
        self._client.close()
