"""What is known of an adapter version besides its tensors, as canonical JSON beside them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What an adapter scored through the server's own forward pass before it was published. Losses are nats a learned
    token: `loss` as served, `trainer_loss` by the trainer's forward pass on the same base, `base_loss` without the
    adapter, `quantized_loss` on the base in the format it had while training, where that is another.

    `rows_digest` is of the file of the rows, of which the first `num_rows` were scored; `held_out` whether that is
    another file than was trained on. `exact_match` is the share of answers that were the expected text, None where
    none were made.
    """

    rows_digest: str
    held_out: bool
    num_rows: int
    num_tokens: int
    loss: float
    trainer_loss: float
    base_loss: float
    quantized_loss: float | None = None
    exact_match: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInfo:
    """How the adapter came to be. `method` as the trainer names it ("lora", "qlora"); `base_quantization` the format
    the base had while training ("nf4"), None for none. Digests ("sha256:…") are of the training rows' file, of
    tokenizer.json and of the chat template's text; None where nobody said."""

    method: str
    base_quantization: str | None = None
    hyperparameters: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""
    data_digest: str | None = None
    tokenizer_digest: str | None = None
    template_digest: str | None = None
    scores: Scores | None = None

    @property
    def held_base(self) -> str:
        """How the base's weights were held: "nf4", …, or "none" for 16 or 32 bits."""
        return self.base_quantization or "none"

    def not_finite(self) -> list[str]:
        """The metrics, scores and hyper-parameters that JSON cannot hold: NaN and infinity."""
        numbers = {**self.hyperparameters, **self.metrics, **(asdict(self.scores) if self.scores else {})}
        return [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """A file of a version: the sha256 of its bytes (hex) and how many they are."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReference:
    """A base model that is not at hand."""

    digest: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """An immutable version. `rank` is the largest of `ranks`, the distinct ranks in rising order; `target_modules` the
    distinct layer names ("q_proj"); `dtype` as in safetensors; `created_at` RFC 3339 in UTC; sizes are bytes.

    `base_digest` is the base that it was checked against and is served on; `trained_base` the one it was trained on,
    where that is another and someone insisted."""

    digest: str
    base_digest: str
    base_name: str
    rank: int
    ranks: tuple[int, ...]
    alpha: float
    target_modules: tuple[str, ...]
    dtype: str
    num_parameters: int
    size_bytes: int
    created_at: str
    files: Mapping[str, FileInfo]
    training: TrainingInfo | None = None
    trained_base: BaseReference | None = None
    notes: str = ""


def canonical_json(value: object) -> bytes:
    """Keys sorted, no spaces, UTF-8: equal values give equal bytes."""
    return msgspec.json.encode(value, order="sorted")


def decode_json(raw: bytes, kind: type[T]) -> T:
    """The inverse, checked against the fields' types. Raises ValueError."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def utc_now() -> str:
    """This moment in RFC 3339, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
