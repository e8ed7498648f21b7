"""What serving takes of a device's memory, before anything is loaded: `lorikeet plan`. No torch.

Weights, adapters and KV cache are what the engine sets aside, by the same arithmetic. What a step, the captured graphs
and CUDA itself take on a GPU the engine measures when it starts; here they are estimates.
"""

from dataclasses import dataclass

from server.base.memory import (
    GRAPHS_BYTES,
    ITEM_BYTES,
    SLACK,
    adapter_budget,
    adapter_row_bytes,
    adapter_rows,
    batch_tokens,
    kv_bytes_per_token,
    num_adapter_rows,
    num_kv_pages,
)
from server.base.spec import ModelSpec
from server.base.weights import Device, Formats, weight_bytes

PAGE_SIZE = 16  # EngineConfig's

# CUDA's context, libraries and kernels on an H200: between 0.5 and 0.9 GiB.
RUNTIME_BYTES = 1 << 30

# Of the sampler, for each logit of a draw that sorts them: values, indices, probabilities, sums.
_SAMPLER_BYTES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be served. `adapters` of `rank` are on the device at once, and `sequences` of `context` tokens, prompt
    and answer together, run at once. None: what `lorikeet serve` would choose by itself."""

    adapters: int | None = None
    rank: int = 16
    sequences: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by kind, as the engine's memory table has them, and what they are made of. `estimated` are kinds that are
    measured when the engine starts."""

    memory: dict[str, int]
    estimated: tuple[str, ...]
    device_bytes: int
    adapter_bytes: int  # of one adapter of the load's rank
    num_adapters: int  # of them
    token_bytes: int  # of KV
    page_bytes: int
    num_pages: int
    max_num_seqs: int
    max_model_len: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def left(self) -> int:
        """Bytes of the device beyond; negative where it does not fit."""
        return self.device_bytes - self.total

    @property
    def kv_tokens(self) -> int:
        return self.num_pages * PAGE_SIZE

    @property
    def settings(self) -> dict[str, int]:
        """Options of `lorikeet serve` by which the engine sets just this aside."""
        return {
            "--max-num-seqs": self.max_num_seqs,
            "--max-model-len": self.max_model_len,
            "--adapter-memory": max(1, self.memory["adapters"]),
            "--kv-cache-memory": self.num_pages * self.page_bytes,
        }


def plan(spec: ModelSpec, dtype: str, formats: Formats, device: Device, device_bytes: int, load: Load) -> Plan:
    """Whether it fits or not."""
    item = ITEM_BYTES[dtype]
    max_num_seqs = load.sequences or 64
    max_model_len = min(load.context or spec.max_position, spec.max_position)
    weights = weight_bytes(spec, dtype, formats, device)
    row_bytes, token_bytes = adapter_row_bytes(spec, item), kv_bytes_per_token(spec, item)
    beside = {} if device.is_cpu else {"workspace": _workspace(spec, item, max_num_seqs), "runtime": RUNTIME_BYTES}
    available = max(0, device_bytes - weights - beside.get("runtime", 0))
    if load.adapters is None:
        num_rows = num_adapter_rows(adapter_budget(None, available, device.is_cpu), row_bytes)
    else:
        num_rows = load.adapters * adapter_rows(load.rank)
    adapters = num_rows * row_bytes
    if load.sequences is None and load.context is None:
        after = available if device.is_cpu else available - adapters - beside["workspace"] - int(SLACK * device_bytes)
        num_pages = num_kv_pages(
            spec,
            item,
            page_size=PAGE_SIZE,
            given=None,
            max_model_len=None,
            max_num_seqs=max_num_seqs,
            available=max(8 * PAGE_SIZE * token_bytes, after),  # a page at least: what is too much shows in the sum
            on_cpu=device.is_cpu,
        )
        max_model_len = min(max_model_len, num_pages * PAGE_SIZE)
    else:
        num_pages = max_num_seqs * -(-max_model_len // PAGE_SIZE)
    # Where decodes are captured there is one page more: padded rows of a batch write there.
    kv = (num_pages + (not device.is_cpu)) * PAGE_SIZE * token_bytes
    return Plan(
        memory={"weights": weights, "adapters": adapters, "kv": kv, **beside},
        estimated=tuple(beside),
        device_bytes=device_bytes,
        adapter_bytes=adapter_rows(load.rank) * row_bytes,
        num_adapters=num_rows // adapter_rows(load.rank),
        token_bytes=token_bytes,
        page_bytes=PAGE_SIZE * token_bytes,
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )


def _workspace(spec: ModelSpec, item: int, max_num_seqs: int) -> int:
    """About what the largest step takes at its peak, and the room that is left for captured graphs."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    token = (3 * spec.hidden_size + max(2 * q + 2 * kv, 3 * spec.intermediate_size)) * item
    logits = max_num_seqs * spec.vocab_size * (item + _SAMPLER_BYTES)
    return batch_tokens(None, max_num_seqs, on_cpu=False) * token + logits + GRAPHS_BYTES


def advice(found: Plan, load: Load, four_bits_save: int) -> list[str]:
    """What would make a plan fit that does not, each by itself; `four_bits_save` is what NF4 would take less (0: the
    base is in 4 bits already)."""
    over = -found.left
    says = []
    tokens = (found.memory["kv"] - over) // found.token_bytes
    pages = tokens // PAGE_SIZE
    if (context := pages // found.max_num_seqs * PAGE_SIZE) > 0:
        says.append(f"lower --context to {context}")
    if (sequences := pages // -(-found.max_model_len // PAGE_SIZE)) > 0 and found.max_num_seqs > 1:
        says.append(f"lower --sequences to {sequences}")
    fewer = (found.memory["adapters"] - over) // found.adapter_bytes
    if fewer > 0 and load.adapters is not None:
        says.append(f"lower --adapters to {fewer}")
    if four_bits_save >= over:
        says.append("hold the base in 4 bits (--quantization nf4)")
    if not says and sum(found.memory.values()) - found.memory["adapters"] - found.memory["kv"] > found.device_bytes:
        says.append("the base by itself is too large: take a smaller one, or a larger device")
    elif not says:
        smaller = ", ".join(["--context", "--sequences", *(["--adapters"] if load.adapters else [])])
        says.append(f"lower {smaller} together, or take a larger device")
    return says
