"""From settings to what can be trained on: the base found, the data read and encoded. Nothing is loaded yet."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from server.base.quantization import stored_quantization
from server.base.resolve import BaseModel, locate_base, resolve_base
from server.errors import UnsupportedModel
from trainer.batches import Feed
from trainer.data import FORMS, open_source, require_data
from trainer.devices import choose_attention, choose_device, choose_dtype, dtype_name
from trainer.encoding import Counts, Encoder, Example
from trainer.errors import DataError, SettingsError
from trainer.memory import available_memory, needs_checkpointing
from trainer.settings import Settings
from trainer.sharding import needs_sharding

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Base:
    """The base: `served` is what the server knows of it, None for a family that it does not serve."""

    name: str
    path: Path
    served: BaseModel | None

    @property
    def digest(self) -> str | None:
        """As in manifests."""
        return self.served.digest if self.served else None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready to load its model. `examples` are those of the data, of a stream its first window."""

    base: Base
    tokenizer: Any
    encoder: Encoder
    examples: Sequence[Example]
    eval_examples: Sequence[Example]
    counts: Counts
    feed: Feed
    num_steps: int
    device: torch.device
    dtype: torch.dtype
    attention: str
    longest: int
    checkpointing: bool
    sharded: bool

    @property
    def pad_id(self) -> int:
        """What rows are padded with."""
        return self.tokenizer.pad_token_id or 0


def prepare(settings: Settings, note: Note, like: Prepared | None = None, num_devices: int = 1) -> Prepared:
    """Check everything that can be checked before the model is loaded. `like` is another run's of the same base, whose
    base and tokenizer are taken; `num_devices` how many share a step. Raises LorikeetError kinds."""
    check_split(settings, num_devices)
    require_data(settings.data)
    if settings.eval_data:
        require_data(settings.eval_data)
    base = like.base if like else find_base(settings.base, note)
    config = read_config(base.path)
    if kind := stored_quantization(config):
        raise SettingsError(
            f"{base.path}: is in 4 bits ({kind}) already; train on its 16-bit form: --method qlora quantizes it"
        )
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, str(config.get("dtype") or config.get("torch_dtype") or "float32"), device)
    tokenizer = like.tokenizer if like else load_tokenizer(base.path)
    counts = Counts()
    encoder = make_encoder(settings, tokenizer, base.path, config)
    examples, windows = _read(settings, encoder, counts)
    feed = Feed(
        windows,
        batch_size=settings.batch_size,
        pack_to=settings.max_length if settings.packing else None,
        seed=settings.seed,
    )
    eval_examples = encode_rows(Path(settings.eval_data), encoder, Counts()) if settings.eval_data else []
    longest = settings.max_length if settings.packing or settings.streaming else max(map(len, examples))
    if settings.streaming:
        assert settings.max_steps is not None, "streaming has max-steps"
        num_steps = settings.max_steps
    else:
        note(str(counts))
        num_steps = feed.num_steps(examples) * settings.epochs
        num_steps = min(num_steps, settings.max_steps or num_steps)
    attention = choose_attention(longest, device)
    available = available_memory(device)
    sharded = needs_sharding(base.path, settings, num_devices, available)
    own = replace(settings, batch_size=settings.batch_size // num_devices)
    num_shards = num_devices if sharded else 1
    checkpointing = needs_checkpointing(base.path, own, config, longest, dtype, device, available, num_shards)
    if checkpointing and settings.gradient_checkpointing == "auto":
        note("gradient checkpointing is on: a step would not fit into the memory without it")
    return Prepared(
        base=base,
        tokenizer=tokenizer,
        encoder=encoder,
        examples=examples,
        eval_examples=eval_examples,
        counts=counts,
        feed=feed,
        num_steps=num_steps,
        device=device,
        dtype=dtype,
        attention=attention,
        longest=longest,
        checkpointing=checkpointing,
        sharded=sharded,
    )


def check_split(settings: Settings, num_devices: int) -> None:
    """Raises SettingsError if devices could not have as many rows of a step each."""
    if settings.batch_size % num_devices:
        raise SettingsError(
            f"batch-size {settings.batch_size} cannot be split over {num_devices} devices; take a multiple of that"
        )


def find_base(base: str | None, note: Note) -> Base:
    """The base, known to the server or not. Raises BaseModelError."""
    try:
        served = resolve_base(base, note)
    except UnsupportedModel as error:
        note(f"this base can be trained, not served: {error.message}")
        name, path = locate_base(base, note)
        return Base(name, path, None)
    return Base(served.name, served.path, served)


def read_config(path: Path) -> dict[str, Any]:
    """The base's config.json. Raises SettingsError."""
    try:
        value: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path / 'config.json'}: cannot be read ({error})") from error
    return value


def make_encoder(settings: Settings, tokenizer: Any, path: Path, config: dict[str, Any]) -> Encoder:
    """The encoder for a base at `path`."""
    limit = config.get("max_position_embeddings") or config.get("n_positions") or settings.max_length  # GPT-2's name
    return Encoder(
        tokenizer,
        read_end_ids(path, tokenizer.eos_token_id),
        min(settings.max_length, limit),
        end_id=tokenizer.eos_token_id,
        completion_only=settings.completion_only,
        too_long=settings.too_long,
    )


def load_tokenizer(path: Path) -> Any:
    """The base's tokenizer. Raises SettingsError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{path}: its tokenizer cannot be loaded ({' '.join(str(error).split())})") from error


def read_end_ids(path: Path, eos_token_id: int | None) -> set[int]:
    """Tokens that end generation: the tokenizer's, and those of config.json and generation_config.json."""
    ends = set() if eos_token_id is None else {eos_token_id}
    for file in (path / "config.json", path / "generation_config.json"):
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends


def provenance(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    """What a run is made from, for its run.json and its adapter's manifest: digests ("sha256:…"), counts, versions."""
    import peft
    import transformers

    base, template = prepared.base, prepared.tokenizer.chat_template
    tokenizer_file = base.path / "tokenizer.json"
    return {
        "base": base.name,
        "base_digest": base.digest,
        "tokenizer_digest": digest_files(tokenizer_file) if tokenizer_file.is_file() else None,
        "template_digest": _digest(template.encode()) if isinstance(template, str) else None,
        "data_digest": digest_files(Path(settings.data)),
        "eval_data_digest": digest_files(Path(settings.eval_data)) if settings.eval_data else None,
        "counts": None
        if settings.streaming
        else {name: getattr(prepared.counts, name) for name in Counts.__dataclass_fields__},
        "num_steps": prepared.num_steps,
        "dtype": dtype_name(prepared.dtype),
        "device": str(prepared.device),
        "attention": prepared.attention,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def digest_files(path: Path) -> str:
    """sha256 of a file's bytes; of a directory, of its files' names and digests."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _digest("".join(f"{file.relative_to(path)} {digest_files(file)}\n" for file in files).encode())
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _read(
    settings: Settings, encoder: Encoder, counts: Counts
) -> tuple[Sequence[Example], Callable[[int], Iterator[Sequence[Example]]]]:
    """The examples, and the windows of an epoch: one that is all of them, or a stream's, as they are asked for."""
    path, size = Path(settings.data), settings.shuffle_buffer
    if not settings.streaming:
        examples = encode_rows(path, encoder, counts)
        return examples, lambda first: iter([examples][first:])

    def windows(first: int) -> Iterator[Sequence[Example]]:
        rows = open_source(path).rows(first * size)
        while part := list(islice(rows, size)):
            yield list(encoder.encode_all(part, counts))

    first = next(filter(None, windows(0)), [])
    if not first:
        raise _nothing(path, counts)
    counts.__init__()  # type: ignore[misc]  # what was read is counted when it is trained on
    return first, windows


def encode_rows(path: Path, encoder: Encoder, counts: Counts, limit: int | None = None) -> list[Example]:
    """The examples of the rows at `path`, the first so many with `limit`. Raises DataError, too if there are none."""
    examples = list(islice(encoder.encode_all(open_source(path).rows(), counts), limit))
    if not examples:
        raise _nothing(path, counts)
    return examples


def _nothing(path: Path, counts: Counts) -> DataError:
    if not counts.rows:
        return DataError(f"{path}: is empty; it needs rows with {FORMS}")
    return DataError(f"{path}: every row is longer than max-length, so all were dropped")
