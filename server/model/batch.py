"""What one forward pass is given: tensors of one step, nothing that outlives it."""

from dataclasses import dataclass

from torch import Tensor

from server.lora.batch import LowRankTerm
from server.model.attention import AttentionPlan


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The n tokens of a step, sequence after sequence; sequences that decode one token come first.

    input_ids, positions  [n] int64
    slots                 [n] int64  where each token's K and V go in the cache
    sample_index          [samples] int64  the tokens whose logits are wanted; None: all
    lora                  None when no token has an adapter: then no LoRA operation runs at all
    """

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    sample_index: Tensor | None
    attention: AttentionPlan
    lora: LowRankTerm | None
