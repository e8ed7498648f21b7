"""How the base's weights lie on a device, by their shapes alone, and what they take there.

The engine's kernels choose by `fits_cpu_operator` and `fits_hopper`; `weight_bytes` is what the engine then holds: a
test compares it with what the engine says. Sizes are bytes, shapes [out, in]. No torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from server.base.memory import ITEM_BYTES
from server.base.quantization import BLOCK_SIZES, HEAD, QUANT_TYPES, Quantization, stored_quantization
from server.base.spec import ModelSpec
from server.errors import BaseModelError

# Double quantization: absmax that share one of their own.
NESTED_BLOCK_SIZE = 256

# bitsandbytes' operator for AVX512-BF16: output features that its layout interleaves.
CPU_ROW_GROUP = 32

# Our kernels for Hopper: the block of their scales, the input features that a warp reads at a time, and counters.
HOPPER_BLOCK_SIZE = 64
HOPPER_GROUP = 256
HOPPER_COUNTERS = 4096

_TABLE_ITEMS = 16  # values that 4 bits stand for
_NESTED_TABLE_ITEMS = 256

Shape = tuple[int, int]


def fits_cpu_operator(shapes: Sequence[Shape], block_size: int) -> bool:
    """Whether the operator for AVX512-BF16 takes 4-bit weights of these shapes as one."""
    return all(out % CPU_ROW_GROUP == 0 and features % block_size == 0 for out, features in shapes)


def fits_hopper(out_features: int, in_features: int, block_size: int) -> bool:
    """Whether the kernels for Hopper take a 4-bit weight of this shape."""
    return block_size == HOPPER_BLOCK_SIZE and out_features % 16 == 0 and in_features % HOPPER_GROUP == 0


@dataclass(frozen=True, slots=True)
class Device:
    """What decides how weights lie. `reordered` are the dtypes whose dense weights a CPU holds in oneDNN's layout: of
    an embedding that is the head, too, it then holds both. `has_bf16_dot`: it has AVX512-BF16. A CPU that has no
    AVX-512 at all, and so decodes 4 bits slowly, holds them decoded."""

    kind: str  # "cpu" or "cuda"
    reordered: frozenset[str] = frozenset()
    has_avx512: bool = False
    has_bf16_dot: bool = False
    is_hopper: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"


def this_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Device:
    """The CPU of this machine, as torch and bitsandbytes see it on x86-64 (a test compares)."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    has_avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    reordered = {"bfloat16"} if has_avx512 else set()
    reordered |= {"float16"} if "avx512_fp16" in flags else set()
    return Device("cpu", frozenset(reordered), has_avx512, has_bf16_dot="avx512_bf16" in flags)


@dataclass(frozen=True, slots=True)
class FourBits:
    """How a module's weight is held in 4 bits."""

    block_size: int
    double: bool

    def scale_bytes(self, shape: Shape) -> int:
        """The absmax of its blocks, in float32; with double quantization 8 bits, their own absmax, table and mean."""
        blocks = -(-shape[0] * shape[1] // self.block_size)
        if not self.double:
            return 4 * blocks
        return blocks + 4 * (-(-blocks // NESTED_BLOCK_SIZE) + _NESTED_TABLE_ITEMS + 1)


Formats = Mapping[str, FourBits]


def wanted_formats(spec: ModelSpec, quantization: Quantization | None) -> Formats:
    """Module path → its format, of those that are quantized while they are loaded. Raises ConfigError for a name that
    `quantization` keeps and the base has not."""
    if quantization is None:
        return {}
    paths = [*spec.linears(), HEAD]
    quantization.check_keep(paths)
    four_bits = FourBits(quantization.block_size, quantization.double)
    return {path: four_bits for path in paths if not quantization.keeps(path)}


def stored_formats(
    spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None
) -> Formats:
    """As the checkpoint holds them: by its `tensors`, name → (dtype, shape) of the safetensors headers, or without them
    (None) as its config says, in blocks of 64. Raises BaseModelError where those lack one."""
    if (quant_type := stored_quantization(config)) is None:
        return {}
    shapes = {**spec.linears(), HEAD: (spec.vocab_size, spec.hidden_size)}
    if tensors is None:
        section = config["quantization_config"]
        keep = tuple(section.get("llm_int8_skip_modules") or (HEAD,))
        double = bool(section.get("bnb_4bit_use_double_quant", False))
        said = Quantization(quant_type, double=double, keep=keep)
        return {path: FourBits(said.block_size, double) for path in shapes if not said.keeps(path)}
    found = {}
    for path, (out, features) in shapes.items():
        if any(f"{path}.weight.quant_state.bitsandbytes__{kind}" in tensors for kind in QUANT_TYPES):
            if (absmax := f"{path}.weight.absmax") not in tensors:
                raise BaseModelError(f"the checkpoint has no tensor {absmax}")
            dtype, shape = tensors[absmax]
            blocks = math.prod(shape)
            size = next((size for size in BLOCK_SIZES if -(-out * features // size) == blocks), BLOCK_SIZES[-1])
            found[path] = FourBits(size, double=dtype == "U8")
    return found


def weight_bytes(spec: ModelSpec, dtype: str, formats: Formats, device: Device) -> int:
    """What the engine holds of the base's weights on the device, in `dtype` where not in 4 bits."""
    item, hidden = ITEM_BYTES[dtype], spec.hidden_size
    embedding = spec.vocab_size * hidden * item
    norms = hidden + spec.num_layers * (2 * hidden + (2 * spec.head_dim if spec.qk_norm else 0))
    if not spec.tied_embeddings:
        head = _product(((HEAD, (spec.vocab_size, hidden)),), dtype, formats, device, bias=False)
    else:
        head = embedding if dtype in device.reordered else 0
    return (
        embedding + norms * item + head + sum(_layer(spec, i, dtype, formats, device) for i in range(spec.num_layers))
    )


def _layer(spec: ModelSpec, index: int, dtype: str, formats: Formats, device: Device) -> int:
    """The four products of a layer, as the loader fuses them."""
    prefix = f"model.layers.{index}"
    shapes = {path: shape for path, shape in spec.linears().items() if path.startswith(f"{prefix}.")}
    products = (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), spec.qkv_bias),
        (("self_attn.o_proj",), spec.o_bias),
        (("mlp.gate_proj", "mlp.up_proj"), spec.mlp_bias),
        (("mlp.down_proj",), spec.mlp_bias),
    )
    return sum(
        _product(
            [(f"{prefix}.{name}", shapes[f"{prefix}.{name}"]) for name in names], dtype, formats, device, bias=bias
        )
        for names, bias in products
    )


def _product(modules: Sequence[tuple[str, Shape]], dtype: str, formats: Formats, device: Device, *, bias: bool) -> int:
    """Modules that are one product; neighbours of one kind lie as one."""
    total = sum(shape[0] for _, shape in modules) * ITEM_BYTES[dtype] if bias else 0
    for is_quantized, group in groupby(modules, lambda module: module[0] in formats):
        part = list(group)
        if is_quantized:
            total += _four_bits([shape for _, shape in part], [formats[path] for path, _ in part], dtype, device)
        else:
            total += sum(out * features for _, (out, features) in part) * ITEM_BYTES[dtype]
    return total


def _four_bits(shapes: Sequence[Shape], formats: Sequence[FourBits], dtype: str, device: Device) -> int:
    weights = sum(out * features for out, features in shapes)
    scales = sum(four_bits.scale_bytes(shape) for four_bits, shape in zip(formats, shapes, strict=True))
    size, features = formats[0].block_size, shapes[0][1]
    alike = all(four_bits.block_size == size for four_bits in formats)
    out_features = sum(out for out, _ in shapes)
    if device.has_bf16_dot and dtype == "bfloat16" and alike and fits_cpu_operator(shapes, size):
        scales += 2 * weights // size + 4 * _TABLE_ITEMS  # in the operator's layout, beside what they are made of
    elif device.is_hopper and dtype != "float32" and alike and fits_hopper(out_features, features, size):
        scales = 4 * weights // size + 4 * HOPPER_COUNTERS  # double quantization undone
    elif device.is_cpu and not device.has_avx512:
        return weights * ITEM_BYTES[dtype]
    return weights // 2 + scales
