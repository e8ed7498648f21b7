"""The loss of a causal language model on a batch, through its body and its head separately."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.batches import Batch, Segments
from trainer.crossentropy import summed_cross_entropy
from trainer.errors import TrainingError

CHECK_TOKENS = 16
PACKING_TOLERANCE = {True: 1e-3, False: 0.05}  # of the norm, by whether all is in fp32
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class CausalLoss(nn.Module):
    """Summed cross entropy of `causal_lm` (a transformers model, with or without PEFT's layers inside).

    Its forward pass is taken apart: the body runs on all tokens, the head on those places alone that predict a learned
    one. What a head does besides a linear layer is known from the config; `check` finds out if that was not all.
    A module, so that what gathers sharded weights has one to hold on to.
    """

    def __init__(
        self, causal_lm: Any, fused: Callable[[Tensor, Tensor | None, Segments | None], Tensor] | None = None
    ) -> None:
        """`fused` computes the body's last hidden states in its place. Raises TrainingError for a model without one."""
        super().__init__()
        if causal_lm.base_model is causal_lm:
            raise TrainingError("the base cannot be trained: transformers does not tell its body from its head")
        self.causal_lm = causal_lm
        self._body = causal_lm.base_model
        self._fused = fused
        config = causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies, Granite divides
        self._scale = float(scale) / float(getattr(config, "logits_scaling", None) or 1.0)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.takes_positions = "position_ids" in inspect.signature(self._body.forward).parameters

    def require_positions(self) -> None:
        """Raises TrainingError for a model that cannot tell packed rows apart."""
        if not self.takes_positions:
            raise TrainingError("packing needs a model that takes position_ids, and this base does not; leave it out")

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's targets of their negative log-likelihood in nats, fp32."""
        return self.at(self.hidden(batch.ids, batch.position_ids, batch.segments), batch.places, batch.targets)

    def at(self, hidden: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """The same, of `targets` [learned] that the flattened `places` of `hidden` [rows, length, width] predict."""
        learned = hidden.flatten(0, 1).index_select(0, places)  # [learned, width]
        return summed_cross_entropy(
            learned, self.causal_lm.get_output_embeddings(), targets, self._scale, self._softcap
        )

    def hidden(self, ids: Tensor, position_ids: Tensor | None = None, segments: Segments | None = None) -> Tensor:
        """The body's last hidden states [rows, length, width]."""
        assert position_ids is None or self.takes_positions, "packed rows need a model that takes position_ids"
        if self._fused is not None:
            return self._fused(ids, position_ids, segments)
        options = {} if position_ids is None else {"position_ids": position_ids}
        hidden: Tensor = self._body(input_ids=ids, use_cache=False, **options).last_hidden_state
        return hidden

    @torch.no_grad()
    def check_packing(self, ids: Tensor) -> None:
        """Put `ids` [tokens] beside themselves: both have to come out the same. Raises TrainingError if they do not, as
        of a model that hands a state on from token to token, or takes `position_ids` for something else."""
        self.require_positions()
        ids = ids[:CHECK_TOKENS]
        position_ids = torch.arange(len(ids), device=ids.device).repeat(2).unsqueeze(0)
        hidden = self.hidden(ids.repeat(2).unsqueeze(0), position_ids)
        one, other = hidden[0].float().chunk(2)
        exact = hidden.dtype is torch.float32 and not torch.is_autocast_enabled(ids.device.type)
        if not (other - one).norm() <= PACKING_TOLERANCE[exact] * one.norm():
            raise TrainingError(
                "packing needs a model that keeps packed rows apart, and this base does not; leave it out"
            )

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Compare with the model's own loss on a few of `ids` [tokens]. Raises TrainingError if they differ."""
        ids = ids[:CHECK_TOKENS].unsqueeze(0)
        if ids.shape[1] < 2 or self.causal_lm.get_output_embeddings() is None:
            return
        logits = self.causal_lm(input_ids=ids, use_cache=False).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="mean")
        places = torch.arange(ids.shape[1] - 1, device=ids.device)
        ours = self(Batch(ids, None, places, ids[0, 1:], ids.shape[1])) / len(places)
        allowed = CHECK_TOLERANCE[logits.dtype] * max(1.0, float(expected))
        if abs(float(ours) - float(expected)) > allowed:
            raise TrainingError(
                f"the base cannot be trained: its head is more than a linear layer (loss {float(ours):.4f} by that, "
                f"{float(expected):.4f} by its own forward pass)"
            )
