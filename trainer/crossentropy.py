"""Cross entropy that holds the logits of a few tokens at a time.

Logits of a long batch are the largest tensor of a training step (16k tokens × 128k words in fp32: 8 GiB), and their
gradients as large again. Here each chunk of tokens goes through the head, gives its loss and its part of the gradient,
and is gone before the next: the backward pass has only to hand on what is there. A frozen head gets no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer import kernels

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MiB in fp32
CUDA_CHUNK_ELEMENTS = 1 << 27  # where one kernel does all with them: 256 MiB in 16 bits


def summed_cross_entropy(
    hidden: Tensor, head: torch.nn.Module, targets: Tensor, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """sum over i of -log softmax(softcap(scale * head(hidden[i])))[targets[i]], fp32.

    hidden [tokens, width], targets [tokens] int64. `head` is a linear layer (its weight [words, width], bias optional).
    softcap(x) is softcap * tanh(x / softcap), or x for None. Gradients flow to `hidden`, and to the head's weight and
    bias where they require it.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    result: Tensor = _Chunked.apply(hidden, weight, bias, targets, scale, softcap)  # type: ignore[no-untyped-call]
    return result


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        x, w = (hidden, weight) if dtype is None else (hidden.to(dtype), weight.to(dtype))
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        size = max(1, (CUDA_CHUNK_ELEMENTS if hidden.is_cuda else CHUNK_ELEMENTS) // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                logits = F.linear(x[part], w, None if bias is None else bias.to(w.dtype))  # [chunk, words]
                chunk_loss, d_logits = _loss_and_gradient(logits, targets[part], scale, softcap)
                loss += chunk_loss
                d_logits16 = d_logits.to(w.dtype)
                if d_hidden is not None:
                    d_hidden[part] = d_logits16 @ w
                if d_weight is not None:
                    d_weight += d_logits16.T @ x[part]
                if d_bias is not None:
                    d_bias += d_logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(weight_dtype),
            None if d_bias is None else (d_bias * grad).to(bias_dtype),
            None,
            None,
            None,
        )


def _loss_and_gradient(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The summed loss and its gradient with respect to `logits` [tokens, words], which are overwritten."""
    if logits.is_cuda and softcap is None:
        return kernels.cross_entropy_(logits, targets, scale), logits
    logits = logits.float().mul_(scale)
    if softcap is not None:
        logits = torch.tanh_(logits.div_(softcap)).mul_(softcap)
        slope = 1 - (logits / softcap) ** 2
    index = targets.unsqueeze(1)  # [tokens, 1]
    said = logits.gather(1, index)
    largest = logits.amax(dim=-1, keepdim=True)
    shares = logits.sub_(largest).exp_()  # in place throughout: one chunk of logits is all there is
    total = shares.sum(dim=-1, keepdim=True)
    loss = (total.log() + largest - said).sum()
    gradient = shares.div_(total)
    gradient.scatter_add_(1, index, gradient.new_full((), -1.0).expand_as(index))
    if softcap is not None:
        gradient *= slope
    return loss, gradient.mul_(scale)
