"""The fused layers against transformers' and PEFT's own forward and backward passes, on the CPU by the kernels' plain
definitions."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.batches import Batch
from trainer.fused import FusedBody, fuse
from trainer.loss import CausalLoss
from trainer.memory import checkpoint_layers
from trainer.methods.adapter import add_adapter, choose_targets, linear_layers
from trainer.settings import Settings

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
}
OTHERS: dict[str, Any] = {
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)),
    "gelu": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)),
    "multipliers": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, residual_multiplier=0.3)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)),
}


def make(
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    four_bit: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A random model with LoRA on it, neither A nor B at zero."""
    torch.manual_seed(seed)
    lm = (FAMILIES | OTHERS)[family]().to(dtype).requires_grad_(False)
    if four_bit:
        quantize(lm, dtype, device)
    lm = lm.to(device)
    settings = Settings(**({"rank": 4, "alpha": 12.0} | changes))
    adapted = add_adapter(lm, settings, choose_targets(linear_layers(lm), settings.target_modules))
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=generator)
        elif "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2, generator=generator)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return lm.train()


def quantize(lm: Any, dtype: torch.dtype, device: str) -> None:
    """Put bitsandbytes' layers in place of the linear ones."""
    options = {"compress_statistics": True, "quant_type": "nf4"}
    for path in linear_layers(lm):
        old = lm.get_submodule(path)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype, **options)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, **options).to(device)
        new.support_avx512bf16_for_cpu = False  # as `QLora` has it
        lm.set_submodule(path, new)


def batch(packed: bool, device: str = "cpu") -> Batch:
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(2))
    position_ids = None
    if packed:
        position_ids = torch.cat([torch.arange(15), torch.arange(9)]).expand(2, -1).contiguous()
    places = torch.arange(47)
    return Batch(ids, position_ids, places, ids.flatten()[1:], 48).to(torch.device(device))


def learn(lm: Any, loss: CausalLoss, packed: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients by name."""
    lm.zero_grad()
    device, dtype = lm.device.type, lm.lm_head.weight.dtype
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        total = loss(batch(packed, device))
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def recognized(lm: Any) -> FusedBody:
    fused, why = fuse(lm)
    assert fused is not None, why
    return fused


def error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The mean relative error."""
    errors = [(gradients[name] - exact[name]).norm() / exact[name].norm() for name in exact]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_losses_and_gradients_are_those_of_the_plain_layers(family: str, packed: bool, checkpointing: bool) -> None:
    lm = make(family)
    want, want_gradients = learn(lm, CausalLoss(lm), packed)
    if checkpointing:
        checkpoint_layers(lm)
    got, gradients = learn(lm, CausalLoss(lm, recognized(lm)), packed)
    assert got == pytest.approx(want, rel=1e-6)
    assert set(gradients) == set(want_gradients)
    assert len(gradients) == 2 * 7 * 3
    for name, gradient in gradients.items():
        assert (gradient - want_gradients[name]).norm() <= 1e-4 * want_gradients[name].norm(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_bf16_gradients_are_as_near_the_exact_ones_as_the_plain_layers(checkpointing: bool) -> None:
    """On average: of one model's roundings, which are not the same on every processor, either way has the better."""
    errors: dict[str, list[float]] = {"ours": [], "plain": []}
    for seed in range(8):
        lm = make("llama", seed=seed)
        exact_loss, exact = learn(lm, CausalLoss(lm), False)
        lm = make("llama", torch.bfloat16, seed=seed)
        _, plain = learn(lm, CausalLoss(lm), False)
        if checkpointing:
            checkpoint_layers(lm)
        loss, ours = learn(lm, CausalLoss(lm, recognized(lm)), False)
        assert loss == pytest.approx(exact_loss, rel=1e-2)
        errors["ours"].append(error(ours, exact))
        errors["plain"].append(error(plain, exact))
    assert sum(errors["ours"]) <= sum(errors["plain"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"target_modules": ("q_proj", "v_proj")}, id="some-layers"),
        pytest.param({"target_modules": ("down_proj", "up_proj")}, id="other-layers"),
        pytest.param({"rank_pattern": {"k_proj": 2, "up_proj": 8}, "alpha_pattern": {"k_proj": 3.0}}, id="ranks"),
        pytest.param({"rslora": True}, id="rslora"),
    ],
)
def test_adapters_of_every_shape(changes: dict[str, Any]) -> None:
    lm = make("llama", **changes)
    want, want_gradients = learn(lm, CausalLoss(lm), False)
    got, gradients = learn(lm, CausalLoss(lm, recognized(lm)), False)
    assert got == pytest.approx(want, rel=1e-6)
    assert set(gradients) == set(want_gradients)
    for name, gradient in gradients.items():
        assert (gradient - want_gradients[name]).norm() <= 1e-4 * want_gradients[name].norm(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_base_in_four_bits(checkpointing: bool) -> None:
    lm = make("llama", four_bit=True)
    want, want_gradients = learn(lm, CausalLoss(lm), False)
    if checkpointing:
        checkpoint_layers(lm)
    got, gradients = learn(lm, CausalLoss(lm, recognized(lm)), False)
    assert got == pytest.approx(want, rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - want_gradients[name]).norm() <= 1e-4 * want_gradients[name].norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_on_a_gpu_are_as_near_the_exact_ones(four_bit: bool, packed: bool, checkpointing: bool) -> None:
    lm = make("llama", device="cuda", four_bit=four_bit)
    exact_loss, exact = learn(lm, CausalLoss(lm), packed)
    lm = make("llama", torch.bfloat16, device="cuda", four_bit=four_bit)
    plain_loss, plain = learn(lm, CausalLoss(lm), packed)
    if checkpointing:
        checkpoint_layers(lm)
    loss, ours = learn(lm, CausalLoss(lm, recognized(lm)), packed)
    assert loss == pytest.approx(plain_loss, rel=1e-2)
    assert loss == pytest.approx(exact_loss, rel=2e-2)
    assert error(ours, exact) <= 1.2 * error(plain, exact)


@pytest.mark.parametrize("other", OTHERS)
def test_models_of_another_kind_are_left_alone(other: str) -> None:
    fused, why = fuse(make(other))
    assert fused is None
    assert why


def test_dropout_is_left_to_the_plain_layers() -> None:
    fused, why = fuse(make("llama", dropout=0.1))
    assert fused is None
    assert "dropout" in why


def test_other_trained_weights_are_left_to_the_plain_layers() -> None:
    lm = make("llama")
    lm.model.norm.weight.requires_grad_(True)
    fused, why = fuse(lm)
    assert fused is None
    assert "trained" in why


def test_evaluation_keeps_nothing() -> None:
    lm = make("llama")
    body = recognized(lm)
    with torch.no_grad():
        hidden = body(batch(False).ids)
    assert not hidden.requires_grad
    want = lm.base_model(input_ids=batch(False).ids).last_hidden_state
    torch.testing.assert_close(hidden, want.detach(), rtol=1e-4, atol=1e-5)
