"""What a base, its adapters and its KV cache take of a device's memory: the arithmetic by which the engine sets memory
aside and `lorikeet plan` foretells it. Memory is bytes, lengths are tokens. No torch.

How the base's weights lie is `server.base.weights`' matter.
"""

from server.base.spec import ModelSpec
from server.errors import ConfigError

GIB = 1 << 30

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Rank rows that are given out together.
ADAPTER_PAGE_ROWS = 4

# Of a GPU: for what captured graphs hold, which is not known before the cache that they read is set aside; and a share
# of all for what the driver and libraries take later.
GRAPHS_BYTES = 1 << 30
SLACK = 0.01


def kv_bytes_per_token(spec: ModelSpec, item_bytes: int) -> int:
    """What one token's K and V take over all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * item_bytes


def num_kv_pages(
    spec: ModelSpec,
    item_bytes: int,
    *,
    page_size: int,
    given: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    available: int,
    on_cpu: bool,
) -> int:
    """Pages of the KV cache: of the memory that is `given`, or else as many as `max_num_seqs` sequences of the longest
    kind can fill, of what is available (of an eighth on a CPU). Raises ConfigError where that is not one."""
    per_token = kv_bytes_per_token(spec, item_bytes)
    budget = given
    if budget is None:
        longest = (max_model_len or spec.max_position) * max_num_seqs * per_token
        budget = min(longest, available // 8 if on_cpu else available)
    page_bytes = per_token * page_size
    num_pages = budget // page_bytes
    if num_pages < 1:
        raise ConfigError(f"a KV cache of {budget} bytes holds no page of {page_bytes} bytes; raise --kv-cache-memory")
    return num_pages


def adapter_row_bytes(spec: ModelSpec, item_bytes: int) -> int:
    """One rank row: a row of A and the matching column of B of every linear layer."""
    return item_bytes * sum(out_features + in_features for out_features, in_features in spec.linears().values())


def adapter_rows(rank: int) -> int:
    """Rank rows that an adapter takes: whole pages."""
    return -(-rank // ADAPTER_PAGE_ROWS) * ADAPTER_PAGE_ROWS


def num_adapter_rows(num_bytes: int, row_bytes: int) -> int:
    """Rank rows that so much memory is set aside for: whole pages."""
    return num_bytes // (row_bytes * ADAPTER_PAGE_ROWS) * ADAPTER_PAGE_ROWS


def adapter_budget(given: int | None, available: int, on_cpu: bool) -> int:
    """Memory for adapters on the device: what is `given`, else a tenth of what is available, on a CPU 1 GiB at most."""
    if given is not None:
        return given
    return min(available // 10, GIB) if on_cpu else available // 10


def host_adapter_budget(given: int | None, available: int, on_cpu: bool) -> int:
    """Host memory for adapters that left the device. On a CPU that is the same memory: what is kept twice there only
    saves reading and checking."""
    if given is not None:
        return given
    return min(available // 40, GIB // 4) if on_cpu else min(available // 8, 16 * GIB)


def batch_tokens(given: int | None, max_num_seqs: int, on_cpu: bool) -> int:
    """Most tokens of one step. Raises ConfigError where a running sequence would have none."""
    most = given or max(256 if on_cpu else 4096, max_num_seqs)
    if most < max_num_seqs:
        raise ConfigError(
            f"--max-batch-tokens {most} is less than --max-num-seqs {max_num_seqs}: "
            "a step must have room for a token of every running sequence"
        )
    return most
