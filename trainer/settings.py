"""The numbers of a run, checked. No torch here, so that the command line can refuse early."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from trainer.errors import SettingsError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`alpha` None means twice the rank. Lengths are tokens, `warmup` a share of all steps.

    The defaults follow "LoRA Without Regret" (Thinking Machines, 2025): all linear layers, small batches, a
    learning rate well above full fine-tuning's, higher still for short runs as these are.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    learning_rate: float = 1e-3
    epochs: int = 3
    batch_size: int = 8
    max_length: int = 1024
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name.replace('_', '-')} must be at least 1")
        if not 0 < self.learning_rate < 1:
            raise SettingsError("learning rate must be above 0 and below 1")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise SettingsError("alpha must be above 0")
        if not 0 <= self.dropout < 1:
            raise SettingsError("dropout must be at least 0 and below 1")

    @property
    def lora_alpha(self) -> float:
        """The numerator of LoRA's scaling alpha / rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def check_targets(self, linears: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
        """The short names of the layers to train ("q_proj"). Raises SettingsError for one the base does not have."""
        known = sorted({path.rpartition(".")[2] for path in linears})
        if self.target_modules == (ALL_LINEAR,):
            return tuple(known)
        if wrong := [name for name in self.target_modules if name not in known]:
            raise SettingsError(f"target module {wrong[0]!r} is not in the base; known are {', '.join(known)}")
        return tuple(sorted(set(self.target_modules)))

    def as_metadata(self) -> dict[str, str | int | float | bool | None]:
        """For the adapter's manifest."""
        return asdict(self) | {"alpha": self.lora_alpha, "target_modules": ",".join(self.target_modules)}
