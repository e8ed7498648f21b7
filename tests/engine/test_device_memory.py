"""What a GPU's memory goes to, kind by kind, against the driver's account of it."""

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.synthetic import write_adapters, write_base
from server.engine.messages import SamplingParams, StopParams, Submit
from tests.engine.inprocess import Driver, adapter_ref

pytestmark = pytest.mark.gpu

COUNTED = ("weights", "adapters", "kv", "workspace")
SETTINGS: dict[str, Any] = {
    "page_size": 16,
    "max_batch_tokens": 4096,
    "max_num_seqs": 64,
    "max_model_len": 4096,
    "canary": False,
}


def used() -> int:
    """Bytes that the driver has given out, to whomever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_kinds_agree_with_the_driver(quantization: str, tmp_path: Path) -> None:
    """Each kind is what its tensors' sizes say, not what the others leave, so their sum can be wrong. The CUDA context,
    libraries and kernels are there before."""
    device = torch.device("cuda")
    spec = write_base(tmp_path / "base", "llama-3.1-8b", "none", device, num_layers=6)
    write_adapters(spec, tmp_path, 4, 16, False, device)
    adapters = [adapter_ref(tmp_path / f"a{i}") for i in range(4)]

    def start(kv: int, pool: int) -> Driver:
        budgets = {"kv_cache_bytes": kv, "adapter_cache_bytes": pool}
        return Driver(tmp_path / "base", overlap=None, device="cuda", quantization=quantization, **budgets, **SETTINGS)

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
    names = [f"r{i}" for i in range(64)]
    for i, name in enumerate(names):
        sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=i)
        prompt, stopping = rng.choices(range(1000), k=1024), StopParams(8, ignore_eos=True)
        driver.engine.handle(Submit(name, prompt, sampling, stopping, adapters[i % len(adapters)]))
    driver.run(*names)
