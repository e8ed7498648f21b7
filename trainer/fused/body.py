"""The body of a causal language model, from ids to its last hidden states, on fused layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.batches import Segments
from trainer.fused.layer import Layer, Norm, Places, run_layer, run_norm
from trainer.fused.projection import refresh


class FusedBody:
    """`layers` between the embedding and the norm of `body`, a transformers model."""

    def __init__(self, body: Any, layers: Sequence[Layer], norm: Norm) -> None:
        self._body = body
        self.layers = layers
        self.norm = norm
        self._copies = [copy for layer in layers for group in layer.groups for copy in group.copies()]

    def __call__(self, ids: Tensor, position_ids: Tensor | None = None, segments: Segments | None = None) -> Tensor:
        """ids [rows, length] → [rows, length, h]. `position_ids` of packed rows begin at 0 with every example;
        `segments` say the same, and without them the device is asked and waited for."""
        x, places = self.begin(ids, position_ids, segments)
        for layer, module in zip(self.layers, self._body.layers, strict=True):
            x = run_layer(x, layer, places, checkpointing=module.gradient_checkpointing)
        return run_norm(x, self.norm).view(*ids.shape, -1)

    def begin(
        self, ids: Tensor, position_ids: Tensor | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, Places]:
        """What the first layer gets [n, h], and where its tokens are. LoRA's weights are taken as they are now."""
        refresh(self._copies)
        rows, length = ids.shape
        x: Tensor = self._body.embed_tokens(ids)  # [rows, length, h]
        positions = torch.arange(length, device=ids.device).unsqueeze(0) if position_ids is None else position_ids
        cos, sin = (table.flatten(0, 1).contiguous() for table in self._body.rotary_emb(x, position_ids=positions))
        if segments is None and position_ids is not None:
            segments = Segments.of(position_ids)
        return x.flatten(0, 1), Places(cos, sin, rows, length, segments)
