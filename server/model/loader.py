"""Weights from safetensors files into the layout of the forward pass, one layer at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.base.spec import ModelSpec
from server.errors import BaseModelError
from server.kernels import PackedLinear, pack_linear
from server.model.transformer import LayerWeights, ModelWeights

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

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in the wanted dtype on the device. Raises BaseModelError when absent or of another shape."""
        if name not in self._files:
            raise BaseModelError(f"{self._directory}: the checkpoint has no tensor {name}")
        path = self._files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(self._directory / path, framework="pt", device=str(self._device))
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"{self._directory / path}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise BaseModelError(
                f"{self._directory / path}: {name} is {list(tensor.shape)}, config.json says {list(shape)}"
            )
        return tensor.to(self._dtype)


def load_weights(directory: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Read a base model. Raises BaseModelError naming the file and tensor that is missing or does not fit."""
    checkpoint = Checkpoint(directory, dtype, device)
    hidden, vocab = spec.hidden_size, spec.vocab_size
    embedding = checkpoint.tensor("model.embed_tokens.weight", (vocab, hidden))
    head = embedding if spec.tied_embeddings else checkpoint.tensor("lm_head.weight", (vocab, hidden))
    return ModelWeights(
        # A copy where the head is repacked: the mapped file would otherwise stay the embedding's storage.
        embedding=embedding.clone(),
        layers=tuple(_load_layer(checkpoint, spec, index) for index in range(spec.num_layers)),
        norm=checkpoint.tensor("model.norm.weight", (hidden,)).clone(),
        head=pack_linear(head),
    )


def _load_layer(checkpoint: Checkpoint, spec: ModelSpec, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}"
    shapes = spec.linears()

    def linear(names: Iterable[str], bias: bool) -> PackedLinear:
        paths = [f"{prefix}.{name}" for name in names]
        weight = torch.cat([checkpoint.tensor(f"{path}.weight", shapes[path]) for path in paths])
        if not bias:
            return pack_linear(weight)
        return pack_linear(weight, torch.cat([checkpoint.tensor(f"{path}.bias", shapes[path][:1]) for path in paths]))

    def norm(name: str, size: int) -> Tensor:
        return checkpoint.tensor(f"{prefix}.{name}.weight", (size,)).clone()

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
