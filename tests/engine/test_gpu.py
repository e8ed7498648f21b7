"""The engine on a GPU: captured decodes, FlashInfer and the Triton kernels against transformers and PEFT in float32."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import synthetic
from server.engine.messages import AdapterRef, LoadAdapter, SamplingParams, StopParams, Submit
from tests.engine.inprocess import Driver, adapter_ref, make_adapter

pytestmark = pytest.mark.gpu

# In float16, transformers and PEFT are themselves off by up to 0.064 over these prompts; adapters change 0.5 or more.
TOLERANCE = {"bfloat16": 0.3, "float16": 0.06}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """Decodes attend by FlashInfer."""
    return random_llama(tmp_path_factory.mktemp("base"), heads=8, kv_heads=2, head_dim=64)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """Decodes attend by the own kernel where it was measured."""
    return random_llama(tmp_path_factory.mktemp("wide"), heads=32, kv_heads=8, head_dim=128)


def random_llama(directory: Path, heads: int, kv_heads: int, head_dim: int) -> tuple[PreTrainedModel, Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.06)
    model.save_pretrained(directory)
    return model, directory


@torch.no_grad()
def oracle_logprobs(
    model: PreTrainedModel, ids: list[int], output: list[int], adapter: AdapterRef | None
) -> list[float]:
    """float32 log-probabilities of the tokens that the engine drew, after the tokens it drew."""
    return oracle_distributions(model, ids, output, adapter)[torch.arange(len(output)), torch.tensor(output)].tolist()


@torch.no_grad()
def oracle_distributions(
    model: PreTrainedModel, ids: list[int], output: list[int], adapter: AdapterRef | None
) -> torch.Tensor:
    """[len(output), vocab] float32 log-probabilities at each token that the engine drew."""
    net = model if adapter is None else PeftModel.from_pretrained(model, adapter.path).eval()
    logits = net(torch.tensor([ids + output])).logits[0, len(ids) - 1 : -1]
    if isinstance(net, PeftModel):
        net.unload()
    return logits.log_softmax(-1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_mixed_adapters(dtype: str, llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """Twenty sequences of many lengths over base and adapters of ranks 4 to 100: captured steps, steps with prefills,
    and, for rank 100, decodes that no graph serves."""
    model, directory = llama
    ranks = (4, 16, 64, 5, 33, 100)
    adapters: list[AdapterRef | None] = [None]
    for i, rank in enumerate(ranks):
        settings: dict[str, Any] = {"r": rank, "lora_alpha": rank}
        adapters.append(make_adapter(model, tmp_path / f"a{i}", i, **settings))
    driver = Driver(directory, overlap=None, device="cuda", dtype=dtype, max_batch_tokens=96, kv_cache_bytes=4 << 20)
    rng = random.Random(0)
    requests = {}
    for i in range(20):
        adapter = adapters[i % (len(adapters) - (i < 10))]
        requests[f"r{i}"] = (rng.choices(range(1000), k=3 + 9 * i), 12 + i, adapter)
    for request_id, (ids, max_tokens, adapter) in requests.items():
        sampling = SamplingParams(temperature=0.0, seed=0, logprobs=0)
        driver.engine.handle(Submit(request_id, ids, sampling, StopParams(max_tokens, ignore_eos=True), adapter))
    driver.run(*requests)
    for request_id, (ids, max_tokens, adapter) in requests.items():
        output = driver.inbox.tokens(request_id)
        assert len(output) == max_tokens
        drawn = [lp.logprob for out in driver.inbox.outputs[request_id] for lp in out.logprobs or []]
        want = oracle_logprobs(model, ids, output, adapter)
        worst = max(abs(a - b) for a, b in zip(drawn, want, strict=True))
        assert worst < TOLERANCE[dtype], f"{request_id}: {worst}"
        if adapter is not None:
            base = oracle_logprobs(model, ids, output, None)
            assert max(abs(a - b) for a, b in zip(base, want, strict=True)) > 0.5, (
                "the adapter has no effect to be seen"
            )
    assert driver.engine.stats().pages_used == 0


def test_seeds_are_the_same_in_any_batch(llama: tuple[PreTrainedModel, Path]) -> None:
    """A draw depends on seed and step; in 16 bits another batch may round a logit otherwise, so most tokens agree."""
    driver = Driver(llama[1], overlap=None, device="cuda", dtype="float16")
    alone = driver.generate(list(range(9)), 20, None, temperature=0.8, seed=5)
    for i in range(7):
        driver.submit(f"other{i}", list(range(i + 3)), 25, None, temperature=0.5, seed=i)
    driver.submit("same", list(range(9)), 20, None, temperature=0.8, seed=5)
    driver.run("same", *(f"other{i}" for i in range(7)))
    same = driver.inbox.tokens("same")
    assert same[:3] == alone[:3]


def test_any_gpu_of_the_machine_will_do(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """The last, where there are several: its loaders, graphs and events are its own."""
    model, directory = llama
    adapter, ids = make_adapter(model, tmp_path / "a", 0), list(range(9))
    with torch.cuda.device(0):  # puts back what the engine changes
        device = f"cuda:{torch.cuda.device_count() - 1}"
        driver = Driver(directory, overlap=None, device=device, dtype="float16", kv_cache_bytes=4 << 20)
        for each in (None, adapter):
            output = driver.generate(ids, 24, each)
            want = oracle_distributions(model, ids, output, each)
            lost = want.max(-1).values - want[torch.arange(len(output)), torch.tensor(output)]
            assert lost.max() < 2 * TOLERANCE["float16"], lost


def test_own_attention_and_greedy_tokens_in_the_graph(wide_llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """Batches of 1 to 12 without log-probabilities, which the sampler leaves to the graph; then some that draw."""
    model, directory = wide_llama
    adapter = make_adapter(model, tmp_path / "a", 0)
    driver = Driver(
        directory, overlap=None, device="cuda", dtype="float16", page_size=16, max_num_seqs=12, kv_cache_bytes=64 << 20
    )
    rng = random.Random(0)
    requests = {f"r{i}": (rng.choices(range(1000), k=2 + 17 * i), 6 + 3 * i, [None, adapter][i % 2]) for i in range(12)}
    for request_id, (ids, max_tokens, with_adapter) in requests.items():
        driver.submit(request_id, ids, max_tokens, with_adapter)
    driver.run(*requests)
    for request_id, (ids, _, with_adapter) in requests.items():
        output = driver.inbox.tokens(request_id)
        want = oracle_distributions(model, ids, output, with_adapter)
        lost = want.max(-1).values - want[torch.arange(len(output)), torch.tensor(output)]
        assert lost.max() < 2 * TOLERANCE["float16"], f"{request_id}: {lost}"
    greedy = driver.generate(list(range(50)), 12)
    driver.submit("greedy", list(range(50)), 12)
    driver.submit("drawn", list(range(40)), 12, temperature=1.5, seed=3)
    driver.submit("penalised", list(range(50)), 12, repetition_penalty=50.0)
    driver.run("greedy", "drawn", "penalised")
    assert driver.inbox.tokens("greedy")[:4] == greedy[:4]
    penalised = driver.inbox.tokens("penalised")
    assert len({*penalised}) == len(penalised)
    assert not {*penalised} & {*range(50)}


def test_a_step_is_committed_when_the_device_is_done_with_it(
    llama: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it draws nothing: the parts of a long prompt but for its last."""
    driver = Driver(llama[1], overlap=None, device="cuda", dtype="float16", max_batch_tokens=32, kv_cache_bytes=4 << 20)
    model, scheduler = driver.engine._runner._model, driver.engine._scheduler
    forward, commit = model.forward, scheduler.commit
    ends: list[torch.cuda.Event] = []

    def slow_forward(*inputs: Any) -> torch.Tensor:
        logits = forward(*inputs)
        torch.cuda._sleep(50_000_000)  # cycles
        ends.append(torch.cuda.Event())
        ends[-1].record()
        return logits

    def checked_commit(*step: Any) -> Any:
        assert ends.pop(0).query()
        return commit(*step)

    monkeypatch.setattr(model, "forward", slow_forward)
    monkeypatch.setattr(scheduler, "commit", checked_commit)
    driver.submit("long", list(range(200)), 1)
    driver.run("long")
    assert not ends


def test_adapters_that_are_proved_beside_steps_change_no_bit_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 4-bit product of few rows is split among blocks of threads, and a canary's has as few rows as a step's."""
    monkeypatch.setitem(synthetic.SHAPES, "short", (4096, 14336, 2, 32, 8, 128, 4096))
    device = torch.device("cuda")
    spec = synthetic.write_base(tmp_path / "base", "short", "none", device)
    synthetic.write_adapters(spec, tmp_path, 24, 8, False, device)
    settings = {"page_size": 16, "max_num_seqs": 8, "max_model_len": 1024, "kv_cache_bytes": 1 << 28}
    driver = Driver(
        tmp_path / "base",
        overlap=None,
        device="cuda",
        dtype="bfloat16",
        quantization="nf4",
        prefix_caching=False,
        adapter_cache_bytes=1 << 28,
        **settings,
    )
    shutil.rmtree(tmp_path / "base")

    def answers(tag: str) -> list[list[tuple[int, float]]]:
        names = [f"{tag}{i}" for i in range(8)]
        for i, name in enumerate(names):
            driver.submit(name, [3 + i] * 16, 1000, logprobs=0)
        driver.run(*names)
        drawn = [[(out.token_ids[0], out.logprobs or []) for out in driver.inbox.outputs[name]] for name in names]
        return [[(token, logprobs[0].logprob) for token, logprobs in each] for each in drawn]

    quiet = answers("quiet")
    for i in range(24):
        driver.engine.handle(LoadAdapter(f"load{i}", adapter_ref(tmp_path / f"a{i}")))
    assert answers("busy") == quiet
    for i in range(24):
        assert driver.answer(f"load{i}").error is None
