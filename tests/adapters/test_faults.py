"""A corpus of broken adapters, made by code: each is refused with the right error, which names what is wrong."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.errors import InvalidAdapter, UnsupportedAdapter
from adapters.layout import Limits, read_layout
from adapters.validation import Scan, TensorEntry, opened, scan
from tests.adapters.builders import LINEARS, Q0, config, packed, safetensors, tensors, write_adapter

A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Break = Callable[[Path], object]


def weights(raw: bytes) -> Break:
    return lambda directory: (directory / WEIGHTS).write_bytes(raw)


def values(**changes: np.ndarray | None) -> Break:
    """Tensors changed, added (`name=array`) or taken away (`name=None`)."""
    named = {**tensors(), **changes}
    return weights(safetensors({name: value for name, value in named.items() if value is not None}))


def header(edit: Callable[[dict[str, Any]], None]) -> Break:
    """The header rewritten, the data kept."""
    raw = safetensors(tensors())
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    edit(content)
    return weights(packed(json.dumps(content), raw[8 + length :]))


def settings(**changes: Any) -> Break:
    return lambda directory: (directory / CONFIG).write_text(json.dumps(config(**changes)))


def config_text(text: str | bytes) -> Break:
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda directory: (directory / CONFIG).write_bytes(raw)


def link(name: str, target: str) -> Break:
    def apply(directory: Path) -> None:
        (directory / name).rename(directory / "moved")
        (directory / name).symlink_to(target)

    return apply


def fifo(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    os.mkfifo(directory / WEIGHTS)


def only_pickle(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


def with_bits(name: str, value: float, dtype: str) -> Break:
    """One element set to NaN or infinity, in each dtype."""
    changed = tensors()
    if dtype == "BF16":
        changed = {key: (array.view(np.uint32) >> 16).astype(np.uint16) for key, array in changed.items()}
        changed[name].flat[7] = np.array(value, dtype=np.float32).view(np.uint32) >> 16
    else:
        changed = {key: array.astype({"F16": np.float16, "F32": np.float32}[dtype]) for key, array in changed.items()}
        changed[name].flat[7] = value
    return weights(safetensors(changed))


RAW = safetensors(tensors())
LENGTH = 8 + int.from_bytes(RAW[:8], "little")
TWICE = '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def duplicate_layer(content: dict[str, Any]) -> None:
    content[A]["data_offsets"] = content[B]["data_offsets"]


INVALID: dict[str, tuple[Break, str]] = {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS}: not found"),
    "no config": (lambda d: (d / CONFIG).unlink(), f"{CONFIG}: not found"),
    "a pickle beside": (only_pickle, "adapter_model.bin: is a pickle"),
    "a pickle inside": (weights(pickle.dumps({"a": list(range(50))}, protocol=4)), f"{WEIGHTS}: holds a pickle"),
    "an old pickle inside": (weights(pickle.dumps({"a": 1}, protocol=2) * 3), f"{WEIGHTS}: holds a pickle"),
    "a torch archive": (weights(b"PK\x03\x04" + bytes(200)), f"{WEIGHTS}: holds a pickle"),
    "a git lfs pointer": (weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS pointer"),
    "empty file": (weights(b""), "truncated"),
    "truncated length": (weights(RAW[:5]), "truncated"),
    "truncated header": (weights(RAW[: LENGTH - 10]), "truncated within its header"),
    "truncated data": (weights(RAW[:-1]), "truncated: its tensors end at byte"),
    "trailing data": (weights(RAW + b"x"), "1 bytes after its last tensor"),
    "huge header": (weights(packed("{}" + " " * (2 << 20))), "header says"),
    "absurd header": (weights(b"\xff" * 8 + b"{}"), "header says"),
    "header is no JSON": (weights(packed("{nonsense")), "not valid JSON"),
    "header is no object": (weights(packed("[1]")), "not a JSON object"),
    "header is not UTF-8": (weights(b"\x04\0\0\0\0\0\0\0{\xff\xfe}"), "not valid JSON"),
    "header nested deeply": (weights(packed("[" * 200_000)), "not valid JSON"),
    "header with a huge number": (weights(packed('{"a":' + "9" * 10_000 + "}")), "not valid JSON"),
    "a key twice": (weights(packed(TWICE, bytes(4))), "'x' appears twice"),
    "metadata of another kind": (header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__"),
    "too many tensors": (
        weights(packed(json.dumps({str(i): {} for i in range(20_000)}))),
        "20000 tensors; at most 16384",
    ),
    "a million empty tensors": (
        weights(packed("{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0]}}' for i in range(1_000_000)) + "}")),
        "header says",
    ),
    "no tensors": (weights(packed("{}")), f"{A}: missing"),
    "dtype F64": (values(**{A: np.zeros((4, 16))}), f"{A}: dtype 'F64'"),
    "dtype I8": (values(**{B: np.zeros((16, 4), dtype=np.int8)}), f"{B}: dtype 'I8'"),
    "dtype of another kind": (header(lambda h: h[A].update(dtype=[])), f"{A}: dtype []"),
    "entry without shape": (header(lambda h: h[A].pop("shape")), f"{A}: its header entry"),
    "entry with more": (header(lambda h: h[A].update(more=1)), f"{A}: its header entry"),
    "negative shape": (header(lambda h: h[A].update(shape=[-4, -16])), f"{A}: shape"),
    "shape of floats": (header(lambda h: h[A].update(shape=[4.0, 16])), f"{A}: shape"),
    "shape of booleans": (header(lambda h: h[A].update(shape=[True, 64])), f"{A}: shape"),
    "shape against offsets": (header(lambda h: h[A].update(shape=[4, 17])), f"{A}: its data_offsets span"),
    "shape that overflows": (header(lambda h: h[A].update(shape=[2**62, 2**62])), f"{A}: its data_offsets span"),
    "offsets backwards": (header(lambda h: h[A].update(data_offsets=[256, 0])), f"{A}: its data_offsets span"),
    "offsets past the end": (header(lambda h: h[A].update(data_offsets=[2**60, 2**60 + 256])), "data_offsets"),
    "offsets shared": (header(duplicate_layer), "overlap"),
    "A missing": (values(**{A: None}), f"{A}: missing"),
    "B missing": (values(**{B: None}), f"{B}: missing"),
    "A transposed": (values(**{A: np.ones((16, 4), dtype=np.float32)}), f"{A}: has shape [16, 4]"),
    "A of another width": (values(**{A: np.ones((4, 20), dtype=np.float32)}), f"{A}: has shape [4, 20]"),
    "B of another rank": (values(**{B: np.ones((16, 5), dtype=np.float32)}), f"{B}: has shape [16, 5]"),
    "A flat": (values(**{A: np.ones(64, dtype=np.float32)}), f"{A}: has shape [64]"),
    "rank lie": (settings(r=8), "rank 8 on model.layers.0.self_attn.q_proj needs [8, 16]"),
    "extra layer": (
        values(**{"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": np.ones((4, 16), dtype=np.float32)}),
        "layers.2.mlp.up_proj.lora_A.weight: belongs to no linear layer",
    ),
    "extra tensor": (values(thing=np.ones(3, dtype=np.float32)), "thing: belongs to no linear layer"),
    "no prefix": (
        weights(safetensors({name.removeprefix("base_model.model."): v for name, v in tensors().items()})),
        f"{A}: missing",
    ),
    "a part that is none": (
        values(**{f"{Q0}.lora_C.weight": np.ones((4, 4), dtype=np.float32)}),
        "lora_C.weight: belongs to no linear layer",
    ),
    "the layer's own weight": (
        values(**{f"{Q0}.weight": np.ones((16, 16), dtype=np.float32)}),
        f"{Q0}.weight: is not lora_A.weight or lora_B.weight",
    ),
    "a layer not targeted": (settings(target_modules=["v_proj"]), f"{A}: {CONFIG} does not adapt"),
    "a layer excluded": (settings(exclude_modules=["q_proj"]), f"{A}: {CONFIG} does not adapt"),
    "a layer too many": (settings(target_modules=["q_proj", "v_proj", "up_proj"]), "up_proj.lora_A.weight: missing"),
    "NaN": (with_bits(A, np.nan, "F32"), f"{A}: holds NaN or infinity (first at element 7)"),
    "infinity": (with_bits(B, -np.inf, "F32"), f"{B}: holds NaN"),
    "NaN in F16": (with_bits(A, np.nan, "F16"), f"{A}: holds NaN"),
    "infinity in F16": (with_bits(B, np.inf, "F16"), f"{B}: holds NaN"),
    "NaN in BF16": (with_bits(A, np.nan, "BF16"), f"{A}: holds NaN"),
    "infinity in BF16": (with_bits(B, -np.inf, "BF16"), f"{B}: holds NaN"),
    "no effect": (
        weights(safetensors({n: v if "lora_A" in n else np.zeros_like(v) for n, v in tensors().items()})),
        "changes nothing",
    ),
    "no effect, negative zeros": (
        weights(safetensors({n: v if "lora_A" in n else -np.zeros_like(v) for n, v in tensors().items()})),
        "changes nothing",
    ),
    "no effect by alpha": (settings(lora_alpha=0), "changes nothing"),
    "weights are a link": (link(WEIGHTS, "moved"), f"{WEIGHTS}: is a symbolic link"),
    "config is a link": (link(CONFIG, "/etc/passwd"), f"{CONFIG}: is a symbolic link"),
    "weights are a pipe": (fifo, f"{WEIGHTS}: is not a regular file"),
    "weights are a directory": (
        lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
        f"{WEIGHTS}: is not a regular file",
    ),
    "config is no JSON": (config_text("{"), f"{CONFIG}: is not valid JSON"),
    "config is a list": (config_text("[]"), f"{CONFIG}: is not a JSON object"),
    "config with NaN": (config_text('{"r": NaN}'), f"{CONFIG}: is not valid JSON: NaN"),
    "config with a key twice": (config_text('{"r": 4, "r": 8}'), "'r' appears twice"),
    "config is not UTF-8": (config_text(b'{"r": "\xff"}'), f"{CONFIG}: is not valid JSON"),
    "config is huge": (config_text(" " * (1 << 20) + "{}"), f"{CONFIG}: 1048578 bytes"),
    "rank nought": (settings(r=0), "r is 0"),
    "rank negative": (settings(r=-4), "r is -4"),
    "rank huge": (settings(r=10**9), "r is 1000000000"),
    "rank of another kind": (settings(r="4"), "r is '4'"),
    "rank true": (settings(r=True), "r is True"),
    "alpha of another kind": (settings(lora_alpha="8"), "lora_alpha is '8'"),
    "alpha null": (settings(lora_alpha=None), "lora_alpha is None"),
    "alpha infinite": (
        config_text(json.dumps(config()).replace('"lora_alpha": 8', '"lora_alpha": 1e999')),
        "alpha is inf",
    ),
    "use_rslora one": (settings(use_rslora=1), "use_rslora is 1"),
    "use_rslora of another kind": (settings(use_rslora="yes"), "use_rslora is 'yes'"),
    "rank_pattern of another kind": (settings(rank_pattern=[1]), "rank_pattern must be an object"),
    "rank_pattern with rank 0": (settings(rank_pattern={"q_proj": 0}), "rank_pattern['q_proj'] is 0"),
    "rank_pattern no expression": (settings(rank_pattern={"(": 4}), "rank_pattern has the pattern"),
    "alpha_pattern of another kind": (settings(alpha_pattern={"q_proj": "x"}), "alpha_pattern['q_proj'] is 'x'"),
    "no target_modules": (settings(target_modules=None), "target_modules must name"),
    "empty target_modules": (settings(target_modules=[]), "target_modules must name"),
    "target_modules of numbers": (settings(target_modules=[1]), "target_modules must be a list of names"),
    "target_modules match nothing": (settings(target_modules=["c_attn"]), "target_modules matches no linear layer"),
    "target_modules no expression": (settings(target_modules="*q"), "target_modules has the pattern"),
    "target_modules would hang": (settings(target_modules="(?:(?=a*b*)[a-z.0-9_]*)*" * 150 + "!"), "target_modules"),
    "layers of another kind": (settings(layers_to_transform="0"), "layers_to_transform must be"),
    "layers with an expression": (
        settings(target_modules=".*q_proj", layers_to_transform=[0]),
        "layers_to_transform cannot be used",
    ),
    "layers_pattern alone": (settings(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
    "layers_pattern an expression": (
        settings(layers_to_transform=[0], layers_pattern="(a+)+"),
        "layers_pattern must be the plain name",
    ),
}


@pytest.mark.parametrize(("break_it", "named"), INVALID.values(), ids=INVALID.keys())
def test_broken_adapters_are_refused(break_it: Break, named: str, tmp_path: Path) -> None:
    break_it(write_adapter(tmp_path))
    started = time.process_time()
    with pytest.raises(InvalidAdapter) as caught:
        read_layout(tmp_path, LINEARS)
    assert not isinstance(caught.value, UnsupportedAdapter)
    assert named in " ".join(caught.value.faults)
    assert "\n" not in caught.value.message
    assert time.process_time() - started < 5  # generous: a hang, not a bar of speed
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "ADAPTER_INVALID")


UNSUPPORTED: dict[str, tuple[Break, str]] = {
    "dora": (settings(use_dora=True), "use_dora"),
    "bias all": (settings(bias="all"), "bias 'all'"),
    "lora_bias": (settings(lora_bias=True), "lora_bias"),
    "modules_to_save": (settings(modules_to_save=["lm_head"]), "modules_to_save"),
    "token indices": (settings(trainable_token_indices=[3]), "trainable_token_indices"),
    "parameters": (settings(target_parameters=["mlp.experts"]), "target_parameters"),
    "fan_in_fan_out": (settings(fan_in_fan_out=True), "fan_in_fan_out"),
    "megatron": (settings(megatron_config={"a": 1}), "megatron_config"),
    "layer replication": (settings(layer_replication=[[0, 2]]), "layer_replication"),
    "qalora": (settings(use_qalora=True), "use_qalora"),
    "alora": (settings(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "arrow": (settings(arrow_config={"top_k": 3}), "arrow_config"),
    "bdlora": (settings(use_bdlora={"nblocks": 2}), "use_bdlora"),
    "kasa": (settings(kasa_config={"beta": 1.0}), "kasa_config"),
    "velora": (settings(velora_config={"scale": 1.0}), "velora_config"),
    "monteclora": (settings(monteclora_config={"a": 1}), "monteclora_config"),
    "no peft_type": (settings(peft_type=None), "peft_type None"),
    "prefix tuning": (settings(peft_type="PREFIX_TUNING"), "peft_type 'PREFIX_TUNING'"),
    "adalora": (settings(peft_type="ADALORA"), "peft_type 'ADALORA'"),
    "classification": (settings(task_type="SEQ_CLS"), "task_type 'SEQ_CLS'"),
    "pissa": (settings(init_lora_weights="pissa_niter_16"), "init_lora_weights 'pissa_niter_16'"),
    "olora": (settings(init_lora_weights="OLoRA"), "init_lora_weights 'OLoRA'"),
    "corda": (settings(init_lora_weights="corda"), "init_lora_weights 'corda'"),
    "loftq": (settings(init_lora_weights="loftq"), "init_lora_weights 'loftq'"),
    "lora_ga": (settings(init_lora_weights="lora_ga"), "init_lora_weights 'lora_ga'"),
    "an init to come": (settings(init_lora_weights="zeta"), "init_lora_weights 'zeta' is not known"),
    "a key to come": (settings(use_quora=True), "use_quora is not known"),
    "a head targeted": (settings(target_modules=["q_proj", "v_proj", "lm_head"]), "takes in lm_head"),
    "embeddings by expression": (settings(target_modules=r".*(q_proj|v_proj|embed_tokens)"), "model.embed_tokens"),
    "a magnitude": (values(**{f"{Q0}.lora_magnitude_vector": np.ones(16, dtype=np.float32)}), "a DoRA magnitude"),
    "a saved head": (
        values(**{"base_model.model.lm_head.weight": np.ones((32, 16), dtype=np.float32)}),
        "base_model.model.lm_head.weight: an adapted or saved embedding",
    ),
    "an embedding": (
        values(**{"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 32), dtype=np.float32)}),
        "embed_tokens.lora_embedding_A: an adapted or saved embedding",
    ),
    "a bias of B": (values(**{f"{Q0}.lora_B.bias": np.ones(16, dtype=np.float32)}), "lora_B.bias: a bias of LoRA"),
    "a trained bias": (values(**{f"{Q0}.bias": np.ones(16, dtype=np.float32)}), "bias: a trained bias"),
}


@pytest.mark.parametrize(("break_it", "named"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_is_not_honoured_is_refused_by_name(break_it: Break, named: str, tmp_path: Path) -> None:
    break_it(write_adapter(tmp_path))
    with pytest.raises(UnsupportedAdapter) as caught:
        read_layout(tmp_path, LINEARS)
    assert named in " ".join(caught.value.faults)
    assert caught.value.reason == "ADAPTER_UNSUPPORTED"


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
    header(lambda content: content.update({name: entry}))(write_adapter(tmp_path))
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


@pytest.mark.parametrize("case", ["a million empty tensors", "header nested deeply", "target_modules would hang"])
def test_hostile_files_cost_little_memory(case: str, tmp_path: Path) -> None:
    INVALID[case][0](write_adapter(tmp_path))
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from adapters.errors import InvalidAdapter\n"
        "from adapters.layout import read_layout\n"
        "from tests.adapters.builders import LINEARS\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_layout(Path(sys.argv[1]), LINEARS)\n"
        "except InvalidAdapter: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(ran.stdout) * 1024 < 200 << 20  # KiB on Linux
