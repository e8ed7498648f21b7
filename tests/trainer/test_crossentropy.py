"""The chunked loss against torch's own, and what it never holds."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import crossentropy
from trainer.crossentropy import summed_cross_entropy

TOKENS, WIDTH, WORDS, CHUNK = 37, 8, 90, 10


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossentropy, "CHUNK_ELEMENTS", CHUNK * WORDS)


def inputs(bias: bool) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    return hidden, nn.Linear(WIDTH, WORDS, bias=bias), torch.randint(0, WORDS, (TOKENS,))


@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(False, 1.0, None), (True, 1.0, None), (False, 0.25, None), (True, 2.0, 3.0)]
)
def test_loss_and_gradients_are_torchs(bias: bool, scale: float, softcap: float | None) -> None:
    hidden, head, targets = inputs(bias)
    (summed_cross_entropy(hidden, head, targets, scale, softcap) / 7).backward()
    found = [hidden.grad, *(p.grad for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    logits = head(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    (F.cross_entropy(logits, targets, reduction="sum") / 7).backward()
    for ours, theirs in zip(found, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(ours, theirs)


class Largest(TorchDispatchMode):
    """Remembers the most elements that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_no_tensor_is_tokens_by_words_and_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets = inputs(bias=True)
    head.requires_grad_(False)
    with Largest() as largest:
        summed_cross_entropy(hidden, head, targets).backward()
    assert largest.elements == CHUNK * WORDS
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_in_bf16_it_is_as_close_as_bf16_is() -> None:
    hidden, head, targets = inputs(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = summed_cross_entropy(hidden, head, targets)
        theirs = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
