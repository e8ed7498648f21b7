"""Wires an engine from its settings: the one place that decides sizes and picks backends."""

import importlib.util
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from server.base.hardware import free_host_bytes
from server.base.memory import adapter_budget, batch_tokens, host_adapter_budget, num_kv_pages
from server.base.quantization import stored_quantization, wanted_quantization
from server.base.spec import ModelSpec
from server.config import EngineConfig
from server.engine.adapter_cache import NUM_WORKERS, AdapterCache
from server.engine.canary import Canary
from server.engine.engine import Channel, Engine
from server.engine.merged_serving import MergedServing
from server.engine.merging import BaseMerger
from server.engine.messages import Ready
from server.engine.pages import PageManager
from server.engine.runner import DecodeGraphs, Runner
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.warm_up import warm_up
from server.errors import BaseModelError, ConfigError
from server.lora.pace import Pace
from server.lora.pool import AdapterPool
from server.lora.weights import AdapterLoader, Identity
from server.model.attention import AttentionBackend, TorchAttention
from server.model.kv_cache import KVCache
from server.model.loader import DTYPES, load_weights
from server.model.transformer import Transformer

log = logging.getLogger(__name__)

LOADER_NICENESS = 19


def build_engine(
    config: EngineConfig, channel: Channel, progress: Callable[[str], None] = log.info, overlap: int | None = None
) -> Engine:
    """Load the base and set aside memory. Raises BaseModelError or ConfigError with what to change.

    `overlap` None is 1 on a GPU and 0 on a CPU, where there is no device to wait for.
    """
    device = resolve_device(config.device)
    _make_current(device)
    on_cpu = device.type == "cpu"
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    directory = Path(config.base_path)
    raw = read_config(directory)
    spec = ModelSpec.from_config(raw)
    dtype = resolve_dtype(config.dtype, spec)
    quantization = wanted_quantization(
        raw, config.quantization, config.quantization_block, config.double_quantization, config.keep_16bit
    )
    quant_type = stored_quantization(raw) if quantization is None else quantization.quant_type
    progress(f"loading {directory.name} in {_name(dtype)}{f' and {quant_type}' if quant_type else ''} on {device}")
    max_batch_tokens = batch_tokens(config.max_batch_tokens, config.max_num_seqs, on_cpu)
    captures = _has_flashinfer(device, dtype)
    counted: Callable[[], AbstractContextManager[None]] = nullcontext
    if captures:
        from server.engine.device_memory import DeviceMemory, worst_step_bytes

        device_memory = DeviceMemory(device)
        counted = device_memory.counted
    with counted():
        weights = load_weights(directory, spec, dtype, device, quantization)
    available = _available_bytes(device)
    with counted():
        pool = AdapterPool(spec, adapter_budget(config.adapter_cache_bytes, available, on_cpu), dtype, device)
    max_model_len = min(config.max_model_len or spec.max_position, spec.max_position)
    model = Transformer(spec, weights, max_model_len)
    if captures:
        progress("compiling or loading the prefill kernels")
        worst = worst_step_bytes(model, pool, config.page_size, max_model_len, max_batch_tokens, config.max_num_seqs)
        available = device_memory.left_for_kv(worst)
    elif device.type == "cuda":
        available = available * 4 // 5
    num_pages = num_kv_pages(
        spec,
        dtype.itemsize,
        page_size=config.page_size,
        given=config.kv_cache_bytes,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        available=available,
        on_cpu=on_cpu,
    )
    max_model_len = min(max_model_len, num_pages * config.page_size)
    # Where decodes are captured, one page more than there are to give out: padded rows of a batch write there.
    with counted():
        cache = KVCache.allocate(spec, num_pages + int(captures), config.page_size, dtype, device)
    pace = Pace()
    loader = AdapterLoader(spec, dtype, pin=device.type == "cuda", pace=pace)
    adapters = AdapterCache(
        pool,
        lambda adapter: loader.load(Path(adapter.path), Identity(adapter.digest, config.base_digest)),
        prove=Canary(model, pool, max_model_len, pace).check if config.canary else None,
        host_bytes=host_adapter_budget(config.host_adapter_bytes, free_host_bytes(), on_cpu),
        workers=ThreadPoolExecutor(NUM_WORKERS, "adapter-loader", _begin_loading, (device,)),
        wake=channel.wake,
    )
    pages = PageManager(num_pages, config.page_size, config.prefix_caching)
    scheduler = Scheduler(
        pages=pages,
        adapters=adapters,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_waiting=config.max_waiting,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids(directory, raw),
    )
    merged = MergedServing(
        scheduler=scheduler,
        adapters=adapters,
        pool=pool,
        merger=BaseMerger(model, pool, free_host_bytes),
        pace=pace,
        compensates=config.compensates_merged,
    )
    sampler = Sampler(config.max_num_seqs, spec.vocab_size, device)
    attention: AttentionBackend = TorchAttention(spec.softmax_scale, spec.num_kv_heads, config.page_size, device)
    graphs: DecodeGraphs | None = None
    if captures:
        from server.engine import graphs as captured
        from server.model.flashinfer_attention import FlashInferAttention

        progress("compiling or loading the attention kernels")
        attention = FlashInferAttention(spec, config.page_size, num_pages, dtype, device)
        graphs = captured.DecodeGraphs(model, cache, attention, sampler, pool, config.max_num_seqs, progress)
    if device.type == "cuda":
        progress("compiling or loading the kernels of mixed steps")
        most = min(max_batch_tokens, num_pages * config.page_size)
        warm_up(model, cache, attention, pool, most, config.max_num_seqs)
    elif pool.num_rows:
        from server.lora.cpu_batch import warm_up as warm_up_low_rank

        progress("compiling or loading the low-rank kernel")
        warm_up_low_rank(pool)
    runner = Runner(
        model=model,
        cache=cache,
        attention=attention,
        sampler=sampler,
        pool=pool,
        rows_of=merged.rows_of,
        graphs=graphs,
    )
    ready = Ready(
        device=str(device),
        dtype=_name(dtype),
        quantization=quant_type or "",
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        page_size=config.page_size,
        num_pages=num_pages,
    )
    memory = {"weights": weights.num_bytes, "adapters": pool.num_rows * pool.row_bytes, "kv": cache.num_bytes}
    if captures:
        memory = device_memory.by_kind(memory)
    return Engine(
        scheduler=scheduler,
        pages=pages,
        runner=runner,
        adapters=adapters,
        merged=merged,
        channel=channel,
        ready=ready,
        memory=memory,
        pace=pace,
        overlap=overlap if overlap is not None else int(device.type != "cpu"),
    )


def _has_flashinfer(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashInfer runs here: a GPU, 16 bits, and the `cuda` extra installed."""
    if device.type != "cuda" or dtype is torch.float32:
        return False
    if importlib.util.find_spec("flashinfer") is None:
        log.warning("flashinfer is not installed: decoding will be several times slower; pip install 'lorikeet[cuda]'")
        return False
    return True


def resolve_device(name: str) -> torch.device:
    """A torch device; "auto" is the first GPU where there is one. Raises ConfigError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str, spec: ModelSpec) -> torch.dtype:
    """The compute dtype; "auto" is the checkpoint's."""
    wanted = spec.dtype if name == "auto" else name
    if wanted not in DTYPES:
        raise ConfigError(f"dtype {wanted!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[wanted]


def eos_token_ids(directory: Path, config: dict[str, object]) -> frozenset[int]:
    """What ends a sequence: generation_config.json's eos_token_id (one or several) and config.json's."""
    found = [config.get("eos_token_id")]
    generation = directory / "generation_config.json"
    if generation.exists():
        found.append(json.loads(generation.read_text()).get("eos_token_id"))
    ids: set[int] = set()
    for value in found:
        ids.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    return frozenset(ids)


def read_config(directory: Path) -> dict[str, object]:
    try:
        config: dict[str, object] = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{directory / 'config.json'}: cannot be read ({error})") from error
    return config


def _make_current(device: torch.device) -> None:
    """For this thread: streams, events and kernels are those of its current GPU wherever no tensor says another."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _begin_loading(device: torch.device) -> None:
    """In a loader's thread: one core, and the step loop's threads before it. Threads that have run torch keep their own
    number of cores."""
    _make_current(device)
    torch.set_num_threads(1)
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICENESS)


def _available_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return free_host_bytes()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
