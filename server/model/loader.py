"""Weights from safetensors files into the layout of the forward pass, one layer at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.base.quantization import HEAD, Quantization
from server.base.spec import ModelSpec
from server.errors import BaseModelError
from server.kernels import Linear, QuantizedWeight, pack_four_bit, pack_linear, quantize, side_by_side
from server.model.transformer import LayerWeights, ModelWeights
from server.quantization.stored import STATE, read_quantized, stored_quant_type

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Checkpoint:
    """The tensors of a model directory by name, whichever of its files they are in. Files are memory-mapped."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._files = _weight_map(directory)
        self._open: dict[str, safe_open] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def stored(self, name: str) -> Tensor:
        """The tensor as it is stored, on the device. Raises BaseModelError when it is absent."""
        if name not in self._files:
            raise BaseModelError(f"{self._directory}: the checkpoint has no tensor {name}")
        path = self._files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(self._directory / path, framework="pt", device=str(self._device))
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"{self._directory / path}: {error}") from error
        return tensor.clone() if self._device.type == "cpu" else tensor  # the mapped file would stay its storage

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in the wanted dtype on the device. Raises BaseModelError when absent, of another shape, or
        in 8 bits, which mean nothing without scales."""
        tensor = self.stored(name)
        path = self._directory / self._files[name]
        if tensor.dtype is torch.uint8:
            raise BaseModelError(f"{path}: {name} is quantized, but its {STATE}* is missing")
        if tensor.dtype not in (*DTYPES.values(), torch.float64):
            raise BaseModelError(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, not 16 or 32 bits")
        if tuple(tensor.shape) != shape:
            raise BaseModelError(f"{path}: {name} is {list(tensor.shape)}, config.json says {list(shape)}")
        return tensor.to(self._dtype)

    def linear(self, shapes: Mapping[str, tuple[int, int]], bias: bool, quantization: Quantization | None) -> Linear:
        """The modules `shapes` (path → [out, in]) as one layer. What is stored in 4 bits stays so; `quantization`
        quantizes the others, but those that it keeps. Raises BaseModelError naming the tensor at fault."""
        formats: list[tuple[bool, list[str]]] = []  # neighbours of one format are one product
        for path in shapes:
            quantized = self._is_quantized(path, quantization)
            if not formats or formats[-1][0] != quantized:
                formats.append((quantized, []))
            formats[-1][1].append(path)
        parts: list[Linear] = []
        for quantized, paths in formats:
            biases = [self.tensor(f"{path}.bias", shapes[path][:1]) for path in paths] if bias else None
            joined = None if biases is None else torch.cat(biases)
            if quantized:
                parts.append(
                    pack_four_bit([self._quantized(path, shapes[path], quantization) for path in paths], joined)
                )
            else:
                weights = [self.tensor(f"{path}.weight", shapes[path]) for path in paths]
                parts.append(pack_linear(torch.cat(weights) if len(weights) > 1 else weights[0], joined))
        return side_by_side(parts)

    def _is_quantized(self, path: str, quantization: Quantization | None) -> bool:
        if stored_quant_type(self._files, path) is not None:
            return True
        return quantization is not None and not quantization.keeps(path)

    def _quantized(self, path: str, shape: tuple[int, int], quantization: Quantization | None) -> QuantizedWeight:
        if (quant_type := stored_quant_type(self._files, path)) is not None:
            return read_quantized(self.stored, path, quant_type, shape, self._dtype)
        assert quantization is not None, f"{path} is not to be quantized"
        weight = self.tensor(f"{path}.weight", shape)
        if weight.numel() % 2:
            raise BaseModelError(f"{path}.weight: {list(shape)} is an odd number of weights, which 4 bits cannot hold")
        return quantize(weight, quantization.quant_type, quantization.block_size, quantization.double)


def load_weights(
    directory: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> ModelWeights:
    """Read a base model, and quantize it on the way: no more than one layer is on the device unquantized.

    Raises BaseModelError naming the file and tensor that is missing or does not fit, ConfigError for what
    `quantization` keeps and the model has not.
    """
    checkpoint = Checkpoint(directory, dtype, device)
    hidden, vocab = spec.hidden_size, spec.vocab_size
    if quantization is not None:
        quantization.check_keep([*spec.linears(), HEAD])
    embedding = checkpoint.tensor("model.embed_tokens.weight", (vocab, hidden))
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_load_layer(checkpoint, spec, index, quantization) for index in range(spec.num_layers)),
        norm=checkpoint.tensor("model.norm.weight", (hidden,)),
        head=(
            pack_linear(embedding)
            if spec.tied_embeddings
            else checkpoint.linear({HEAD: (vocab, hidden)}, False, quantization)
        ),
    )


def _load_layer(checkpoint: Checkpoint, spec: ModelSpec, index: int, quantization: Quantization | None) -> LayerWeights:
    prefix = f"model.layers.{index}"
    shapes = spec.linears()

    def linear(names: Iterable[str], bias: bool) -> Linear:
        paths = [f"{prefix}.{name}" for name in names]
        return checkpoint.linear({path: shapes[path] for path in paths}, bias, quantization)

    def norm(name: str, size: int) -> Tensor:
        return checkpoint.tensor(f"{prefix}.{name}.weight", (size,))

    return LayerWeights(
        input_norm=norm("input_layernorm", spec.hidden_size),
        qkv=linear(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), spec.qkv_bias),
        qk_norms=(
            (norm("self_attn.q_norm", spec.head_dim), norm("self_attn.k_norm", spec.head_dim)) if spec.qk_norm else None
        ),
        o=linear(("self_attn.o_proj",), spec.o_bias),
        post_norm=norm("post_attention_layernorm", spec.hidden_size),
        gate_up=linear(("mlp.gate_proj", "mlp.up_proj"), spec.mlp_bias),
        down=linear(("mlp.down_proj",), spec.mlp_bias),
    )


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name → file name, from the index of a sharded checkpoint or the one file's header."""
    index = directory / "model.safetensors.index.json"
    try:
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return weight_map
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            return dict.fromkeys(file.keys(), "model.safetensors")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise BaseModelError(f"{directory}: cannot read the weights ({error}); expected model.safetensors") from error
