"""The canary lets every right adapter pass, and none whose rows in the pool are not what its files say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adapters.errors import InvalidAdapter
from adapters.validation import WEIGHTS_FILE
from server.base.spec import ModelSpec
from server.engine.canary import Canary
from server.engine.messages import AdapterRef, LoadAdapter
from server.errors import CanaryFailed
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import PackedAdapter, load_adapter
from server.model.loader import load_weights
from server.model.transformer import Transformer
from tests.engine.inprocess import Driver, make_adapter
from tests.engine.test_parity import VARIANTS
from tests.model.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")


class Bench:
    """A model, a pool in which other adapters lie too, and a canary over them."""

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        self.spec = ModelSpec.from_config(json.loads((base / "config.json").read_text()))
        model = Transformer(self.spec, load_weights(base, self.spec, dtype, CPU), 64)
        self.pool = AdapterPool(self.spec, 8 << 20, dtype, CPU)
        self.canary = Canary(model, self.pool, 64)
        self._dtype = dtype

    def place(self, adapter: AdapterRef) -> Ranges:
        packed = load_adapter(Path(adapter.path), self.spec, self._dtype)
        ranges = self.pool.allocate(packed.rank)
        assert ranges is not None
        self.pool.write(ranges, packed)
        return ranges

    def check(self, adapter: AdapterRef, ranges: Ranges) -> None:
        self.canary.check(Path(adapter.path), ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_of_adapter_passes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "base")
    bench = Bench(tmp_path / "base", dtype)
    for i, config in enumerate(VARIANTS.values()):
        adapter = make_adapter(model, tmp_path / f"adapter{i}", i, **config)
        bench.check(adapter, bench.place(adapter))


def test_an_adapter_without_effect_and_one_of_tiny_values_pass(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "base")
    bench = Bench(tmp_path / "base", torch.float16)
    for i, std in enumerate((0.0, 1e-4)):
        adapter = make_adapter(model, tmp_path / f"adapter{i}", i, std=std)
        bench.check(adapter, bench.place(adapter))


def test_one_with_an_alpha_for_every_layer_of_a_large_model_passes(
    llama: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    bench = Bench(llama[1], torch.float32)
    alphas = {f"model.layers.{layer}.{part}": 1 + layer for layer in range(126) for part in ("q", "k", "v", "o")}
    alphas |= {f"layers.{layer}.self_attn.q_proj": 3 + layer for layer in range(126)}
    adapter = make_adapter(llama[0], tmp_path / "adapter", 0, alpha_pattern=alphas)
    bench.check(adapter, bench.place(adapter))


def swap_layers(pool: AdapterPool, rows: slice) -> None:
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            tensor[[0, 1], rows] = tensor[[1, 0], rows]


def swap_slices(pool: AdapterPool, rows: slice) -> None:
    key, value = pool.groups["qkv"].b[1], pool.groups["qkv"].b[2]
    key[:, rows], value[:, rows] = value[:, rows].clone(), key[:, rows].clone()


def flip_row(pool: AdapterPool, rows: slice) -> None:
    pool.groups["down"].a[1, rows.start] *= -1


def lose_row(pool: AdapterPool, rows: slice) -> None:
    pool.groups["gate_up"].b[1][2, rows.start + 1] = 0


def scale(pool: AdapterPool, rows: slice) -> None:
    pool.groups["o"].b[0][:, rows] *= 1.1


def not_finite(pool: AdapterPool, rows: slice) -> None:
    pool.groups["o"].b[0][0, rows.start, 3] = float("nan")


def anothers_rows(pool: AdapterPool, rows: slice) -> None:
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            tensor[:, rows] = tensor[:, : rows.stop - rows.start].clone()


def zero(pool: AdapterPool, rows: slice) -> None:
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            tensor[:, rows] = 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("llama")
    return save_tiny("llama", directory), directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "corrupt", [swap_layers, swap_slices, flip_row, lose_row, scale, not_finite, anothers_rows, zero]
)
def test_corrupt_rows_are_refused(
    corrupt: Callable[[AdapterPool, slice], None],
    dtype: torch.dtype,
    llama: tuple[PreTrainedModel, Path],
    tmp_path: Path,
) -> None:
    bench = Bench(llama[1], dtype)
    other, adapter = (make_adapter(llama[0], tmp_path / str(i), i) for i in range(2))
    others_rows, ranges = bench.place(other), bench.place(adapter)
    bench.check(adapter, ranges)
    corrupt(bench.pool, slice(*ranges[0]))
    with pytest.raises(CanaryFailed, match="not what its files say") as caught:
        bench.check(adapter, ranges)
    assert caught.value.reason == "ADAPTER_CANARY_FAILED"
    assert caught.value.faults
    bench.check(other, others_rows)


def test_a_config_that_says_another_scaling_than_was_loaded_is_refused(
    llama: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    bench = Bench(llama[1], torch.float32)
    adapter = make_adapter(llama[0], tmp_path / "adapter", 0)
    ranges = bench.place(adapter)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": True}))
    with pytest.raises(CanaryFailed):
        bench.check(adapter, ranges)


def lose_tensor(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def narrow(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:, :2].contiguous()


@pytest.mark.parametrize("change", [lose_tensor, narrow])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_files_that_have_become_no_adapter_since_they_were_loaded_are_refused(
    part: str,
    change: Callable[[dict[str, torch.Tensor], str], None],
    llama: tuple[PreTrainedModel, Path],
    tmp_path: Path,
) -> None:
    """It may have waited for rows meanwhile. Any other error would end the engine."""
    bench = Bench(llama[1], torch.float32)
    adapter = make_adapter(llama[0], tmp_path / "adapter", 0)
    ranges, file = bench.place(adapter), tmp_path / "adapter" / WEIGHTS_FILE
    tensors = load_file(file)
    change(tensors, next(name for name in tensors if part in name))
    save_file(tensors, file)
    with pytest.raises(InvalidAdapter, match=part):
        bench.check(adapter, ranges)


@pytest.mark.parametrize("canary", [True, False])
def test_the_engine_serves_nobody_with_a_corrupt_adapter_and_everybody_else(
    canary: bool, llama: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    """A pool that writes one adapter wrongly."""
    good, bad = (make_adapter(llama[0], tmp_path / name, i) for i, name in enumerate(("good", "bad")))
    want = Driver(llama[1]).generate([5, 6, 7], 8, good)
    driver = Driver(llama[1], canary=canary)
    pool = driver.engine._adapters._pool
    write, spoiled = pool.write, load_adapter(Path(bad.path), driver_spec(llama[1]), torch.float32)

    def write_wrongly(ranges: Ranges, adapter: PackedAdapter) -> None:
        write(ranges, adapter)
        if torch.equal(adapter.a["o"], spoiled.a["o"]):
            flip_row(pool, slice(*ranges[0]))

    pool.write = write_wrongly  # type: ignore[method-assign]
    driver.submit("good", [5, 6, 7], 8, good)
    driver.submit("bad", [5, 6, 7], 8, bad)
    driver.run("good", "bad")
    assert driver.inbox.tokens("good") == want
    assert ("bad" in driver.inbox.failed) == canary
    error = driver.call(LoadAdapter("call", bad)).error
    if canary:
        assert driver.inbox.failed["bad"].error.reason == "ADAPTER_CANARY_FAILED"
        assert error is not None
        assert error.reason == "ADAPTER_CANARY_FAILED"
        assert not driver.engine.stats().adapter_bytes["device"] > 8 * pool.row_bytes
    else:
        assert error is None


def driver_spec(base: Path) -> ModelSpec:
    return ModelSpec.from_config(json.loads((base / "config.json").read_text()))
