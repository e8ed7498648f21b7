"""A linear layer whose weight is laid out once, at load, for the device it runs on."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """y = x Wᵀ + bias. `weight` is [out, in], in oneDNN's blocked layout when `blocked`."""

    weight: Tensor
    bias: Tensor | None
    out_features: int
    blocked: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        if self.blocked:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() * self.weight.element_size() + bias


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Prepare weight [out, in] (and bias [out]).

    On a CPU with 16-bit dot products, `F.linear` reorders the weight at every call; oneDNN's reordered form,
    the one torch.compile's inductor uses, is made once here. Elsewhere the weight is kept as it is.
    """
    blocked = weight.device.type == "cpu" and _onednn_supports(weight.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None) if blocked else weight
    return PackedLinear(packed, bias, weight.shape[0], blocked)


def _onednn_supports(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
