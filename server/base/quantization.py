"""How a base model's weights are quantized, as its `config.json` says it or as the one who serves it wants it.

4 bits are NF4 and FP4 of bitsandbytes (Dettmers et al. 2023, QLoRA, arXiv 2305.14314); the numbers are
`server.quantization`'s and `server.kernels.four_bit`'s matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import BaseModelError, ConfigError, UnsupportedModel

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Quantization:
    """Linear layers in 4 bits, in blocks of `block_size` weights; `double` quantizes each block's absmax too. Modules
    that `keep` names, by their path or where it begins or ends, stay in 16 bits: "lm_head", "model.layers.0",
    "down_proj". transformers keeps the head unless told otherwise."""

    quant_type: str
    block_size: int = 64
    double: bool = True
    keep: tuple[str, ...] = (HEAD,)

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ConfigError(f"quantization {self.quant_type!r} is not known; use one of {', '.join(QUANT_TYPES)}")
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"a quantization block of {self.block_size} is not supported; use one of {sizes}")

    def keeps(self, path: str) -> bool:
        """Whether the module stays in 16 bits."""
        dotted = f".{path}."
        return any(dotted.startswith(f".{name}.") or dotted.endswith(f".{name}.") for name in self.keep)

    def check_keep(self, paths: Sequence[str]) -> None:
        """Raises ConfigError for a name that is none of the modules'."""
        for name in self.keep:
            alone = Quantization(self.quant_type, keep=(name,))
            if not any(alone.keeps(path) for path in paths):
                raise ConfigError(f"keep in 16 bits {name!r}: the base has no linear layer of that name")


def stored_quantization(config: Mapping[str, Any]) -> str | None:
    """How config.json says that bitsandbytes has quantized the checkpoint: "nf4", "fp4", or None for not at all.

    Raises UnsupportedModel for any other method. Which layers are quantized, and in which blocks, the tensors say.
    """
    section = config.get("quantization_config")
    if not section:
        return None
    if not isinstance(section, Mapping):
        raise BaseModelError("config.json: quantization_config is not an object")
    method = section.get("quant_method") or ("bitsandbytes" if section.get("load_in_4bit") else "unknown")
    wanted = "supported are 16 and 32 bits, and 4 bits by bitsandbytes (nf4, fp4)"
    if method != "bitsandbytes":
        raise UnsupportedModel(f"the checkpoint is quantized by {method}; {wanted}")
    if not (section.get("load_in_4bit") or section.get("_load_in_4bit")):
        raise UnsupportedModel(f"the checkpoint is quantized by bitsandbytes to 8 bits; {wanted}")
    quant_type = section.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    if quant_type not in QUANT_TYPES:
        raise UnsupportedModel(f"the checkpoint's bnb_4bit_quant_type is {quant_type!r}; {wanted}")
    return str(quant_type)


def wanted_quantization(
    config: Mapping[str, Any], quant_type: str | None, block_size: int, double: bool, keep: Sequence[str]
) -> Quantization | None:
    """How to quantize a checkpoint while it is loaded, None if it is loaded as it is. `quant_type` None: as it is,
    "none": and it must not be quantized. Raises ConfigError where the checkpoint is quantized otherwise."""
    stored = stored_quantization(config)
    if stored is not None:
        if quant_type not in (None, stored):
            raise ConfigError(
                f"--quantization {quant_type}: the base is quantized to {stored} already; "
                "leave the option out, or take the checkpoint that it was made from"
            )
        return None
    if quant_type in (None, "none"):
        return None
    return Quantization(quant_type, block_size, double, tuple(keep))
