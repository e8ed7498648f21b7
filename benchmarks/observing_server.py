"""The server of `benchmarks.observing`: it is watched from SIGUSR1 to SIGUSR2, and until then not."""

import argparse
import asyncio
import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.registry import AdapterRegistry
from adapters.stores import open_store
from server import logs
from server.base.resolve import resolve_base
from server.config import EngineConfig, ServeConfig
from server.engine.messages import Stats
from server.frontend.frontend import Frontend
from server.metrics import Metrics
from server.rpc.lifecycle import run
from server.rpc.observers import observing
from server.rpc.record import CallRecord, Observer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--collector", help="where spans go")
    asyncio.run(serve(parser.parse_args()))


@dataclass(slots=True)
class Switch:
    """Whether the server is watched."""

    is_on: bool = False

    def set(self, is_on: bool) -> None:
        self.is_on = is_on


class Switched(Metrics):
    """Counts what happens with requests only while the switch is on."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self._switch = switch

    def request_done(self, **of_call: Any) -> None:
        if self._switch.is_on:
            super().request_done(**of_call)

    def first_token(self, **of_request: Any) -> None:
        if self._switch.is_on:
            super().first_token(**of_request)

    def output_tokens(self, **of_request: Any) -> None:
        if self._switch.is_on:
            super().output_tokens(**of_request)

    def prompt_tokens(self, **of_request: Any) -> None:
        if self._switch.is_on:
            super().prompt_tokens(**of_request)

    def generation_tokens(self, **of_delta: Any) -> None:
        if self._switch.is_on:
            super().generation_tokens(**of_delta)

    def engine_stats(self, stats: Stats, names: Mapping[str, str]) -> None:
        if self._switch.is_on:
            super().engine_stats(stats, names)


@dataclass(frozen=True, slots=True)
class SwitchedObserver:
    """Passes on what ends only while the switch is on."""

    switch: Switch
    observers: Sequence[Observer]

    def ended(self, record: CallRecord) -> None:
        if self.switch.is_on:
            for observer in self.observers:
                observer.ended(record)


async def serve(args: argparse.Namespace) -> None:
    """Until SIGTERM; the ports are a line of JSON."""
    base, store, switch = resolve_base(args.model), open_store(args.store), Switch()
    logs.set_up(logs.JSON, "info")
    config = ServeConfig(
        engine=EngineConfig(base_path=str(base.path), base_digest=base.digest, device=args.device, log_level="warning"),
        base_name=base.name,
        store=store.location,
        port=0,
        metrics_port=0,
        grace=0.0,
        otlp_endpoint=args.collector,
    )
    metrics = Switched(switch)
    frontend = Frontend(config, base, AdapterRegistry(store, base.digest), metrics)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, switch.set, True)
    loop.add_signal_handler(signal.SIGUSR2, switch.set, False)

    def announce(port: int, metrics_port: int) -> None:
        print(json.dumps({"port": port, "metrics_port": metrics_port}), flush=True)

    async with observing(config, {}) as observers:
        heard = (SwitchedObserver(switch, observers),)
        await run(config, base, frontend, frontend.catalog, metrics, heard, on_started=announce)


if __name__ == "__main__":
    main()
