"""What the memory of a GPU goes to, kind by kind, against its driver: nothing else may use the GPU meanwhile."""

import gc
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import synthetic
from server.base.spec import ModelSpec
from server.engine.messages import SamplingParams, StopParams, Submit
from tests.engine.inprocess import Driver, adapter_ref

pytestmark = pytest.mark.gpu

COUNTED = ("weights", "adapters", "kv", "workspace")
SETTINGS: dict[str, Any] = {
    "page_size": 16,
    "max_batch_tokens": 2048,
    "max_num_seqs": 16,
    "max_model_len": 2048,
    "canary": False,
}
# Layers of Llama-3.1-8B, whose kernels may be compiled already, but two of them and a quarter of the words.
SHAPE = (4096, 14336, 2, 32, 8, 128, 32768)


def used() -> int:
    """Bytes that the driver has given out, to whomever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ModelSpec]]:
    """A directory with a base, `base`, and four adapters."""
    directory, device = tmp_path_factory.mktemp("memory"), torch.device("cuda")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(synthetic.SHAPES, "short", SHAPE)
        spec = synthetic.write_base(directory / "base", "short", "none", device)
    synthetic.write_adapters(spec, directory, 4, 16, False, device)
    yield directory, spec
    shutil.rmtree(directory)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_kinds_agree_with_the_driver(quantization: str, base: tuple[Path, ModelSpec]) -> None:
    """Each kind is what its tensors' sizes say, not what the others leave, so their sum can be wrong. The CUDA context,
    libraries and kernels are there before."""
    directory, spec = base
    adapters = [adapter_ref(directory / f"a{i}") for i in range(4)]

    def start(kv: int, pool: int) -> Driver:
        budgets = {"kv_cache_bytes": kv, "adapter_cache_bytes": pool}
        return Driver(directory / "base", overlap=None, device="cuda", quantization=quantization, **budgets, **SETTINGS)

    driver = start(1 << 30, 1 << 28)
    del driver
    gc.collect()
    torch.cuda.empty_cache()
    before = used()
    driver = start(12 << 30, 4 << 30)
    memory = driver.engine.stats().memory
    assert 0.999 * (12 << 30) < memory["kv"] < 1.001 * (12 << 30)
    assert 0.999 * (4 << 30) < memory["adapters"] <= 4 << 30
    parameters = sum(out * features for out, features in spec.linears().values())
    outside = 2 * spec.vocab_size * spec.hidden_size
    in_16_bits = 2 * (outside if quantization == "nf4" else parameters + outside)
    in_4_bits = parameters * 4.5 / 8 if quantization == "nf4" else 0  # 32 bits of scale for 64 weights
    assert memory["weights"] == pytest.approx(in_16_bits + in_4_bits, rel=0.002)
    counted = sum(memory[kind] for kind in COUNTED)
    assert counted == pytest.approx(used() - before, rel=0.02)
    busiest(driver, adapters)
    assert counted == pytest.approx(used() - before, rel=0.02), "what a step takes was measured ahead"


def busiest(driver: Driver, adapters: list[Any]) -> None:
    """Full batches of prompts and decodes with adapters, and draws that sort the vocabulary."""
    rng = random.Random(0)
    names = [f"r{i}" for i in range(SETTINGS["max_num_seqs"])]
    for i, name in enumerate(names):
        sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=i)
        prompt, stopping = rng.choices(range(1000), k=1024), StopParams(8, ignore_eos=True)
        driver.engine.handle(Submit(name, prompt, sampling, stopping, adapters[i % len(adapters)]))
    driver.run(*names)
