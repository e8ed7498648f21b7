"""Write a random base of a known model's shape, in 16 or in 4 bits, and adapters for it: speed and memory do not
depend on what weights say.

    python -m benchmarks.synthetic --shape llama-3.1-70b --quantization nf4 --model DIR [--adapters DIR --count 64]

The files are ordinary: config.json and sharded safetensors, in 4 bits those of bitsandbytes; a PEFT directory an
adapter. Each tensor is quantized as it is made, so that a base of 141 GB takes 40 GB. With `--same-weights` all
adapters share one weight file (hard links) and differ in their settings: to a server they are as many.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.random_adapters import peft_config
from server.base.quantization import HEAD, Quantization
from server.base.spec import ModelSpec
from server.quantization.convert import write_quantized

# hidden, intermediate, layers, heads, KV heads, head size, vocabulary
SHAPES = {
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128, 128256),
    "tiny": (256, 512, 2, 4, 2, 64, 1024),
}
WEIGHTS = "adapter_model.safetensors"


def config_of(shape: str, num_layers: int | None = None) -> dict[str, object]:
    """config.json of a Llama of that shape; `num_layers` None: with all its layers."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocab = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def base_tensors(spec: ModelSpec, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a base, one after another, bf16 on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02)

    yield "model.embed_tokens.weight", draw(spec.vocab_size, spec.hidden_size)
    for name, size in spec.linears().items():
        yield f"{name}.weight", draw(*size)
    norms = [f"model.layers.{i}.{name}" for i in range(spec.num_layers) for name in _LAYER_NORMS]
    for name in (*norms, "model.norm"):
        yield f"{name}.weight", torch.ones(spec.hidden_size, dtype=torch.bfloat16, device=device)
    yield f"{HEAD}.weight", draw(spec.vocab_size, spec.hidden_size)


_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def write_base(
    directory: Path, shape: str, quantization: str, device: torch.device, num_layers: int | None = None
) -> ModelSpec:
    """`quantization` is nf4, fp4 or none; in 16 bits the base is one file, and in memory before it is written."""
    config = config_of(shape, num_layers)
    spec = ModelSpec.from_config(config)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = base_tensors(spec, device)
    if quantization != "none":
        write_quantized(directory, config, tensors, Quantization(quantization), device)
        return spec
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return spec


def write_adapters(
    spec: ModelSpec, directory: Path, count: int, rank: int, same_weights: bool, device: torch.device
) -> None:
    """PEFT directories a0, a1, … of every linear layer."""
    for i in range(count):
        path = directory / f"a{i}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(peft_config(spec.linears(), rank) | {"revision": str(i)}))
        if i and same_weights:
            os.link(directory / "a0" / WEIGHTS, path / WEIGHTS)
        else:
            save_file(_adapter_tensors(spec, rank, i, device), path / WEIGHTS, metadata={"format": "pt"})


def _adapter_tensors(spec: ModelSpec, rank: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.01)

    tensors: dict[str, Tensor] = {}
    for name, (out_features, in_features) in spec.linears().items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = draw(rank, in_features)
        tensors[f"base_model.model.{name}.lora_B.weight"] = draw(out_features, rank)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--quantization", choices=["none", "nf4", "fp4"], default="none")
    parser.add_argument("--model", type=Path, required=True, help="write the base here")
    parser.add_argument("--adapters", type=Path, help="write adapters a0, a1, … under this folder")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--same-weights", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = write_base(args.model, args.shape, args.quantization, device, args.layers)
    if args.adapters is not None:
        write_adapters(spec, args.adapters, args.count, args.rank, args.same_weights, device)


if __name__ == "__main__":
    main()
