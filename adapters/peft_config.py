"""PEFT's `adapter_config.json`: what it asks for, read with PEFT's own meaning, and what is refused by name.

The meaning of the target and pattern keys is that of PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`,
`LoraConfig.__post_init__`). Every key is honoured, known to be without effect on the result, or refused.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.patterns import Pattern, PatternCompiler, UnsafePattern
from adapters.validation import CONFIG_FILE, refuse

ALL_LINEAR = "all-linear"
# Layers that PEFT could adapt and this server does not, by their usual names in the supported families.
EMBEDDINGS = ("lm_head", "model.embed_tokens")

_HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    }
)
# Bookkeeping, training-time settings, and the settings of initialisations (judged by `init_lora_weights`).
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
    }
)
_REFUSED = {
    "use_dora": "DoRA (weight-decomposed adaptation)",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained copies of modules",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of bare parameters",
    "fan_in_fan_out": "transposed weights (Conv1D)",
    "megatron_config": "Megatron's parallel layers",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "Monte Carlo LoRA",
}
# Plain LoRA over the unchanged base, whatever A and B began as.
_PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
_MAX_LAYERS_PATTERNS = 16
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of the config that the computation depends on."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: frozenset[str] | str
    exclude_modules: frozenset[str] | str | None
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]

    def targets(self, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
        """The modules that the config adapts, among `modules` (paths in the base) → (rank, scaling).

        Raises UnsafePattern when matching takes too long.
        """
        patterns = PatternCompiler()
        matches = self._matcher(self.target_modules, patterns)
        excludes = self._matcher(self.exclude_modules or frozenset(), patterns)
        ranks, find_rank = list(self.rank_pattern.values()), patterns.compile_keys(list(self.rank_pattern))
        alphas, find_alpha = list(self.alpha_pattern.values()), patterns.compile_keys(list(self.alpha_pattern))
        found: dict[str, tuple[int, float]] = {}
        for path in modules:
            if excludes(path) or not matches(path) or not self._layer_matches(path):
                continue
            rank = self.rank if (at := find_rank(path)) is None else ranks[at]
            alpha = self.alpha if (at := find_alpha(path)) is None else alphas[at]
            found[path] = (rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)
        return found

    def _matcher(self, wanted: frozenset[str] | str, patterns: PatternCompiler) -> Pattern:
        if isinstance(wanted, str):
            if wanted.lower() == ALL_LINEAR and wanted is self.target_modules:
                return lambda path: path not in EMBEDDINGS
            return patterns.compile(wanted)
        suffixes = tuple(f".{entry}" for entry in wanted)
        return lambda path: path in wanted or path.endswith(suffixes)

    def _layer_matches(self, path: str) -> bool:
        """`layers_to_transform`; a module that target_modules names by its whole path is taken whatever its layer."""
        if self.layers_to_transform is None or path in self.target_modules:
            return True
        for layer in self.layers_pattern or (None,):
            expression = r".*?\.[^.]*\.(\d+)\." if layer is None else rf"(?:^|.*?\.){layer}\.(\d+)\."
            if match := re.match(expression, path):
                return int(match.group(1)) in self.layers_to_transform
        return False


def unsupported_settings(config: Mapping[str, Any]) -> list[str]:
    """What the config asks for that is not honoured, one line each that names the key."""
    faults: list[str] = []
    if (kind := config.get("peft_type")) != "LORA":
        return [f"{CONFIG_FILE}: peft_type {kind!r} is not supported; supported is 'LORA'"]
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        faults.append(f"{CONFIG_FILE}: task_type {task!r} is not supported; supported is 'CAUSAL_LM'")
    if (bias := config.get("bias", "none")) not in (None, "none"):
        faults.append(f"{CONFIG_FILE}: bias {bias!r} is not supported; supported is 'none'")
    for key, value in config.items():
        if key in _REFUSED and (value if key != "alora_invocation_tokens" else value is not None):
            faults.append(f"{CONFIG_FILE}: {key} is not supported: {_REFUSED[key]}")
        elif value and key not in _HONOURED | _HARMLESS | {"bias"} | _REFUSED.keys():
            faults.append(f"{CONFIG_FILE}: {key} is not known here, and {value!r:.60} may change what it computes")
    return faults + _unsupported_init(config.get("init_lora_weights", True))


def _unsupported_init(value: Any) -> list[str]:
    init = str(value).lower()
    if init in _PLAIN_INITS:
        return []
    name = f"{CONFIG_FILE}: init_lora_weights {value!r:.60}"
    if init.startswith(_BASE_CHANGING_INITS):
        cure = "convert it to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        return [f"{name} trains over a changed base, so A and B are wrong over the real one; {cure}"]
    return [f"{name} is not known here; it may need a changed base"]


def parse_settings(config: Mapping[str, Any], max_rank: int) -> LoraSettings | list[str]:
    """The settings, or every fault found, one line each."""
    reader = _Reader(config, max_rank)
    rank = reader.rank("r", config.get("r", 8))
    alpha = reader.number("lora_alpha", config.get("lora_alpha", 8))
    ranks = {key: reader.rank(f"rank_pattern[{key!r}]", value) for key, value in reader.mapping("rank_pattern").items()}
    alphas = {
        key: reader.number(f"alpha_pattern[{key!r}]", value) for key, value in reader.mapping("alpha_pattern").items()
    }
    for key in (*ranks, *alphas):
        reader.pattern("rank_pattern" if key in ranks else "alpha_pattern", key, is_key=True)
    settings = LoraSettings(
        rank=rank,
        alpha=alpha,
        use_rslora=reader.flag("use_rslora"),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=reader.names("target_modules") or frozenset(),
        exclude_modules=reader.names("exclude_modules"),
        layers_to_transform=reader.layers(),
        layers_pattern=reader.layers_pattern(),
    )
    if not settings.target_modules:
        reader.fault("target_modules", "must name the adapted layers: a list of names, a pattern, or 'all-linear'")
    return reader.faults or settings


class _Reader:
    """Reads typed values out of the config and collects what is wrong."""

    def __init__(self, config: Mapping[str, Any], max_rank: int) -> None:
        self._config = config
        self._max_rank = max_rank
        self._patterns = PatternCompiler()
        self.faults: list[str] = []

    def fault(self, key: str, problem: str) -> None:
        self.faults.append(f"{CONFIG_FILE}: {key} {problem}")

    def rank(self, key: str, value: Any) -> int:
        if type(value) is int and 1 <= value <= self._max_rank:
            return value
        self.fault(key, f"is {value!r:.40}; it must be an integer from 1 to {self._max_rank}")
        return 1

    def number(self, key: str, value: Any) -> float:
        if type(value) in (int, float) and abs(value) <= 1e9:
            return float(value)
        self.fault(key, f"is {value!r:.40}; it must be a number")
        return 1.0

    def flag(self, key: str) -> bool:
        value = self._config.get(key)
        if value is not None and type(value) is not bool:
            self.fault(key, f"is {value!r:.40}; it must be true or false")
        return value is True

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._config.get(key) or {}
        if isinstance(value, dict):
            return value
        self.fault(key, "must be an object")
        return {}

    def names(self, key: str) -> frozenset[str] | str | None:
        value = self._config.get(key)
        if isinstance(value, str) and value:
            if value.lower() != ALL_LINEAR or key != "target_modules":
                self.pattern(key, value)
            return value
        if not value:
            return None
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return frozenset(value)
        self.fault(key, "must be a list of names or a pattern")
        return None

    def pattern(self, key: str, expression: str, *, is_key: bool = False) -> None:
        try:
            (self._patterns.compile_keys([expression]) if is_key else self._patterns.compile(expression))
        except UnsafePattern as error:
            self.fault(key, f"has the pattern {expression!r:.80}, but {error}")

    def layers(self) -> frozenset[int] | None:
        value = self._config.get("layers_to_transform")
        if value is not None and isinstance(self._config.get("target_modules"), str):
            self.fault("layers_to_transform", "cannot be used when target_modules is a pattern")
        layers = [value] if type(value) is int else value
        if not layers:
            return None
        if isinstance(layers, list) and all(type(layer) is int for layer in layers):
            return frozenset(layers)
        self.fault("layers_to_transform", "must be an integer or a list of integers")
        return None

    def layers_pattern(self) -> tuple[str, ...]:
        value = self._config.get("layers_pattern")
        if not value:
            return ()
        if self._config.get("layers_to_transform") is None:
            self.fault("layers_pattern", "needs layers_to_transform")
        names = [value] if isinstance(value, str) else value
        if (
            isinstance(names, list)
            and len(names) <= _MAX_LAYERS_PATTERNS
            and all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in names)
        ):
            return tuple(names)
        self.fault(
            "layers_pattern",
            f"must be the plain name of a list of layers, or a list of at most {_MAX_LAYERS_PATTERNS} such names",
        )
        return ()


def canonical_config(config: Mapping[str, Any]) -> bytes:
    """The same config in one spelling, so that equal adapters hash equally.

    PEFT writes its sets of names in an order that changes from run to run. The order within rank_pattern and
    alpha_pattern stays: the first key that matches wins. Raises InvalidAdapter.
    """
    plain = dict(sorted(config.items()))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(names := plain.get(key), list) and all(isinstance(name, str) for name in names):
            plain[key] = sorted(set(names))
    try:
        return json.dumps(plain, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # a number beyond a float; lists in lists in lists
        raise refuse(f"{CONFIG_FILE}: cannot be written again: {error}") from None
