"""The typed messages between the front end and the engine process.

Encoded with msgpack by msgspec and carried by one ZeroMQ PAIR socket over `ipc://`: the front end binds,
the engine connects, one message a frame. Must import neither torch nor protobuf: both processes load it.
"""

from enum import StrEnum

import msgspec

from adapters.errors import InvalidAdapter, LorikeetError


class Serving(StrEnum):
    """How a sequence is served. UNMERGED: the base's weights, and its adapter's low-rank term. MERGED: its adapter is
    in the weights. COMPENSATED: another adapter is, and one more low-rank term takes it off."""

    UNMERGED = "unmerged"
    MERGED = "merged"
    COMPENSATED = "compensated"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one token is drawn. Already range-checked by the front end.

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 filter nothing. The penalties are those of
    transformers (repetition: prompt and output) and OpenAI (presence, frequency: output only). `logprobs`
    None asks for none, n for the drawn token's log-probability and those of the n likeliest. They are
    log-softmax of the raw logits, before penalties and temperature.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None


class StopParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """When the engine ends a sequence. Stop strings are the front end's, as they need text."""

    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


class AdapterRef(msgspec.Struct, frozen=True):
    """An adapter version: its content digest (`sha256:…`) and the directory with its PEFT files."""

    digest: str
    path: str


class ErrorPayload(msgspec.Struct, frozen=True):
    """A LorikeetError on the wire: the fields of its class and instance; `faults` are an InvalidAdapter's."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str] = {}
    retry_after: float | None = None
    faults: list[str] = []

    @classmethod
    def of(cls, error: LorikeetError) -> "ErrorPayload":
        faults = list(error.faults) if isinstance(error, InvalidAdapter) else []
        return cls(error.code, error.reason, error.message, dict(error.metadata), error.retry_after, faults)


# Front end → engine


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Run one sequence. `request_id` is unique among all that the engine has not yet ended."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    stopping: StopParams
    adapter: AdapterRef | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a sequence now (the client left, the deadline passed, a stop string matched). No answer follows."""

    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag="load"):
    """Make an adapter resident ahead of any request; answered by CallDone. `pin`: and keep it on the device until
    UnpinAdapter, or UnloadAdapter, comes."""

    call_id: str
    adapter: AdapterRef
    pin: bool = False


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload"):
    """Drop an adapter from every tier; answered by CallDone. When sequences hold it: ADAPTER_IN_USE, or with `drain`
    it is given to no further one and dropped when the last of them ends."""

    call_id: str
    digest: str
    drain: bool = False


class UnpinAdapter(msgspec.Struct, frozen=True, tag="unpin"):
    """Let an adapter be evicted again; answered by CallDone. One that is not pinned is fine."""

    call_id: str
    digest: str


class MergeAdapter(msgspec.Struct, frozen=True, tag="merge"):
    """Load an adapter and add it to the base's weights once the sequences that are here have ended; those that come
    meanwhile wait. Answered by CallDone with a report. Given up (ADAPTER_MERGE_ABORTED) when they take longer than
    `drain_seconds`. `probe` are tokens on which merged serving is compared with unmerged; `force` merges whatever the
    comparison says. One that is merged is fine."""

    call_id: str
    adapter: AdapterRef
    probe: list[int]
    drain_seconds: float
    force: bool = False


class UnmergeAdapter(msgspec.Struct, frozen=True, tag="unmerge"):
    """Give the base its own weights back, likewise; answered by CallDone. One that is not merged is fine, and a merge
    that has not yet begun to write is given up."""

    call_id: str
    digest: str
    drain_seconds: float


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Exit once the current step is done. The front end has drained what it wanted drained."""


ToEngine = Submit | Cancel | LoadAdapter | UnloadAdapter | UnpinAdapter | MergeAdapter | UnmergeAdapter | Shutdown

# Engine → front end


class TokenLogprob(msgspec.Struct, frozen=True):
    """The drawn token's log-probability, and (token id, log-probability) of the likeliest, in falling order."""

    logprob: float
    top: list[tuple[int, float]] = []


class Timings(msgspec.Struct, frozen=True):
    """Where a sequence's time went, in seconds. `load` is the part of `queue` spent waiting for its adapter."""

    queue: float
    load: float
    prefill: float
    decode: float


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step made for one sequence; the last one has `finish_reason` ("stop" or "length").

    `num_cached` (prompt tokens taken from the prefix cache) comes with the first, `timings` with the first (their
    `decode` is 0) and the last; so does `serving`. When a stop token ended the sequence, it is the last of `token_ids`.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    num_cached: int | None = None
    timings: Timings | None = None
    serving: Serving = Serving.UNMERGED


class StepOutputs(msgspec.Struct, frozen=True, tag="step"):
    """All outputs of one step: one message a step, whatever the batch."""

    outputs: list[Output]


class RequestFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The sequence ended in an error (its adapter was refused, the queue was full)."""

    request_id: str
    error: ErrorPayload


class LayerError(msgspec.Struct, frozen=True):
    """What rounding to the base's format took off one layer's merged weights W + Δ: the norm of the error relative to
    that of W + Δ (`weight`), and to that of Δ (`delta`)."""

    layer: int
    weight: float
    delta: float


class MergeReport(msgspec.Struct, frozen=True):
    """How far merged serving is from unmerged: KL(unmerged ‖ merged) of the next token in nats, the mean and the
    largest over the probe's tokens, and the error in each layer that the adapter changes. `held_bytes` of the base's
    own weights lie in host memory until it is unmerged."""

    kl: float
    largest_kl: float
    layers: list[LayerError]
    held_bytes: int


class CallDone(msgspec.Struct, frozen=True, tag="done"):
    """Answers every call; `error` None is success. `report` is MergeAdapter's."""

    call_id: str
    error: ErrorPayload | None = None
    report: MergeReport | None = None


class CallProgress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a call is, sent when its stage changes: "reading" (file → host), "waiting" (for room on the device),
    "copying" (host → device), "checking" (the canary), "draining" (running sequences hold it), "merging" (the base's
    weights are being written, the one way or the other; sent for each product). Bytes of the stage; 0 of 0 where they
    are not known."""

    call_id: str
    stage: str
    done_bytes: int = 0
    total_bytes: int = 0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine has loaded the base and takes sequences. Limits are in tokens, memory in bytes; `quantization` is
    that of the base's linear layers, "" for none."""

    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    page_size: int
    num_pages: int
    quantization: str = ""


class ResidentAdapter(msgspec.Struct, frozen=True):
    """An adapter in one tier, "host" or "device", and so twice when it is in both. `leases` are the sequences that
    hold it."""

    digest: str
    tier: str
    size_bytes: int
    leases: int
    pinned: bool = False
    merged: bool = False


class AdapterLoad(msgspec.Struct, frozen=True):
    """One move of an adapter: "disk" → "host" (read, checked, packed) or "host" → "device" (copied)."""

    tier_from: str
    tier_to: str
    seconds: float


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """A snapshot, sent about twice a second while anything changes. `memory` is bytes of the engine's device by kind
    (weights, adapters, kv; on a GPU also workspace and runtime); the counters only ever grow.

    Dicts of adapters are by tier ("host", "device"), but `adapter_load_failures`, by the error's reason, and
    `waiting_by_adapter`: sequences by digest, without the base's. `adapter_load_times` are those since the last Stats.
    A hit of a tier is a request whose adapter was there when it came; the adapter of a miss of the device may still be
    a hit of the host. `merge_held_bytes` is host memory that keeps the base's own weights while an adapter is merged,
    `served` counts admitted sequences by Serving. `retry_after` is in how many seconds a request that finds the queue
    full should come again."""

    num_running: int
    num_waiting: int
    pages_used: int
    pages_total: int
    adapters: list[ResidentAdapter]
    memory: dict[str, int]
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    adapter_load_failures: dict[str, int] = {}
    adapter_loads: dict[str, int] = {}
    adapter_hits: dict[str, int] = {}
    adapter_misses: dict[str, int] = {}
    adapter_evictions: dict[str, int] = {}
    adapter_bytes: dict[str, int] = {}
    adapter_load_times: list[AdapterLoad] = []
    merges: int = 0
    unmerges: int = 0
    merge_held_bytes: int = 0
    served: dict[str, int] = {}
    waiting_by_adapter: dict[str, int] = {}
    retry_after: float = 1.0


ToFrontend = StepOutputs | RequestFailed | CallDone | CallProgress | Ready | Stats


_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_frontend: msgspec.msgpack.Decoder[ToFrontend] = msgspec.msgpack.Decoder(ToFrontend)
_encoder = msgspec.msgpack.Encoder()


def encode(message: ToEngine | ToFrontend) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises msgspec.ValidationError for a frame of another shape."""
    message: ToEngine = _to_engine.decode(frame)
    return message


def decode_to_frontend(frame: bytes) -> ToFrontend:
    """Raises msgspec.ValidationError for a frame of another shape."""
    message: ToFrontend = _to_frontend.decode(frame)
    return message
