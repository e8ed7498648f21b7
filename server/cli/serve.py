"""`lorikeet serve`: options to config, then the server until it is told to stop."""

import asyncio
from enum import StrEnum
from typing import Annotated

import typer

from server.cli.notify import notify_ready
from server.cli.options import (
    Base,
    Debug,
    DoubleQuantization,
    Json,
    KeepIn16Bits,
    QuantizationBlock,
    Store,
    parse_size,
    parse_size_or_none,
    parse_url,
)
from server.cli.output import print_json, print_note

STDERR = 2


class Dtype(StrEnum):
    """What --dtype takes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """What --quantization takes."""

    NF4 = "nf4"
    FP4 = "fp4"
    NONE = "none"


class MergedOthers(StrEnum):
    """What --merged-others takes."""

    REFUSE = "refuse"
    COMPENSATE = "compensate"


class LogFormat(StrEnum):
    """What --log-format takes."""

    HUMAN = "human"
    JSON = "json"


class LogLevel(StrEnum):
    """What --log-level takes."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    base: Base = None,
    store: Store = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. There is no authentication: beyond loopback, put a proxy in front."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 takes any free one.")] = 50051,
    metrics_host: Annotated[str, typer.Option(help="Address of the Prometheus page.")] = "127.0.0.1",
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes any free one.")] = 9400,
    device: Annotated[
        str,
        typer.Option(metavar="auto|cpu|cuda[:N]", help="What the engine runs on; auto takes a GPU if there is one."),
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's.")] = Dtype.AUTO,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Hold the base's linear layers in 4 bits, quantized while loading [as the checkpoint is]."),
    ] = None,
    quantization_block: QuantizationBlock = 64,
    double_quantization: DoubleQuantization = True,
    keep_16bit: KeepIn16Bits = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Longest prompt and output together [the base's own].")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests that run at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Most that wait; past it they are refused.")] = 256,
    max_batch_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Most tokens of one step [chosen from the device].")
    ] = None,
    kv_cache_memory: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Memory for the KV cache, as 2GiB [chosen].")
    ] = None,
    adapter_memory: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Memory for adapters, as 512MiB [chosen].")
    ] = None,
    host_adapter_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size_or_none,
            metavar="SIZE",
            help="Host memory for adapters that left the device; 0 for none [chosen].",
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="Merge this adapter into the base before requests are taken."),
    ] = None,
    merge_force: Annotated[
        bool, typer.Option("--merge-force", help="Merge it however far that is from unmerged serving.")
    ] = False,
    merged_others: Annotated[
        MergedOthers,
        typer.Option(help="While an adapter is merged: refuse requests for others, or take it off again for them."),
    ] = MergedOthers.REFUSE,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine [all cores].")] = None,
    grace: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="On SIGTERM or Ctrl-C, how long running requests may finish."),
    ] = 30.0,
    no_canary: Annotated[
        bool,
        typer.Option("--no-canary", help="Serve adapters without first comparing each with a plain computation."),
    ] = False,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Do not keep KV pages of earlier prompts.")
    ] = False,
    no_reflection: Annotated[bool, typer.Option("--no-reflection", help="Do not answer gRPC reflection.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="Log lines for people, or as JSON: one object a line.")
    ] = LogFormat.HUMAN,
    log_level: Annotated[
        LogLevel, typer.Option(help="How much to log on stderr; at info, a line for each request.")
    ] = LogLevel.INFO,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Put prompts and answers into the requests' lines.")
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            parser=parse_url,
            metavar="URL",
            help="Send OpenTelemetry traces to this collector, as http://localhost:4317 [OTEL_EXPORTER_OTLP_ENDPOINT].",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a base model and every adapter in the store, until SIGTERM or Ctrl-C.

    One line says when it is ready, with the ports; with --json that line is an object:
    {"event": "ready", "host": …, "port": …, "metrics_port": …, "base": …, "store": …}.
    """
    from adapters.registry import AdapterRegistry
    from adapters.stores import open_store
    from server import logs
    from server.base.quantization import HEAD
    from server.base.resolve import resolve_base
    from server.config import EngineConfig, ServeConfig
    from server.rpc.listener import address_of
    from server.rpc.server import serve as serve_rpc

    log = logs.BackgroundHandler(STDERR)
    logs.set_up(log_format.value, log_level.value, log)
    adapter_store = open_store(store)
    model = resolve_base(base, print_note)
    config = ServeConfig(
        engine=EngineConfig(
            base_path=str(model.path),
            base_digest=model.digest,
            device=device,
            dtype=dtype.value,
            quantization=None if quantization is None else quantization.value,
            quantization_block=quantization_block,
            double_quantization=double_quantization,
            keep_16bit=tuple(keep_16bit or (HEAD,)),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            kv_cache_bytes=kv_cache_memory,
            adapter_cache_bytes=adapter_memory,
            host_adapter_bytes=host_adapter_memory,
            canary=not no_canary,
            compensates_merged=merged_others is MergedOthers.COMPENSATE,
            prefix_caching=not no_prefix_caching,
            num_threads=threads,
            log_format=log_format.value,
            log_level=log_level.value,
        ),
        base_name=model.name,
        store=adapter_store.location,
        merge=merge,
        merge_force=merge_force,
        host=host,
        port=port,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        grace=grace,
        reflection=not no_reflection,
        log_prompts=log_prompts,
        otlp_endpoint=otlp_endpoint,
    )

    def announce(grpc_port: int, page_port: int) -> None:
        if json:
            ready = {"event": "ready", "host": host, "port": grpc_port, "metrics_port": page_port}
            print_json(ready | {"base": model.name, "store": adapter_store.location})
        else:
            metrics = f"http://{address_of(metrics_host, page_port)}/metrics"
            print(f"ready: {model.name} on {address_of(host, grpc_port)}, metrics on {metrics}", flush=True)
        notify_ready()

    registry = AdapterRegistry(adapter_store, model.digest)
    try:
        asyncio.run(serve_rpc(config, model, registry, on_started=announce, dropped_log_lines=lambda: log.num_dropped))
    finally:
        log.flush()  # before a line that says why it ended: programs read the last one
