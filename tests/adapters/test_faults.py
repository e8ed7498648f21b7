"""Every adapter of the corpus is refused with the right error, which names what is wrong; and at a low price."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.errors import InvalidAdapter, UnsupportedAdapter
from adapters.layout import Limits, read_layout
from adapters.validation import Scan, TensorEntry, opened, scan
from tests.adapters.bounds import BYTES, SECONDS
from tests.adapters.builders import LINEARS, config, tensors, write_adapter
from tests.adapters.corpus import LINKED, WEIGHTS, A, B, Broken, Maker, corpus

ROOT = Path(__file__).parents[2]
CORPUS = corpus()


@pytest.mark.parametrize("broken", CORPUS.values(), ids=CORPUS.keys())
def test_broken_adapters_are_refused(broken: Broken, tmp_path: Path) -> None:
    broken.write(tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        read_layout(tmp_path, LINEARS)
    assert type(caught.value) is broken.kind
    assert broken.named in " ".join(caught.value.faults)
    assert "\n" not in caught.value.message
    reason = "ADAPTER_UNSUPPORTED" if broken.kind is UnsupportedAdapter else "ADAPTER_INVALID"
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", reason)


def test_all_are_refused_within_a_second_and_200_mb(tmp_path: Path) -> None:
    """Of CPU time and of memory, each in a process of its own, when read and when published."""
    names = {f"{number:03}": name for number, name in enumerate(CORPUS)}
    for number, name in names.items():
        CORPUS[name].write(tmp_path / "broken" / number)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.adapters.bounds", tmp_path / "broken"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["name"] for line in lines] == list(names)
    assert len(lines) > 140
    for line in lines:
        name = names[line["name"]]
        for way, outcome in line["outcomes"].items():
            what = f"{name}, {way}: {outcome}"
            assert outcome["seconds"] <= SECONDS, what
            assert outcome["bytes"] <= BYTES, what
            if (name, way) == (LINKED, "publish"):
                assert outcome["kind"] == "taken"
            else:
                assert outcome["kind"] == CORPUS[name].kind.__name__, what
                assert CORPUS[name].named in " ".join(outcome["faults"]), what
    assert (
        not list((tmp_path / "stores").glob("*/versions/*")) or len(list((tmp_path / "stores").glob("*/names/*"))) == 1
    )


def test_the_corpus_fits_any_base(tmp_path: Path) -> None:
    """Each case is refused for the same reason whatever the base's sizes and number of layers."""
    sizes = {"q_proj": (48, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 48), "up_proj": (64, 32)}
    linears = {
        f"model.layers.{layer}.{'mlp' if name == 'up_proj' else 'self_attn'}.{name}": size
        for layer in range(3)
        for name, size in sizes.items()
    }
    for number, (name, broken) in enumerate(corpus(linears).items()):
        with pytest.raises(InvalidAdapter) as caught:
            read_layout(broken.write(tmp_path / str(number)), linears)
        assert type(caught.value) is broken.kind, name
        assert broken.named in " ".join(caught.value.faults), name


HARMLESS: dict[str, dict[str, Any]] = {
    "bookkeeping": {"auto_mapping": {"a": "b"}, "revision": "main", "peft_version": "9.9", "inference_mode": False},
    "training": {"lora_dropout": 0.3, "runtime_config": {"ephemeral_gpu_offload": True}, "megatron_core": "x"},
    "false and empty": {"use_dora": False, "lora_bias": None, "modules_to_save": [], "a_key_to_come": None},
    "initialised": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "corda_config": {"x": 1}},
    "defaults left out": dict.fromkeys(("task_type", "rank_pattern", "use_rslora", "bias")),
}


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_does_not_change_the_result_is_taken(changes: dict[str, Any], tmp_path: Path) -> None:
    layout = read_layout(write_adapter(tmp_path, settings=config(**changes)), LINEARS)
    assert {(module.rank, module.scaling) for module in layout.modules.values()} == {(4, 2.0)}
    assert len(layout.modules) == 4


def test_all_faults_are_listed_and_the_message_stays_short(tmp_path: Path) -> None:
    broken = {name: value[:, :3] for name, value in tensors().items()}
    write_adapter(tmp_path, broken | {"x": np.ones(1, dtype=np.float32)})
    with pytest.raises(InvalidAdapter) as caught:
        read_layout(tmp_path, LINEARS)
    assert len(caught.value.faults) == 9
    assert all(any(fault.startswith(name) for fault in caught.value.faults) for name in broken)
    assert caught.value.message.endswith("(9 faults in all)")
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("name", ["x\ny", "\x1b[2J", "\ud800", "\u202e", "n" * 100_000])
def test_names_from_the_file_are_made_safe_to_show(name: str, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    Maker().header(lambda content: content.update({name: entry}))(write_adapter(tmp_path))
    with pytest.raises(InvalidAdapter, match=r"belongs to no linear layer|nnnnnnn") as caught:
        read_layout(tmp_path, LINEARS)
    assert caught.value.message.isprintable()
    assert caught.value.message.encode()
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(("dtype", "exponent"), [("F16", 0x7C00), ("BF16", 0x7F80)])
def test_every_16_bit_value_is_judged_rightly(dtype: str, exponent: int, tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    floats = bits.view(np.float16) if dtype == "F16" else (bits.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(floats)
    assert (((bits & exponent) == exponent) == ~finite).all()
    (tmp_path / "raw").write_bytes(np.concatenate([bits[finite], bits[~finite]]).tobytes())
    edge = 2 * int(finite.sum())
    with opened(tmp_path / "raw") as fd:
        assert scan(fd, TensorEntry("finite", dtype, (edge // 2,), 0, edge)) == Scan(is_zero=False, first_bad=None)
        for start in range(edge, 1 << 17, 2):
            assert scan(fd, TensorEntry("not", dtype, (1,), start, start + 2)).first_bad == 0
        for start, value in enumerate(floats[finite]):
            if start % 97 == 0 or value == 0:
                found = scan(fd, TensorEntry("one", dtype, (1,), 2 * start, 2 * start + 2))
                assert found.is_zero == bool(value == 0)


def test_faults_of_values_are_all_listed(tmp_path: Path) -> None:
    write_adapter(tmp_path, {name: np.full_like(value, np.nan) for name, value in tensors().items()})
    with pytest.raises(InvalidAdapter) as caught:
        read_layout(tmp_path, LINEARS)
    assert len(caught.value.faults) == len(tensors())


def test_a_late_fault_is_found_in_a_tensor_of_many_chunks(tmp_path: Path) -> None:
    width = 3 << 20
    linears = {"model.layers.0.self_attn.q_proj": (8, width)}
    a, b = np.zeros((1, width), dtype=np.float16), np.ones((8, 1), dtype=np.float16)
    a[0, 0] = 1
    a[0, -1] = np.inf
    write_adapter(tmp_path, {A: a, B: b}, config(r=1, target_modules=["q_proj"]))
    with pytest.raises(InvalidAdapter, match=rf"first at element {width - 1}\)"):
        read_layout(tmp_path, linears)
    a[0, -1] = 1
    write_adapter(tmp_path, {A: a, B: b}, config(r=1, target_modules=["q_proj"]))
    assert read_layout(tmp_path, linears).dtype == "F16"


def test_without_effect_is_taken_when_asked_for(tmp_path: Path) -> None:
    write_adapter(tmp_path, {name: np.zeros_like(value) for name, value in tensors().items()})
    assert len(read_layout(tmp_path, LINEARS, allow_zero=True).modules) == 4


def test_effect_of_one_layer_is_enough(tmp_path: Path) -> None:
    one = {name: value if name in (A, B) else np.zeros_like(value) for name, value in tensors().items()}
    assert len(read_layout(write_adapter(tmp_path, one), LINEARS).modules) == 4


def test_mixed_dtypes_are_told_as_the_one_that_holds_all(tmp_path: Path) -> None:
    mixed = {name: value.astype(np.float16) if "lora_A" in name else value for name, value in tensors().items()}
    assert read_layout(write_adapter(tmp_path, mixed), LINEARS).dtype == "F32"


def test_limits_can_be_narrowed(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    read_layout(tmp_path, LINEARS, Limits(max_bytes=size, max_tensors=8, max_rank=4))
    for limits in (Limits(max_bytes=size - 1), Limits(max_tensors=7), Limits(max_rank=3), Limits(max_header_bytes=99)):
        with pytest.raises(InvalidAdapter, match=r"at most|from 1 to 3"):
            read_layout(tmp_path, LINEARS, limits)


def test_a_large_real_adapter_is_within_the_limits(tmp_path: Path) -> None:
    """126 layers, all linear layers: 1,764 tensors."""
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linears = {f"model.layers.{layer}.{name}": (8, 8) for layer in range(126) for name in names}
    one = np.ones((8, 8), dtype=np.float16)
    large = {f"base_model.model.{path}.lora_{part}.weight": one for path in linears for part in "AB"}
    write_adapter(tmp_path, large, config(r=8, target_modules="all-linear", rank_pattern=dict.fromkeys(linears, 8)))
    assert len(read_layout(tmp_path, linears).modules) == 882
