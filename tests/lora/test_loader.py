"""What one loader makes of many adapters: to the bit the formula's, and never another's."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.errors import InvalidAdapter
from server.lora import weights
from server.lora.weights import AdapterLoader, Identity, PackedAdapter, linear_groups
from tests.engine.inprocess import BASE_DIGEST, adapter_ref
from tests.kernels.test_lora import SPEC

LINEARS = SPEC.linears()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = sorted({path.rpartition(".")[2] for path in LINEARS})


def write(directory: Path, settings: dict[str, Any], ranks: dict[str, int], dtypes: tuple[torch.dtype, ...]) -> Path:
    """A PEFT directory with random weights for the modules of `ranks`, in any of `dtypes`."""
    tensors: dict[str, Tensor] = {}
    for number, (path, rank) in enumerate(ranks.items()):
        out_features, in_features = LINEARS[path]
        for part, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            dtype = dtypes[(number + len(part)) % len(dtypes)]
            tensors[f"base_model.model.{path}.{part}.weight"] = torch.randn(shape).to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def assert_packed(packed: PackedAdapter, tensors: dict[str, Tensor], scalings: dict[str, float]) -> None:
    """Every row against A and scaling · B of its module, rounded once; all other rows are zero."""
    for group in linear_groups(SPEC):
        for s, name in enumerate(group.modules):
            for layer in range(SPEC.num_layers):
                path = f"model.layers.{layer}.{name}"
                a, b = packed.a[group.name][layer, :, s], packed.b[group.name][s][layer]
                rank = 0
                if path in scalings:
                    file_a = tensors[f"base_model.model.{path}.lora_A.weight"]
                    file_b = tensors[f"base_model.model.{path}.lora_B.weight"]
                    rank = len(file_a)
                    assert torch.equal(a[:rank], file_a.to(a.dtype)), path
                    assert torch.equal(b[:rank], (file_b.float() * scalings[path]).to(b.dtype).t()), path
                assert not a[rank:].any(), path
                assert not b[rank:].any(), path


@pytest.mark.parametrize("elements", [1, 3000, 1 << 18], ids=["module-by-module", "some-at-once", "all-at-once"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_is_what_the_formula_says(
    dtype: torch.dtype, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_RUN_ELEMENTS", elements)
    loader, rng = AdapterLoader(SPEC, dtype), random.Random(0)
    for number in range(12):
        torch.manual_seed(number)
        targets = rng.sample(NAMES, rng.randint(1, len(NAMES)))
        paths = [path for path in LINEARS if path.rpartition(".")[2] in targets]
        if rng.random() < 0.3:  # a layer is left out
            paths = [path for path in paths if ".layers.0." not in path]
        rank, alpha, rslora = rng.choice((1, 4, 7)), rng.choice((8, 5.3)), rng.random() < 0.3
        ranks = {path: rng.choice((2, 9)) if rng.random() < 0.3 else rank for path in paths}
        alphas = {path: rng.choice((3, 2.7)) if rng.random() < 0.3 else alpha for path in paths}
        settings = {
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": rslora,
            "target_modules": paths,
            "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
            "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        }
        dtypes = DTYPES if rng.random() < 0.3 else (rng.choice(DTYPES),)
        directory = write(tmp_path / str(number), settings, ranks, dtypes)
        scalings = {path: alphas[path] / (math.sqrt(own) if rslora else own) for path, own in ranks.items()}
        packed = loader.load(directory)
        assert packed.rank == max(ranks.values())
        assert_packed(packed, saved(directory), scalings)


def saved(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
RANKS = {path: 4 for path in LINEARS if path.endswith(("q_proj", "down_proj"))}


def test_adapters_of_one_form_keep_what_is_theirs(tmp_path: Path) -> None:
    """They have the same config and header, or the same header alone."""
    loader = AdapterLoader(SPEC, torch.float32)
    for number, alpha in enumerate((8, 8, 12, 8, 12)):
        torch.manual_seed(number)
        directory = write(tmp_path / str(number), SETTINGS | {"lora_alpha": alpha}, RANKS, (torch.float32,))
        assert_packed(loader.load(directory), saved(directory), dict.fromkeys(RANKS, alpha / 4))


def test_files_that_changed_since_a_load_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, SETTINGS, RANKS, (torch.bfloat16,))
    config, tensors = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    originals = {path: path.read_bytes() for path in (config, tensors)}
    identity = Identity(adapter_ref(directory).digest, BASE_DIGEST)
    loader = AdapterLoader(SPEC, torch.bfloat16)
    changes = {
        config: [originals[config].replace(b'"lora_alpha": 8', b'"lora_alpha": 9')],
        tensors: [
            originals[tensors][:-1] + bytes([originals[tensors][-1] ^ 1]),
            originals[tensors][:-2],
            originals[tensors] + b"\0",
            originals[tensors].replace(b'"BF16"', b'"F16" ', 1),
        ],
    }
    for path, versions in changes.items():
        for changed in versions:
            assert changed != originals[path]
            loader.load(directory, identity)
            path.write_bytes(changed)
            with pytest.raises(InvalidAdapter):
                loader.load(directory, identity)
            path.write_bytes(originals[path])
    loader.load(directory, identity)
