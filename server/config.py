"""Every setting, as frozen dataclasses. Read once at the edge (`server.cli`); modules below take plain values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of the engine process; travels to it as JSON. None means: choose from the device and the model.

    Bytes are bytes, lengths are tokens. `device` is "cpu", "cuda" or "cuda:N"; `dtype` one of "auto" (the
    checkpoint's), "float32", "bfloat16", "float16". `max_batch_tokens` bounds the tokens of one step, and
    so how long a long prompt can hold up the others; `max_waiting` bounds the queue. `adapter_cache_bytes` are for
    adapters on the device, `host_adapter_bytes` (0: none) for those that leave it, ready to come back without a file.
    `canary` compares each adapter, when it first comes, with a plain computation from its files.
    `quantization` is how to hold the base's linear layers: None as the checkpoint has them, "none" likewise (and it
    must not be quantized), "nf4" or "fp4": in blocks of `quantization_block` weights, whose absmax are quantized too
    with `double_quantization`, and without the modules `keep_16bit`.
    `compensates_merged`: while an adapter is merged into the base, requests for others are served, by taking it off
    again in a low-rank term, rather than refused. `log_format` is "human" or "json", `log_level` "debug", "info",
    "warning" or "error"; both processes log so.
    """

    base_path: str
    base_digest: str
    device: str = "cpu"
    dtype: str = "auto"
    quantization: str | None = None
    quantization_block: int = 64
    double_quantization: bool = True
    keep_16bit: tuple[str, ...] = ("lm_head",)
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batch_tokens: int | None = None
    max_waiting: int = 256
    page_size: int = 16
    kv_cache_bytes: int | None = None
    adapter_cache_bytes: int | None = None
    host_adapter_bytes: int | None = None
    canary: bool = True
    compensates_merged: bool = False
    prefix_caching: bool = True
    num_threads: int | None = None
    log_format: str = "human"
    log_level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of the front end. Times are seconds, ports 0 mean any free port, sizes are bytes. A stream that its
    client does not read for `stall_timeout` is ended. `merge` is an adapter to merge into the base before requests are
    taken, with `merge_force` however far that is from unmerged serving. `log_prompts` puts prompts and answers into the
    log; `otlp_endpoint` is the URL of a collector of traces, None where the environment says which, if any."""

    engine: EngineConfig
    base_name: str
    store: str
    merge: str | None = None
    merge_force: bool = False
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9400
    grace: float = 30.0
    stall_timeout: float = 60.0
    reflection: bool = True
    max_message_bytes: int = 4 * 1024 * 1024
    max_stop_strings: int = 16
    log_prompts: bool = False
    otlp_endpoint: str | None = None
