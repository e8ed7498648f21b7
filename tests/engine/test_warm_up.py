"""What is launched before there are requests: all that they launch, and nothing that they see."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.synthetic import write_adapters, write_base
from server.engine.messages import SamplingParams, StopParams, Submit
from server.engine.warm_up import row_counts, warm_up
from server.kernels.cuda.plans import choose
from server.kernels.cuda.skinny_plans import skinny_plan
from tests.engine.inprocess import Driver, adapter_ref, make_adapter, oracle_tokens
from tests.quantization.base import save_base

MEASURED = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
SHAPES = st.sampled_from(MEASURED) | st.tuples(
    st.integers(1, 2048).map(lambda n: 16 * n), st.integers(1, 64).map(lambda n: 256 * n)
)


@given(st.integers(1, 2000))
def test_counts_rise_to_the_most(most: int) -> None:
    counts = row_counts(most)
    assert counts == sorted(set(counts))
    assert counts[0] == 1
    assert counts[-1] == most


@given(SHAPES)
def test_every_plan_is_met(shape: tuple[int, int]) -> None:
    """Each is a compilation."""
    out, features = shape
    assert {choose(n, out, features) for n in range(1, 1200)} == {choose(n, out, features) for n in row_counts(1200)}
    skinny = {skinny_plan(n, features, out) for n in range(1, 1200)}
    assert skinny == {skinny_plan(n, features, out) for n in row_counts(1200)}


def test_requests_see_nothing_of_it(tmp_path: Path) -> None:
    model = save_base("llama", tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", 0)
    driver = Driver(tmp_path / "base", dtype="float32")
    runner = driver.engine._runner
    prompt = [3, 14, 15, 92, 65, 35]
    before = driver.generate(prompt, 4, adapter)
    warm_up(runner._model, runner._cache, runner._attention, runner._pool, 40, 3)
    assert runner._cache.k[0, :40].abs().amin() > 0
    runner._cache.k.zero_()
    assert driver.generate([7, *prompt], 12) == oracle_tokens(model, [7, *prompt], 12, None)
    assert driver.generate([8, *prompt], 12, adapter) == oracle_tokens(model, [8, *prompt], 12, adapter)
    assert before == oracle_tokens(model, prompt, 4, adapter)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled, or loaded as compiled before, from now on."""
    import flashinfer.jit.core
    import triton

    from server.kernels.cuda import four_bit, module, skinny

    four_bit._loaded.cache_clear()  # what earlier tests of this process have compiled
    skinny._kernel.cache_clear()
    names: list[str] = []
    read_program, build = module.read_program, flashinfer.jit.core.JitSpec.build_and_load

    def counting_read(source: str, *rest: Any) -> Any:
        names.append(f"{source} {rest}")
        return read_program(source, *rest)

    def counting_build(spec: Any) -> Any:
        names.append(spec.name)
        return build(spec)

    def count_triton(*, repr: str, **rest: Any) -> None:
        names.append(repr)

    monkeypatch.setattr(module, "read_program", counting_read)
    monkeypatch.setattr(flashinfer.jit.core.JitSpec, "build_and_load", counting_build)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", count_triton)
    return names


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_no_request_waits_for_a_compiler(quantization: str, tmp_path: Path, compiled: list[str]) -> None:
    """Of an engine that is ready: first loads, prompts of many lengths, adapters of ranks to 100, all ways to draw."""
    device = torch.device("cuda")
    spec = write_base(tmp_path / "base", "llama-3.1-8b", "none", device, num_layers=2)
    adapters = []
    for rank in (8, 64, 100):
        write_adapters(spec, tmp_path / f"rank{rank}", 1, rank, False, device)
        adapters.append(adapter_ref(tmp_path / f"rank{rank}" / "a0"))
    settings: dict[str, Any] = {
        "page_size": 16,
        "max_batch_tokens": 400,
        "max_num_seqs": 64,
        "kv_cache_bytes": 256 << 20,
        "adapter_cache_bytes": 256 << 20,
        "quantization": quantization,
    }
    driver = Driver(tmp_path / "base", overlap=None, device="cuda", **settings)
    assert compiled
    compiled.clear()
    rng = random.Random(0)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    ]
    names = []
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 64, 65, 89, 100, 128, 129, 144, 200, 256, 257, 300, 380]
    for i, length in enumerate(lengths * 3):
        adapter = [None, *adapters][i % 4]
        names.append(f"r{i}")
        sampling = SamplingParams(seed=i, **samplings[i % len(samplings)])
        stopping = StopParams(3 + i % 5, ignore_eos=True)
        driver.engine.handle(Submit(names[-1], rng.choices(range(1000), k=length), sampling, stopping, adapter))
        for _ in range(i % 3):
            driver.engine.step()
    driver.run(*names)
    torch.cuda.synchronize()
    assert compiled == []
