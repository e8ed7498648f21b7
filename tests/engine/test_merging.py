"""The base's weights with an adapter in them: PEFT's merge is the oracle, and the way back gives the same bits."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from adapters.validation import WEIGHTS_FILE
from server.base.quantization import Quantization
from server.base.spec import ModelSpec
from server.engine.build import read_config
from server.engine.merging import MAX_KL, BaseMerger
from server.engine.messages import AdapterRef, MergeReport
from server.errors import MergeRefused, MergeTooLarge
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import load_adapter
from server.model.loader import load_weights
from server.model.transformer import Transformer
from tests.engine.inprocess import adapter_ref, make_adapter
from tests.engine.test_parity import VARIANTS, prompt
from tests.model.tiny import save_tiny

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class World:
    """A model, its pool with one adapter, and what merges it."""

    def __init__(
        self,
        base: Path,
        adapter: AdapterRef,
        dtype: torch.dtype = torch.float32,
        host_bytes: int = 1 << 30,
        quantization: Quantization | None = None,
    ) -> None:
        spec = ModelSpec.from_config(read_config(base))
        self.model = Transformer(spec, load_weights(base, spec, dtype, CPU, quantization), 64)
        self.pool = AdapterPool(spec, 8 << 20, dtype, CPU)
        packed = load_adapter(Path(adapter.path), spec, dtype)
        self.pool.allocate(4)  # the adapter's rows are not the pool's first
        rows = self.pool.allocate(packed.rank)
        assert rows is not None
        self.rows: Ranges = rows
        self.pool.write(rows, packed)
        self.merger = BaseMerger(self.model, self.pool, lambda: host_bytes)

    def merge(self, force: bool = False) -> MergeReport:
        *progress, report = self.merger.merge(self.rows, prompt(0, 40), force)
        assert isinstance(report, MergeReport)
        written = [step for step in progress if isinstance(step, tuple)]
        assert written == sorted(written)
        assert written[-1][0] == written[-1][1] > 0
        return report

    def weights(self) -> dict[str, Tensor]:
        """Every projection's weight by transformers' name."""
        found = {}
        for index, layer in enumerate(self.model.weights.layers):
            for name, group in self.pool.groups.items():
                parts = getattr(layer, name).dense().split(list(group.group.widths))
                for module, part in zip(group.group.modules, parts, strict=True):
                    found[f"model.layers.{index}.{module}.weight"] = part.clone()
        return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("llama")
    return save_tiny("llama", directory), directory


@pytest.fixture(scope="module")
def adapter(llama: tuple[PreTrainedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    return make_adapter(llama[0], tmp_path_factory.mktemp("adapter"), 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_pefts(variant: str, tmp_path: Path) -> None:
    adapter = make_adapter(save_tiny("llama-bias", tmp_path / "base"), tmp_path / "adapter", 3, **VARIANTS[variant])
    world = World(tmp_path / "base", adapter)
    before = world.weights()
    report = world.merge()
    loaded = PeftModel.from_pretrained(save_tiny("llama-bias", tmp_path / "base"), adapter.path)
    oracle = loaded.merge_and_unload().state_dict()
    for name, weight in world.weights().items():
        torch.testing.assert_close(weight, oracle[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    changed = {name.split(".")[2] for name, weight in before.items() if not torch.equal(weight, oracle[name])}
    assert {layer.layer for layer in report.layers} == set(map(int, changed))
    assert report.kl < 1e-6
    assert all(layer.weight < 1e-6 for layer in report.layers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_bits_are_rounded_once_and_come_back_bit_for_bit(
    dtype: torch.dtype, llama: tuple[PreTrainedModel, Path], adapter: AdapterRef
) -> None:
    world = World(llama[1], adapter, dtype)
    before, digest = world.weights(), world.merger.digest()
    layers = world.model.weights.layers
    report = world.merge()
    loaded = PeftModel.from_pretrained(llama[0], adapter.path)
    for name, weight in world.weights().items():
        layer = loaded.get_submodule("base_model.model." + name.removesuffix(".weight"))
        # Of B the scaling is multiplied in and rounded, as in unmerged serving.
        a = layer.lora_A["default"].weight.to(dtype).float()
        b = (layer.lora_B["default"].weight * layer.scaling["default"]).to(dtype).float()
        wanted = before[name].float() + b @ a
        spacing = torch.finfo(dtype).eps * wanted.abs()
        assert bool(((weight.float() - wanted).abs() <= 0.51 * spacing + 1e-6).all()), name
    loaded.unload()
    assert world.merger.digest() != digest
    assert report.held_bytes == world.merger.held_bytes == sum(weight.nbytes for weight in before.values())
    assert report.kl < MAX_KL
    *_, last = world.merger.unmerge()
    assert last[0] == last[1] == report.held_bytes
    assert world.merger.digest() == digest
    assert all(torch.equal(weight, before[name]) for name, weight in world.weights().items())
    assert world.merger.held_bytes == 0
    assert world.model.weights.layers is layers, "written in place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_four_bits_are_quantized_anew_and_come_back_bit_for_bit(
    dtype: torch.dtype, quant_type: str, double: bool, llama: tuple[PreTrainedModel, Path], adapter: AdapterRef
) -> None:
    world = World(llama[1], adapter, dtype, quantization=Quantization(quant_type, double=double))
    before, digest = world.weights(), world.merger.digest()
    report = world.merge(force=True)
    assert world.merger.digest() != digest
    loaded = PeftModel.from_pretrained(llama[0], adapter.path)
    squares = torch.zeros(3, 3)  # layer: error, delta, weight
    for name, weight in world.weights().items():
        layer = loaded.get_submodule("base_model.model." + name.removesuffix(".weight"))
        a = layer.lora_A["default"].weight.to(dtype).float()
        b = (layer.lora_B["default"].weight * layer.scaling["default"]).to(dtype).float()
        wanted = before[name].float() + b @ a
        flat = wanted.to(dtype).view(1, -1)  # on a CPU bitsandbytes wants whole blocks in a row
        codes, state = quantize_4bit(flat, blocksize=64, quant_type=quant_type, compress_statistics=double)
        oracle = dequantize_4bit(codes, state).view(wanted.shape)
        # The products are not summed in PEFT's order: a weight between two codes may take the other.
        step = wanted.abs().max() / 2
        assert float((weight != oracle).float().mean()) < 0.02, name
        assert bool(((weight - oracle).abs() <= step).all()), name
        error = oracle.float() - wanted
        squares[int(name.split(".")[2])] += torch.stack([t.square().sum() for t in (error, b @ a, wanted)])
    loaded.unload()
    for layer in report.layers:
        error, delta, weight = squares[layer.layer].sqrt().tolist()
        assert layer.weight == pytest.approx(error / weight, rel=0.02)
        assert layer.delta == pytest.approx(error / delta, rel=0.02)
    list(world.merger.unmerge())
    assert world.merger.digest() == digest
    assert all(torch.equal(weight, before[name]) for name, weight in world.weights().items())
    assert world.merger.held_bytes == 0


def test_four_bits_that_lose_too_much_of_an_adapter_are_refused(
    llama: tuple[PreTrainedModel, Path], adapter: AdapterRef
) -> None:
    world = World(llama[1], adapter, quantization=Quantization("nf4"))
    digest = world.merger.digest()
    with pytest.raises(MergeRefused, match="force it"):
        world.merge()
    assert world.merger.digest() == digest
    assert world.merge(force=True).kl > MAX_KL


def test_only_what_an_adapter_changes_is_put_aside(tmp_path: Path) -> None:
    model = save_tiny("qwen3", tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", 1, layers_to_transform=[1], target_modules=["down_proj"])
    world = World(tmp_path / "base", adapter)
    report = world.merge()
    assert [layer.layer for layer in report.layers] == [1]
    assert report.held_bytes == world.model.weights.layers[1].down.weight.nbytes


def test_rows_of_which_a_or_b_is_zero_change_nothing_and_merge(tmp_path: Path) -> None:
    adapter = make_adapter(save_tiny("llama", tmp_path / "base"), tmp_path / "adapter", 1, r=2)
    file = Path(adapter.path) / WEIGHTS_FILE
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".layers.1." in name:
            (tensor[1] if "lora_A" in name else tensor[:, 0]).zero_()
    save_file(tensors, file)
    world = World(tmp_path / "base", adapter_ref(Path(adapter.path)), torch.bfloat16)
    before = world.weights()
    first, empty, last = world.merge().layers
    assert (empty.layer, empty.weight, empty.delta) == (1, 0.0, 0.0)
    assert all(0 < layer.weight < layer.delta < 0.1 for layer in (first, last))
    changed = {name for name, weight in world.weights().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[2] for name in changed} == {"0", "2"}


def test_a_host_without_room_refuses_before_anything_is_written(
    llama: tuple[PreTrainedModel, Path], adapter: AdapterRef
) -> None:
    world = World(llama[1], adapter, host_bytes=10_000)
    digest = world.merger.digest()
    with pytest.raises(MergeTooLarge, match="of which 10000 are free"):
        world.merge()
    assert world.merger.digest() == digest


def test_what_merging_would_lose_is_refused_and_taken_back(
    llama: tuple[PreTrainedModel, Path], adapter: AdapterRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.merging.MAX_KL", 1e-7)
    world = World(llama[1], adapter, torch.bfloat16)
    digest = world.merger.digest()
    with pytest.raises(MergeRefused, match="nats a token") as caught:
        world.merge()
    assert float(caught.value.metadata["kl"]) > 1e-7
    assert world.merger.digest() == digest
    assert world.merger.held_bytes == 0
    report = world.merge(force=True)
    assert 1e-7 < report.kl <= report.largest_kl < MAX_KL
    assert all(0 < layer.weight < layer.delta < 0.1 for layer in report.layers)
    list(world.merger.unmerge())
    assert world.merger.digest() == digest


def test_a_weight_that_does_not_come_back_is_not_served(
    llama: tuple[PreTrainedModel, Path], adapter: AdapterRef
) -> None:
    world = World(llama[1], adapter)
    world.merge()
    world.merger._originals[3].saved[0][0, 0] += 1.0
    with pytest.raises(AssertionError, match="is not restored"):
        list(world.merger.unmerge())
