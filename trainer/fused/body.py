"""The body of a causal language model, from ids to its last hidden states, on fused layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.fused.attention import Segments
from trainer.fused.layer import Layer, Norm, Places, run_layer, run_norm


class FusedBody:
    """`layers` between the embedding and the norm of `body`, a transformers model."""

    def __init__(self, body: Any, layers: Sequence[Layer], norm: Norm) -> None:
        self._body = body
        self._layers = layers
        self._norm = norm

    def __call__(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """ids [rows, length] → [rows, length, h]. `position_ids` of packed rows begin at 0 with every example."""
        rows, length = ids.shape
        x: Tensor = self._body.embed_tokens(ids)  # [rows, length, h]
        positions = torch.arange(length, device=ids.device).unsqueeze(0) if position_ids is None else position_ids
        cos, sin = (table.flatten(0, 1).contiguous() for table in self._body.rotary_emb(x, position_ids=positions))
        segments = None if position_ids is None else Segments.of(position_ids)
        places = Places(cos, sin, rows, length, segments)
        x = x.flatten(0, 1)
        for layer, module in zip(self._layers, self._body.layers, strict=True):
            x = run_layer(x, layer, places, checkpointing=module.gradient_checkpointing)
        return run_norm(x, self._norm).view(rows, length, -1)
