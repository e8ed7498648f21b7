"""Every setting of a run: what `trainer fit` takes as flags and `--config` reads, under the same names.

No torch here, so that the command line can refuse early.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from trainer.errors import SettingsError

ALL_LINEAR = "all-linear"
CONFIG_FILE = "config.yaml"

Method = Literal["lora", "qlora", "full"]
Init = Literal["default", "eva", "olora", "pissa"]
Optimizer = Literal["auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A dataclass field that is also a flag; `help` is what `--help` says of it."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Lengths are tokens, `warmup` and `final_lr` shares. None means: chosen by what `resolved` says.

    The defaults follow "LoRA Without Regret" (Thinking Machines, 2025): all linear layers, small batches, a
    learning rate ten times full fine-tuning's, higher still for short runs as these are.
    """

    data: str = option("", "Rows: JSON lines, or a saved Hugging Face dataset's directory.", "FILE|DIR")
    eval_data: str | None = option(None, "Rows that are only measured, never learned.", "FILE|DIR")
    streaming: bool = option(False, "Read the data while training, never all at once; needs --max-steps.")
    shuffle_buffer: int = option(1024, "Rows that are mixed with each other when streaming.")
    completion_only: bool = option(True, "Learn the assistant's words or the completion only, not the prompt.")
    too_long: Literal["error", "truncate", "drop"] = option("error", "What to do with a row over --max-length.")
    max_length: int = option(1024, "Longest row in tokens; with --packing, what rows are packed to.")
    packing: bool = option(False, "Put several rows, each on its own, into one of --max-length.")

    base: str | None = option(None, "The base model. Without it: SmolLM2-135M-Instruct.", "DIR|HUB_ID")
    method: Method = option("lora", "lora; qlora: the base in 4 bits; full: every weight.")  # noqa: RUF009  (a field)
    quantization: Literal["nf4", "fp4"] = option("nf4", "The 4-bit format of qlora.")
    double_quantization: bool = option(True, "Quantize the 4-bit format's own scales too.")
    rank: int = option(8, "LoRA's rank.")
    alpha: float | None = option(None, "Scaling is alpha / rank [twice the rank].")
    dropout: float = option(0.0, "Dropout before LoRA's A.")
    rslora: bool = option(False, "Scale by alpha / sqrt(rank).")
    lora_plus: float = option(1.0, "LoRA+: how much larger B's learning rate is than A's.")
    init: Init = option("default", "How A and B begin; olora and pissa are turned into a plain LoRA at the end.")  # noqa: RUF009  (a field)
    target_modules: tuple[str, ...] = option(
        (ALL_LINEAR,), f"Layers to train: names (q_proj,v_proj), patterns of their paths, or {ALL_LINEAR}.", "NAME,…"
    )
    rank_pattern: Mapping[str, int] = field(
        default_factory=dict, metadata={"help": "A rank of its own for layers, repeatable.", "metavar": "PATTERN=N"}
    )
    alpha_pattern: Mapping[str, float] = field(
        default_factory=dict, metadata={"help": "An alpha of its own for layers, repeatable.", "metavar": "PATTERN=X"}
    )

    epochs: int = option(3, "Times the data is gone through.")
    max_steps: int | None = option(None, "End after so many steps.")
    batch_size: int = option(8, "Rows of a step.")
    micro_batch: int | None = option(None, "Rows at once; a step adds up the gradients [all that fit].")
    learning_rate: float | None = option(None, "Peak learning rate [0.001; full: 0.0001].")
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "How the learning rate falls.")
    warmup: float = option(0.06, "Share of the steps over which the learning rate rises.")
    final_lr: float = option(0.1, "Share of the peak at which the schedule ends.")
    optimizer: Optimizer = option("auto", "auto: adamw; for qlora on a GPU, paged and in 8 bits.")  # noqa: RUF009  (a field)
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0: they are not.")
    shard: Literal["auto", "on", "off"] = option(
        "auto", "On several devices, split the weights too (FSDP2); auto: for full, and bases that one cannot hold."
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = option("auto", "auto: when memory would not do without.")

    eval_every: int | None = option(None, "Steps between evaluations [an epoch].")
    patience: int | None = option(None, "End after so many evaluations without a better loss.")
    checkpoint_every: int | None = option(None, "Steps between checkpoints [an epoch].")
    keep_checkpoints: int = option(2, "How many of the latest checkpoints stay.")
    trackers: tuple[str, ...] = option(
        (), "Trackers besides metrics.jsonl: tensorboard, or package.module:function.", "NAME,…"
    )

    seed: int = option(0, "The same seed gives the same adapter (on CPU).")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "What is computed in; auto takes the fastest.")
    device: str = option("auto", "Where to train.", "auto|cpu|cuda[:N]")

    name: str | None = option(None, "Publish the adapter under this name when it is trained.")
    label: str = option("latest", "The label that will point at the published version.")
    store: str | None = option(None, "The adapter store. Without it: the user's data directory.", "DIR|S3_URL")

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size", "max_length", "shuffle_buffer", "keep_checkpoints"):
            _at_least_one(name, getattr(self, name))
        for name in ("micro_batch", "max_steps", "eval_every", "patience", "checkpoint_every"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise SettingsError("learning-rate must be above 0 and below 1")
        for name, value in (("alpha", self.alpha), ("lora-plus", self.lora_plus), *self.alpha_pattern.items()):
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f"{name} must be above 0")
        for name, value in self.rank_pattern.items():
            _at_least_one(f"rank-pattern {name}", value)
        for name, value in (("dropout", self.dropout), ("warmup", self.warmup), ("final-lr", self.final_lr)):
            if not 0 <= value < 1 and not (name == "final-lr" and value == 1):
                raise SettingsError(f"{name} must be at least 0 and below 1")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"{_flag(name)} must be at least 0")
        self._check_together()

    def _check_together(self) -> None:
        if not 0 <= self.seed < 1 << 32:  # torch takes 64 bits, of which half are the step's
            raise SettingsError("seed must be at least 0 and below 4294967296")
        if self.streaming and self.max_steps is None:
            raise SettingsError("streaming needs max-steps: how long the data is, is not known before its end")
        if self.patience is not None and self.eval_data is None:
            raise SettingsError("patience needs eval-data")
        if self.init in ("olora", "pissa") and self.method != "lora":
            raise SettingsError(f"init {self.init} takes apart the base's weights, so it needs method lora")
        if self.init != "default" and self.method == "full":
            raise SettingsError(f"init {self.init} is LoRA's; method full has none")
        if self.init in ("olora", "pissa") and self.rslora:
            raise SettingsError(f"init {self.init} and rslora cannot be combined")
        if self.init in ("olora", "pissa") and (self.rank_pattern or self.alpha_pattern):
            raise SettingsError(f"init {self.init} takes one rank and alpha for all layers, no patterns")

    def resolved(self) -> Self:
        """The same with numbers for what depends on other settings: alpha and the learning rate."""
        rate = 1e-4 if self.method == "full" else 1e-3
        return replace(self, alpha=self.lora_alpha, learning_rate=self.learning_rate or rate)

    @property
    def lora_alpha(self) -> float:
        """The numerator of LoRA's scaling."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def base_quantization(self) -> str | None:
        """The format that the base's weights have while training ("nf4"), None for none."""
        return self.quantization if self.method == "qlora" else None

    def as_metadata(self) -> dict[str, str | int | float | bool | None]:
        """What makes the adapter what it is, flat, for its manifest; no paths."""
        local = {"data", "eval_data", "base", "name", "label", "store", "trackers", "device", "shard"}
        values = {name: value for name, value in asdict(self.resolved()).items() if name not in local}
        return {name: _flat(value) for name, value in values.items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "settings") -> Self:
        """From names as the flags have them, with - or _. Raises SettingsError for one unknown or of a wrong type."""
        import msgspec

        known = {f.name for f in fields(cls)}
        given = {str(name).replace("-", "_"): value for name, value in values.items()}
        if unknown := sorted(set(given) - known):
            raise SettingsError(f"{source}: {_flag(unknown[0])!r} is no setting; `trainer fit --help` names them")
        for name in ("target_modules", "trackers"):
            if isinstance(given.get(name), str):
                given[name] = [part.strip() for part in given[name].split(",")]
        try:
            return msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            reason, _, place = str(error).partition(" - at `$.")
            raise SettingsError(f"{source}: {_flag(place.rstrip('`')) or 'a value'}: {reason}") from error

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The mapping in a YAML file, not yet checked. Raises SettingsError."""
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise SettingsError(f"{path}{line}: is not YAML ({getattr(error, 'problem', error)})") from error
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: must be a mapping of settings, as `rank: 8`")
        return values

    def to_yaml(self) -> str:
        """Every setting, in the order above; `read` and `from_mapping` give it back."""
        import yaml

        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise SettingsError(f"{_flag(name)} must be at least 1")


def _flat(value: Any) -> str | int | float | bool | None:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}={value[key]}" for key in sorted(value))
    assert value is None or isinstance(value, (str, int, float, bool)), f"{value!r} is not a plain value"
    return value
