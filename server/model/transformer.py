"""One decoder-only forward pass for every supported family, driven by `ModelSpec`."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from server.base.spec import ModelSpec
from server.kernels import (
    Linear,
    PackedLinear,
    add_rms_norm,
    linear_silu_mul,
    rms_norm,
    rope_and_store,
    rope_table,
)
from server.lora.batch import LowRankTerm
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; q/k/v and gate/up are one product each. Norms are [h], those of query and key heads [d]."""

    input_norm: Tensor
    qkv: Linear
    qk_norms: tuple[Tensor, Tensor] | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """embedding [vocab, h], the layers, the last norm [h] and the output head."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear

    @property
    def num_bytes(self) -> int:
        total = _tensor_bytes(self.embedding) + _tensor_bytes(self.norm)
        if not (isinstance(self.head, PackedLinear) and self.head.weight is self.embedding):  # tied
            total += self.head.num_bytes
        for layer in self.layers:
            total += sum(p.num_bytes for p in (layer.qkv, layer.o, layer.gate_up, layer.down))
            total += sum(_tensor_bytes(t) for t in (layer.input_norm, layer.post_norm, *(layer.qk_norms or ())))
        return total


class Transformer:
    """The base model: weights that only a merge changes, and a forward pass that is given everything else."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, max_position: int) -> None:
        self.spec = spec
        self.weights = weights
        scaling = spec.rope_scaling
        llama3 = None
        if scaling is not None:
            llama3 = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position)
        embedding = weights.embedding
        self._cos, self._sin = rope_table(
            spec.head_dim, max_position, spec.rope_theta, llama3, embedding.dtype, embedding.device
        )

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits [samples, vocab] of the tokens in batch.sample_index, in the model's dtype; K and V are cached."""
        eps = self.spec.rms_eps
        cos = self._cos[batch.positions].unsqueeze(1)  # [n, 1, d]
        sin = self._sin[batch.positions].unsqueeze(1)
        residual = F.embedding(batch.input_ids, self.weights.embedding)
        x = rms_norm(residual, self.weights.layers[0].input_norm, eps)
        for index, layer in enumerate(self.weights.layers):
            x = self._attend(index, layer, x, cos, sin, batch, cache)
            x, residual = add_rms_norm(x, residual, layer.post_norm, eps)
            x = _gate(layer.gate_up, x, batch.lora, index)
            x = _linear(layer.down, x, batch.lora, "down", index)
            last = index + 1 == len(self.weights.layers)
            x, residual = add_rms_norm(
                x, residual, self.weights.norm if last else self.weights.layers[index + 1].input_norm, eps
            )
        if batch.sample_index is not None:
            x = x[batch.sample_index]
        if len(x) == 0:  # of a step that only reads part of a prompt: a 4-bit head would be decoded for it
            return x.new_empty(0, self.spec.vocab_size)
        return self.weights.head(x)

    def _attend(
        self, index: int, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: KVCache
    ) -> Tensor:
        qkv = _linear(layer.qkv, x, batch.lora, "qkv", index)
        k_cache, v_cache = cache.k[index], cache.v[index]
        q = rope_and_store(qkv, layer.qk_norms, self.spec.rms_eps, cos, sin, batch.slots, k_cache, v_cache)
        attended = batch.attention.run(q, k_cache, v_cache)
        return _linear(layer.o, attended.flatten(1), batch.lora, "o", index)


def _linear(weight: Linear, x: Tensor, lora: LowRankTerm | None, group: str, layer: int) -> Tensor:
    y = weight(x)
    if lora is not None:
        lora.add(y, x, group, layer)
    return y


def _gate(gate_up: Linear, x: Tensor, lora: LowRankTerm | None, layer: int) -> Tensor:
    """silu(gate) · up [n, i]; adapters add to gate and up, so they need those by themselves."""
    return linear_silu_mul(gate_up, x) if lora is None else lora.silu_mul(gate_up(x), x, layer)


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
