"""The churn itself: clients, and those who change adapters under their feet, on a live server; then what is left."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from adapters.store import AdapterStore
from lorikeet.v1 import adapter_pb2, server_pb2
from server.base.resolve import BaseModel, resolve_base
from tests.support.churn.catalog import Catalog
from tests.support.churn.contents import MEAN_RANK, Contents
from tests.support.churn.traffic import Actors, Asker, Journal, Operator
from tests.support.churn.verdict import Judge, Verdict
from tests.support.client import Client, generation
from tests.support.peft_model import lora_config
from tests.support.server_process import ServerProcess
from tests.support.tiny_base import KV_BYTES_PER_TOKEN, save_tiny_base
from tests.support.waiting import eventually

ROOM = 8  # adapters of the mean rank that the device's memory holds
KV_TOKENS = 160
MAX_NUM_SEQS = 16
ROWS_A_PAGE = 4  # of the adapters' memory
PROMPTS = [[40 + i] * (3 + 7 * i) for i in range(4)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A churn lasts until the engine has used `cpu_seconds` and given `num_answers`, but `max_seconds` at most."""

    cpu_seconds: float
    max_seconds: float
    num_answers: int = 0
    num_clients: int = 32
    num_adapters: int = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a churn did and what was wrong. `problems` are refusals, digests and leftovers that must not be."""

    journal: Journal
    judge: Judge
    verdict: Verdict
    num_stale: int
    num_swaps: int
    num_digests: int
    metrics: dict[str, float]
    engine_cpu_seconds: float
    seconds: float

    @property
    def faults(self) -> list[str]:
        return [*self.journal.problems, *self.verdict.mismatches]


def run_churn(directory: Path, size: Size) -> Outcome:
    """All of it, from an empty directory; ends the server that it starts."""
    model = save_tiny_base(directory / "tiny")
    base = resolve_base(str(directory / "tiny"))
    contents = Contents(directory / "contents", base.spec.linears())
    store = AdapterStore(directory / "store")
    catalog = Catalog(store, base, contents, size.num_adapters)
    probes = _publish_probes(store, base, contents)
    row_bytes = 4 * sum(map(sum, base.spec.linears().values()))
    server = ServerProcess.start(
        *(directory, base.path, store.root, "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--kv-cache-memory", str(KV_TOKENS * KV_BYTES_PER_TOKEN)),
        *("--adapter-memory", str(ROOM * MEAN_RANK * row_bytes)),
    )
    journal = Journal()
    try:
        began = time.monotonic()
        cpu_seconds = _traffic(server, catalog, journal, size)
        seconds = time.monotonic() - began
        metrics = server.metrics()
        journal.problems += _leftovers(server, probes)
    finally:
        status = server.stop()
    if status != 0 or "Traceback" in server.log.read_text():
        journal.problems.append(f"the server ended with {status}: {server.log.read_text()[-2000:]}")
    judge = Judge(model, catalog.sources(), PROMPTS)
    stale = _stale(catalog, journal)
    journal.problems += stale[:10]
    return Outcome(
        journal=journal,
        judge=judge,
        verdict=judge.judge(journal.records),
        num_stale=len(stale),
        num_swaps=catalog.num_swaps,
        num_digests=len({record.digest for record in journal.records}),
        metrics=metrics,
        engine_cpu_seconds=cpu_seconds,
        seconds=seconds,
    )


def _traffic(server: ServerProcess, catalog: Catalog, journal: Journal, size: Size) -> float:
    """Everyone at once for as long as `size` says; the engine's seconds on a CPU."""
    askers = [Asker(server.port, catalog, PROMPTS, journal, seed) for seed in range(size.num_clients)]
    operators = [Operator(server.port, catalog, journal, seed) for seed in range(2)]
    rng = random.Random(0)
    actors = Actors(journal)
    engine = server.engine()
    begin, deadline = sum(engine.cpu_times()[:2]), time.monotonic() + size.max_seconds
    try:
        for asker in askers:
            actors.start("client", asker.ask)
        actors.start("relabeller", lambda: catalog.relabel(rng), pause=0.01)
        actors.start("importer", lambda: catalog.import_again(rng), pause=0.02)
        actors.start("collector", catalog.collect, pause=0.2)
        actors.start("unloader", operators[0].unload, pause=0.005)
        actors.start("loader", operators[1].load, pause=0.02)
        used = 0.0
        while used < size.cpu_seconds or len(journal.records) < size.num_answers:
            if time.monotonic() > deadline or journal.problems:
                break
            time.sleep(0.1)
            used = sum(engine.cpu_times()[:2]) - begin
    finally:
        actors.stop()
        for asker in askers:
            asker.close()
        for operator in operators:
            operator.close()
    return used


def _stale(catalog: Catalog, journal: Journal) -> list[str]:
    """Answers by a digest that the label they asked for did not mean at that time."""
    found = []
    for record in journal.records:
        if record.label is not None:
            meant = catalog.may_mean(record.name, record.label, record.since, record.until)
            if record.digest not in meant:
                found.append(f"{record.name}@{record.label} was answered by {record.digest}, but was one of {meant}")
    return found


def _publish_probes(store: AdapterStore, base: BaseModel, contents: Contents) -> list[str]:
    """Adapters that, together, take exactly all of the adapters' memory."""
    names = [f"probe-{i}" for i in range(ROOM * MEAN_RANK // ROWS_A_PAGE)]
    for name in names:
        source = contents.make(lora_config(ROWS_A_PAGE, ["q_proj"]))
        store.publish(source, name, base_digest=base.digest, base_name=base.name, linears=base.spec.linears())
    return names


def _leftovers(server: ServerProcess, probes: list[str]) -> list[str]:
    """What the churn has left behind: adapters' rows, KV pages or leases that nobody can have any more."""
    client = Client(server.port)
    found = []
    try:
        eventually(server.is_idle, "no page, row or lease is held")
        for name in probes:
            client.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=name), timeout=60)
        for name in probes:
            request = adapter_pb2.GetAdapterRequest(adapter_id=name)
            if (
                client.adapters.GetAdapter(request, timeout=60).adapter.residency
                != adapter_pb2.Adapter.RESIDENCY_DEVICE
            ):
                found.append(f"{name} found no room: rows have leaked")
        limits = client.server.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=60).limits
        assert limits.max_model_len == KV_TOKENS, "the longest sequence takes every page"
        client.generate(generation([50] * (KV_TOKENS - 1), probes[0], 1))
        eventually(server.is_idle, "no page, row or lease is held")
    except (AssertionError, grpc.RpcError) as error:
        found.append(f"after the churn: {error}")
    finally:
        client.close()
    return found
