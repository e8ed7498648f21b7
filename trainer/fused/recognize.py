"""Whether a model is of the kind that the fused layers compute: by what its layers consist of, and by trial."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from trainer.fused.body import FusedBody
from trainer.fused.layer import Layer, Norm
from trainer.fused.projection import Group, Lora, Projection

TRIAL_TOKENS = 48
TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the last hidden states' norm
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


class _Unknown(Exception):
    """Why a model is not of this kind."""


def fuse_where_it_pays(
    causal_lm: Any, device: torch.device, dtype: torch.dtype, note: Callable[[str], None]
) -> FusedBody | None:
    """The fused body on a GPU in 16 bits, where it is faster; why there is none, `note` is told."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    fused, why = fuse(causal_lm)
    if fused is None:
        note(f"transformers' own layers, which take more time and memory than fused ones: {why}")
    return fused


def fuse(causal_lm: Any) -> tuple[FusedBody | None, str]:
    """The fused body of `causal_lm` (transformers, with PEFT's LoRA layers inside or not), or None and why there is
    none. The base must be frozen."""
    try:
        body = causal_lm.base_model
        fused = _read_body(body)
        _try(causal_lm, body, fused)
    except _Unknown as error:
        return None, str(error)
    return fused, ""


def _read_body(body: Any) -> FusedBody:
    parts = {name for name, _ in body.named_children()}
    if parts != {"embed_tokens", "layers", "norm", "rotary_emb"} or type(body.embed_tokens) is not nn.Embedding:
        raise _Unknown(f"{type(body).__name__} is not built as Llama is")
    config = body.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise _Unknown("its attention has a window")
    layers = [_read_layer(layer) for layer in body.layers]
    trained = {id(p) for layer in layers for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in trained for p in body.parameters()):
        raise _Unknown("weights besides LoRA's are trained")
    return FusedBody(body, layers, _read_norm(body.norm))


def _read_layer(layer: Any) -> Layer:
    attn, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if {name for name, _ in layer.named_children()} != LAYER_PARTS or attn is None or mlp is None:
        raise _Unknown(f"{type(layer).__name__} is not built as Llama's layers are")
    parts = {name for name, _ in attn.named_children()} - set(ATTENTION_PARTS)
    if parts not in (set(), set(HEAD_NORMS)) or not all(hasattr(attn, name) for name in ATTENTION_PARTS):
        raise _Unknown(f"{type(attn).__name__} is not built as Llama's attention is")
    if {name for name, _ in mlp.named_children()} != {*MLP_PARTS, "act_fn"} or not _is_silu(mlp.act_fn):
        raise _Unknown(f"{type(mlp).__name__} is not built as Llama's MLP is")
    if getattr(attn, "attention_dropout", 0.0):
        raise _Unknown("its attention has dropout")
    q, k, v, o = (_read_projection(getattr(attn, name)) for name in ATTENTION_PARTS)
    gate, up, down = (_read_projection(getattr(mlp, name)) for name in MLP_PARTS)
    return Layer(
        first_norm=_read_norm(layer.input_layernorm),
        qkv=Group((q, k, v)),
        o=Group((o,)),
        second_norm=_read_norm(layer.post_attention_layernorm),
        gate_up=Group((gate, up)),
        down=Group((down,)),
        head_norms=(_read_norm(attn.q_norm), _read_norm(attn.k_norm)) if parts else None,
        head_dim=attn.head_dim,
        scale=attn.scaling,
    )


def _read_norm(norm: Any) -> Norm:
    if not hasattr(norm, "variance_epsilon") or [name for name, _ in norm.named_parameters()] != ["weight"]:
        raise _Unknown(f"{type(norm).__name__} is not an RMS norm as Llama's is")
    return Norm(norm.weight, norm.variance_epsilon)


def _read_projection(layer: Any) -> Projection:
    lora = None
    base = layer
    if isinstance(layer, LoraLayer):
        base, lora = layer.get_base_layer(), _read_lora(layer)
    is_four_bit = type(base).__name__ == "Linear4bit"
    if type(base) is not nn.Linear and not is_four_bit:
        raise _Unknown(f"{type(base).__name__} is not a plain linear layer")
    return Projection(base, lora)


def _read_lora(layer: Any) -> Lora:
    if list(layer.lora_A) != ["default"] or layer.active_adapters != ["default"] or layer.lora_variant:
        raise _Unknown("its LoRA is not of the plain kind")
    if not isinstance(layer.lora_dropout["default"], nn.Identity):
        raise _Unknown("LoRA has dropout")
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    if a.bias is not None or b.bias is not None or layer.merged:
        raise _Unknown("its LoRA is not of the plain kind")
    return Lora(a.weight, b.weight, layer.scaling["default"])


def _is_silu(function: Any) -> bool:
    return isinstance(function, nn.SiLU) or type(function).__name__ in ("SiLUActivation", "SiLU")


@torch.no_grad()
def _try(causal_lm: Any, body: Any, fused: FusedBody) -> None:
    """Compare the last hidden states of a few tokens, plain and packed, with the model's own."""
    dtype, device = body.embed_tokens.weight.dtype, body.embed_tokens.weight.device
    if dtype not in TRIAL_TOLERANCE:
        raise _Unknown(f"it computes in {dtype}")
    was_training = body.training
    body.eval()
    try:
        ids = torch.arange(TRIAL_TOKENS, device=device).remainder(body.embed_tokens.num_embeddings).unsqueeze(0)
        for position_ids in _positions(device):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is not torch.float32):
                options = {} if position_ids is None else {"position_ids": position_ids}
                own = body(input_ids=ids, use_cache=False, **options).last_hidden_state.float()
                ours = fused(ids, position_ids).float()
            if not (ours - own).norm() <= TRIAL_TOLERANCE[dtype] * own.norm():
                raise _Unknown(f"{type(body).__name__} computes more than Llama does")
    finally:
        body.train(was_training)


def _positions(device: torch.device) -> Iterator[torch.Tensor | None]:
    yield None
    half = torch.arange(TRIAL_TOKENS // 2, device=device)
    yield torch.cat([half, half]).unsqueeze(0)
