"""What `lorikeet plan` foretells, against what engines and a server say when they have set it aside."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from loadtest.serving import Server
from server.base.checkpoint import read_config, tensor_headers
from server.base.hardware import free_host_bytes
from server.base.memory import ITEM_BYTES, adapter_rows
from server.base.plan import Load, Plan, advice, plan
from server.base.quantization import Quantization, wanted_quantization
from server.base.resolve import locate_base
from server.base.shapes import CONFIGS, named_spec
from server.base.spec import ModelSpec
from server.base.weights import Device, stored_formats, this_cpu, wanted_formats, weight_bytes
from server.cli import main
from server.cli.exits import ExitCode
from server.config import EngineConfig
from server.engine.build import build_engine
from server.errors import BaseModelError, ConfigError
from server.kernels import four_bit
from server.kernels.linear import _onednn_supports
from server.quantization.convert import convert
from tests.engine.inprocess import Inbox
from tests.model.tiny import FAMILIES
from tests.quantization.base import save_base
from tests.support.server_process import REPOSITORY, ServerProcess, command
from tests.support.tiny_base import save_tiny_base
from tests.support.waiting import eventually

GIB = 1 << 30
SMALL = Load(adapters=3, rank=6, sequences=5, context=100)
GPU = Device("cuda", is_hopper=True)


def foretold(directory: Path, dtype: str, quantization: Quantization | None, device: Device | None = None) -> Plan:
    config = read_config(directory)
    spec = ModelSpec.from_config(config)
    stored = stored_formats(spec, config, tensor_headers(directory))
    formats = stored if quantization is None else wanted_formats(spec, quantization)
    return plan(spec, dtype, formats, device or this_cpu(), GIB, SMALL)


def engine_memory(directory: Path, dtype: str, quantization: Quantization | None, made: Plan) -> dict[str, int]:
    """What an engine that was built with the plan's settings says."""
    settings = made.settings
    config = EngineConfig(
        base_path=str(directory),
        base_digest="sha256:0",
        dtype=dtype,
        quantization=None if quantization is None else quantization.quant_type,
        quantization_block=64 if quantization is None else quantization.block_size,
        double_quantization=quantization is None or quantization.double,
        keep_16bit=("lm_head",) if quantization is None else quantization.keep,
        max_num_seqs=settings["--max-num-seqs"],
        max_model_len=settings["--max-model-len"],
        kv_cache_bytes=settings["--kv-cache-memory"],
        adapter_cache_bytes=settings["--adapter-memory"],
        num_threads=1,
    )
    return build_engine(config, Inbox()).stats().memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "qwen2", "qwen3"])
def test_16_and_32_bits_are_foretold(tmp_path: Path, family: str, dtype: str) -> None:
    save_base(family, tmp_path, getattr(torch, dtype))
    made = foretold(tmp_path, dtype, None)
    assert made.memory == engine_memory(tmp_path, dtype, None, made)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "qwen3"])
@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (Quantization("nf4"), "bfloat16"),
        (Quantization("nf4"), "float32"),
        (Quantization("fp4", block_size=32, double=False), "bfloat16"),
        (Quantization("nf4", block_size=128), "bfloat16"),  # longer than some rows: held as it was quantized
        (Quantization("nf4", keep=("lm_head", "q_proj", "model.layers.1")), "bfloat16"),
        (Quantization("nf4", keep=("down_proj",)), "float16"),  # and so the head is quantized, where there is one
    ],
)
def test_4_bits_are_foretold(tmp_path: Path, family: str, quantization: Quantization, dtype: str) -> None:
    save_base(family, tmp_path, getattr(torch, dtype))
    made = foretold(tmp_path, dtype, quantization)
    assert made.memory == engine_memory(tmp_path, dtype, quantization, made)


@pytest.mark.parametrize("quantization", [Quantization("nf4"), Quantization("fp4", block_size=32, double=False)])
def test_a_4_bit_checkpoint_is_foretold_by_its_tensors(tmp_path: Path, quantization: Quantization) -> None:
    save_base("llama", tmp_path / "base", torch.bfloat16)
    made_of = tmp_path / "four-bits"
    made_of.mkdir()
    convert(tmp_path / "base", made_of, quantization, torch.device("cpu"))
    made = foretold(made_of, "bfloat16", None)
    assert made.memory == engine_memory(made_of, "bfloat16", None, made)
    assert made.memory["weights"] == foretold(tmp_path / "base", "bfloat16", quantization).memory["weights"]
    if quantization.double:  # what its config alone says is as much
        config = read_config(made_of)
        spec = ModelSpec.from_config(config)
        assert weight_bytes(spec, "bfloat16", stored_formats(spec, config, None), this_cpu()) == made.memory["weights"]


def test_a_4_bit_checkpoint_without_scales_is_refused() -> None:
    config = {**CONFIGS["smollm2-135m"], "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    weight = "model.layers.0.mlp.up_proj.weight"
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {f"{weight}.quant_state.bitsandbytes__nf4": ("U8", (80,))}
    with pytest.raises(BaseModelError, match=rf"no tensor {weight}\.absmax"):
        stored_formats(ModelSpec.from_config(config), config, tensors)


def test_this_cpu_is_seen_as_torch_and_bitsandbytes_see_it() -> None:
    seen = this_cpu()
    assert seen.reordered == {name for name in ITEM_BYTES if _onednn_supports(getattr(torch, name))}
    assert seen.has_bf16_dot == bool(has_avx512bf16())
    assert seen.has_avx512 == four_bit.decodes_quickly()


def test_a_cpu_without_avx512_holds_4_bits_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "decodes_quickly", lambda: False)
    save_base("llama-bias", tmp_path, torch.float32)
    made = foretold(tmp_path, "float32", Quantization("nf4"), replace(this_cpu(), has_avx512=False))
    assert made.memory == engine_memory(tmp_path, "float32", Quantization("nf4"), made)
    assert made.memory == foretold(tmp_path, "float32", None).memory


def test_the_embedded_base_is_foretold_without_its_files() -> None:
    name, directory = locate_base(None)
    spec, real = named_spec("smollm2-135m"), ModelSpec.from_config(read_config(directory))
    assert spec is not None
    assert spec == replace(real, rms_eps=spec.rms_eps, rope_theta=spec.rope_theta), name
    for quantization in (None, Quantization("nf4")):
        made = plan(spec, "bfloat16", wanted_formats(spec, quantization), this_cpu(), GIB, SMALL)
        assert made.memory == engine_memory(directory, "bfloat16", quantization, made)


@pytest.mark.parametrize("options", [(), ("--quantization", "nf4")])
def test_a_server_says_what_the_command_foretold(tmp_path: Path, options: tuple[str, ...]) -> None:
    base = tmp_path / "base"
    save_tiny_base(base)
    asked = ("plan", "--json", "--base", str(base), "--device", "cpu", *options)
    load = ("--adapters", "5", "--rank", "6", "--sequences", "3", "--context", "70")
    done = subprocess.run(command(*asked, *load), capture_output=True, text=True, cwd=REPOSITORY, check=True)
    found = json.loads(done.stdout)
    assert found["command"][:2] == ["lorikeet", "serve"]
    (tmp_path / "store").mkdir()
    server = ServerProcess.start(tmp_path, base, tmp_path / "store", *found["command"][4:])
    try:
        page = Server(server.port, server.metrics_port, "")
        memory = eventually(lambda: {k: v for k, v in page.memory().items() if not k.startswith("resident")}, "kinds")
    finally:
        server.stop()
    assert memory == found["memory_bytes"]
    assert found["kv_tokens"] == 3 * 80, "whole pages"
    assert found["memory_bytes"]["adapters"] == 5 * found["adapter_bytes"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`lorikeet plan`: its exit code, output and errors."""

    def run(*options: str) -> tuple[int, str, str]:
        code = main(["plan", *options])
        return (code, *capsys.readouterr())

    return run


def test_what_does_not_fit_is_refused_with_what_would(run: Callable[..., tuple[int, str, str]]) -> None:
    large = ("--base", "llama-3.1-8b", "--device", "cuda", "--adapters", "64", "--sequences", "64", "--context", "8192")
    code, out, line = run(*large, "--device-memory", "80GiB", "--json")
    assert code == ExitCode.EXHAUSTED
    found = json.loads(out)
    assert not found["fits"]
    assert line.count("\n") == 1
    for lower in ("--context", "--sequences"):
        assert f"lower {lower} to " in line
        value = line.split(f"lower {lower} to ")[1].split(",")[0]
        again = list(large)
        again[again.index(lower) + 1] = value
        assert run(*again, "--device-memory", "80GiB")[0] == ExitCode.OK, f"{lower} {value}"
    assert line.endswith("hold the base in 4 bits (--quantization nf4)\n")
    assert run(*large, "--device-memory", "80GiB", "--quantization", "nf4")[0] == ExitCode.OK
    *_, line = run(*large, "--device-memory", "60GiB")
    assert "nf4" not in line, "the KV cache alone is too large for that"
    *_, line = run("--base", "llama-3.1-70b", "--device", "cuda", "--device-memory", "24GiB")
    assert line.endswith("the base by itself is too large: take a smaller one, or a larger device\n")


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (("--base", "llama-3.1-8b", "--dtype", "int8"), "--dtype int8", ExitCode.USAGE),
        (("--device", "tpu"), "--device tpu", ExitCode.USAGE),
        (("--keep-16bit", "nothing", "--quantization", "nf4"), "'nothing'", ExitCode.USAGE),
        (("--base", "no-such/model"), "not in the Hugging Face cache", ExitCode.REFUSED),
        (("--base", str(REPOSITORY / "README.md")), "neither a model directory nor a config.json", ExitCode.REFUSED),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    run: Callable[..., tuple[int, str, str]], options: tuple[str, ...], said: str, code: ExitCode
) -> None:
    ended, _, line = run(*options)
    assert ended == code
    assert said in line
    assert line.count("\n") == 1


def test_a_system_that_does_not_say_what_is_free_asks_for_the_options(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    for text in (None, "MemTotal: 5 kB\n"):
        if text is not None:
            meminfo.write_text(text)
        with pytest.raises(ConfigError, match="set --kv-cache-memory"):
            free_host_bytes(meminfo)


@pytest.mark.parametrize(
    ("limits", "free"),
    [
        ({}, 9000),
        ({"": "max", "pod": "max", "pod/box": "max"}, 9000),
        ({"pod/box": 6000}, 6000 - 5000 + 700),
        ({"pod": 5600, "pod/box": 9000}, 5600 - 5000 + 700),
        ({"pod/box": 4000}, 0),
        ({"": 20000}, 9000),
    ],
    ids=str,
)
def test_a_container_s_limit_bounds_what_is_free(limits: dict[str, int | str], free: int, tmp_path: Path) -> None:
    """The files are as cgroup v2 has them; the machine has 9 MB free, and each limited group uses 5."""
    (tmp_path / "meminfo").write_text("MemTotal: 50000 kB\nMemAvailable: 9000 kB\n")
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/pod/box\n")
    for group, limit in limits.items():
        folder = tmp_path / "groups" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit * 1024 if isinstance(limit, int) else limit}\n")
        (folder / "memory.current").write_text(f"{5000 * 1024}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {600 * 1024}\nactive_file {100 * 1024}\n")
    assert free_host_bytes(tmp_path / "meminfo", tmp_path / "own", tmp_path / "groups") == free * 1024


def test_it_loads_no_torch() -> None:
    script = "import sys\nfrom server.cli import main\nmain(['plan', '--json'])\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=REPOSITORY)


PUBLISHED = {  # thousands of millions of parameters, as the models' pages have them
    "smollm2-135m": 0.135,
    "smollm2-1.7b": 1.71,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "mistral-7b-v0.3": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen3-8b": 8.19,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_known_shapes_have_the_sizes_they_are_named_for(name: str) -> None:
    """Of parameters, the embedding counted once where it is the head, too."""
    spec = named_spec(name)
    assert spec is not None
    held = weight_bytes(spec, "bfloat16", {}, Device("cuda")) / 2e9
    assert held == pytest.approx(PUBLISHED[name], abs=0.006)


def test_4_bits_on_hopper_take_what_was_measured_there() -> None:
    """5.62 GiB of the 8B shapes, on an H200."""
    spec = named_spec("llama-3.1-8b")
    assert spec is not None
    made = plan(spec, "bfloat16", wanted_formats(spec, Quantization("nf4")), GPU, 80 * GIB, SMALL)
    assert made.memory["weights"] / GIB == pytest.approx(5.62, abs=0.005)
    assert made.estimated == ("workspace", "runtime")
    padded = made.memory["kv"] - made.settings["--kv-cache-memory"]
    assert padded == made.page_bytes, "a page for the padded rows of captured graphs"


def test_without_a_load_it_is_what_serve_would_choose() -> None:
    spec = named_spec("llama-3.1-8b")
    assert spec is not None
    made = plan(spec, "bfloat16", {}, GPU, 80 * GIB, Load())
    assert 0 <= made.left < 2 * GIB, "all of a GPU is given out, but some slack"
    assert made.memory["adapters"] == pytest.approx((80 * GIB - made.memory["weights"] - GIB) / 10, rel=0.01)
    on_cpu = plan(spec, "bfloat16", {}, this_cpu(), 80 * GIB, Load())
    assert on_cpu.memory["adapters"] <= GIB
    assert advice(on_cpu, Load(), 0)


def test_quantizing_twice_is_refused_as_serve_does(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(Exception, match="quantized to fp4 already"):
        wanted_quantization(config, "nf4", 64, True, ())


def test_rows_are_whole_pages() -> None:
    assert [adapter_rows(rank) for rank in (1, 4, 5, 16)] == [4, 4, 8, 16]
    assert set(FAMILIES) >= {"llama", "qwen3"}
