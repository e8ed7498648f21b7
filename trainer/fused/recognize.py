"""Whether a model is of the kind that the fused layers compute: by what its layers consist of, and by trial."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer.fused.body import FusedBody
from trainer.fused.layer import Layer, Norm, run_layer, run_norm
from trainer.fused.projection import Group, Lora, Projection

TRIAL_TOKENS = 48
TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the norm of what a layer adds
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


def fuse(causal_lm: Any, *, tries: bool = True) -> tuple[FusedBody | None, str]:
    """The fused body of `causal_lm` (transformers, with PEFT's LoRA layers inside or not), or None and why there is
    none. The base must be frozen. A model without contents cannot be tried."""
    try:
        body = causal_lm.base_model
        fused = _read_body(body)
        if tries:
            _try(body, fused)
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
    dtype = body.embed_tokens.weight.dtype
    if dtype not in TRIAL_TOLERANCE:
        raise _Unknown(f"it computes in {dtype}")
    layers = [_read_layer(layer, dtype) for layer in body.layers]
    trained = {id(p) for layer in layers for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in trained for p in body.parameters()):
        raise _Unknown("weights besides LoRA's are trained")
    return FusedBody(body, layers, _read_norm(body.norm))


def _read_layer(layer: Any, dtype: torch.dtype) -> Layer:
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
        qkv=Group.of((q, k, v), dtype),
        o=Group.of((o,), dtype),
        second_norm=_read_norm(layer.post_attention_layernorm),
        gate_up=Group.of((gate, up), dtype),
        down=Group.of((down,), dtype),
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
    is_four_bit = isinstance(base, nn.Linear) and hasattr(base.weight, "quant_state")
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
def _try(body: Any, fused: FusedBody) -> None:
    """Compare what every layer makes of a few tokens, plain and packed, with what the model's own makes of the same."""
    was_training = body.training
    body.eval()
    try:
        for position_ids in _positions(body.device):
            _try_layers(body, fused, position_ids)
    finally:
        body.train(was_training)


def _try_layers(body: Any, fused: FusedBody, position_ids: Tensor | None) -> None:
    dtype = body.embed_tokens.weight.dtype
    ids = torch.arange(TRIAL_TOKENS, device=body.device).remainder(body.embed_tokens.num_embeddings).unsqueeze(0)
    seen: list[Tensor] = []  # what each layer got, and the last gave

    def keep(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not seen:
            seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(output if isinstance(output, Tensor) else output[0])

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in body.layers]
    try:
        with torch.autocast(body.device.type, dtype=torch.bfloat16, enabled=dtype is not torch.float32):
            options = {} if position_ids is None else {"position_ids": position_ids}
            last = body(input_ids=ids, use_cache=False, **options).last_hidden_state.flatten(0, 1)
            x, places = fused.begin(ids, position_ids)
            own = [tensor.flatten(0, 1) for tensor in seen]
            pairs = [(own[0], x, own[0]), (last, run_norm(own[-1], fused.norm), last)]
            for layer, before, after in zip(fused.layers, own, own[1:], strict=False):
                ours = run_layer(before, layer, places, checkpointing=True)
                pairs.append((after, ours, after - before))
    finally:
        for handle in handles:
            handle.remove()
    for theirs, ours, size in pairs:
        if not (ours.float() - theirs.float()).norm() <= TRIAL_TOLERANCE[dtype] * size.float().norm():
            raise _Unknown(f"{type(body).__name__} computes something else than Llama does")


def _positions(device: torch.device) -> Iterator[Tensor | None]:
    yield None
    half = torch.arange(TRIAL_TOKENS // 2, device=device)
    yield torch.cat([half, half]).unsqueeze(0)
