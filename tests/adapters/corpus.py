"""Broken adapters, made by code: of each, how it is made from a good one and what its refusal has to say.

For any base of the supported families: `corpus(linears)` gives them all.
"""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import InvalidAdapter, UnsupportedAdapter
from tests.adapters.builders import LINEARS, Q0, config, packed, safetensors, tensors, write_adapter

A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TWICE = '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
MANY = 16_384  # tensors: as many as are taken
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
Break = Callable[[Path], object]
# Taken where links inside the directory are followed, as importing does.
LINKED = "weights are a link"


@dataclass(frozen=True)
class Broken:
    """Refused with an error of exactly this `kind`, one of whose faults has `named` in it."""

    kind: type[InvalidAdapter]
    named: str
    break_it: Break
    tensors: Mapping[str, np.ndarray]

    def write(self, directory: Path) -> Path:
        """Make `directory` this broken adapter."""
        write_adapter(directory, dict(self.tensors))
        self.break_it(directory)
        return directory


def corpus(linears: Mapping[str, tuple[int, int]] = LINEARS) -> dict[str, Broken]:
    """Every case for a base with these linear layers, by name. Layer 0's q_proj has to be among them."""
    m = Maker(linears)
    cases: dict[str, tuple[type[InvalidAdapter], dict[str, tuple[Break, str]]]] = {
        "invalid": (InvalidAdapter, _files(m) | _tensors(m) | _settings() | _hostile(m)),
        "unsupported": (UnsupportedAdapter, _unsupported(m)),
    }
    return {
        name: Broken(kind, named, break_it, m.tensors())
        for kind, found in cases.values()
        for name, (break_it, named) in found.items()
    }


class Maker:
    """The ways to break an adapter that depend on the base."""

    def __init__(self, linears: Mapping[str, tuple[int, int]] = LINEARS) -> None:
        self._linears = linears
        self.outs, self.ins = linears["model.layers.0.self_attn.q_proj"]
        layers = {int(path.split(".")[2]) for path in linears}
        self.beyond = f"model.layers.{max(layers) + 1}.mlp.up_proj"
        self.raw = safetensors(self.tensors())
        self.header_end = 8 + int.from_bytes(self.raw[:8], "little")

    def tensors(self) -> dict[str, np.ndarray]:
        """Of a good adapter, rank 4 on q_proj and v_proj."""
        return tensors(linears=self._linears)

    def values(self, **changes: np.ndarray | None) -> Break:
        """Tensors changed, added (`name=array`) or taken away (`name=None`)."""
        named = {**self.tensors(), **changes}
        return weights(safetensors({name: value for name, value in named.items() if value is not None}))

    def header(self, edit: Callable[[dict[str, Any]], object]) -> Break:
        """The header rewritten, the data kept."""
        content = json.loads(self.raw[8 : self.header_end])
        edit(content)
        return weights(packed(json.dumps(content), self.raw[self.header_end :]))

    def with_bits(self, name: str, value: float, dtype: str, at: int = 7) -> Break:
        """One element set to NaN or infinity, in each dtype."""
        changed = self.tensors()
        if dtype == "BF16":
            changed = {key: (array.view(np.uint32) >> 16).astype(np.uint16) for key, array in changed.items()}
            changed[name].flat[at] = np.array(value, dtype=np.float32).view(np.uint32) >> 16
        else:
            kind = {"F16": np.float16, "F32": np.float32}[dtype]
            changed = {key: array.astype(kind) for key, array in changed.items()}
            changed[name].flat[at] = value
        return weights(safetensors(changed))


def weights(raw: bytes) -> Break:
    return lambda directory: (directory / WEIGHTS).write_bytes(raw)


def sparse(raw: bytes, size: int) -> Break:
    """A file of `size` bytes that takes no room."""

    def apply(directory: Path) -> None:
        with (directory / WEIGHTS).open("wb") as file:
            file.write(raw)
            file.truncate(size)

    return apply


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


def duplicate_layer(content: dict[str, Any]) -> None:
    content[A]["data_offsets"] = content[A.replace("layers.0", "layers.1")]["data_offsets"]


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def one_value(key: str, value: str) -> str:
    """The config with `key` set to a JSON text."""
    return re.sub(rf'"{key}": [^,}}]+', f'"{key}": {value}', json.dumps(config()))


def _files(m: Maker) -> dict[str, tuple[Break, str]]:
    return {
        "no weights": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS}: not found"),
        "no config": (lambda d: (d / CONFIG).unlink(), f"{CONFIG}: not found"),
        "a pickle beside": (only_pickle, "adapter_model.bin: is a pickle"),
        "a pickle inside": (weights(pickle.dumps({"a": list(range(50))}, protocol=4)), f"{WEIGHTS}: holds a pickle"),
        "an old pickle inside": (weights(pickle.dumps({"a": 1}, protocol=2) * 3), f"{WEIGHTS}: holds a pickle"),
        "a torch archive": (weights(b"PK\x03\x04" + bytes(200)), f"{WEIGHTS}: holds a pickle"),
        "a git lfs pointer": (
            weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "Git LFS pointer",
        ),
        "empty file": (weights(b""), "truncated"),
        "truncated length": (weights(m.raw[:5]), "truncated"),
        "truncated header": (weights(m.raw[: m.header_end - 10]), "truncated within its header"),
        "truncated data": (weights(m.raw[:-1]), "truncated: its tensors end at byte"),
        "trailing data": (weights(m.raw + b"x"), "1 bytes after its last tensor"),
        "huge header": (weights(packed("{}" + " " * (2 << 20))), "header says"),
        "absurd header": (weights(b"\xff" * 8 + b"{}"), "header says"),
        "header is no JSON": (weights(packed("{nonsense")), "not valid JSON"),
        "header is no object": (weights(packed("[1]")), "not a JSON object"),
        "header is not UTF-8": (weights(b"\x04\0\0\0\0\0\0\0{\xff\xfe}"), "not valid JSON"),
        "header nested deeply": (weights(packed("[" * 200_000)), "not valid JSON"),
        "header with a huge number": (weights(packed('{"a":' + "9" * 10_000 + "}")), "not valid JSON"),
        "a key twice": (weights(packed(TWICE, bytes(4))), "'x' appears twice"),
        "metadata of another kind": (m.header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__"),
        "too many tensors": (
            weights(packed(json.dumps({str(i): {} for i in range(20_000)}))),
            "20000 tensors; at most 16384",
        ),
        "a million empty tensors": (
            weights(packed("{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0]}}' for i in range(1_000_000)) + "}")),
            "header says",
        ),
        "weights are a link": (link(WEIGHTS, "moved"), f"{WEIGHTS}: is a symbolic link"),
        "config is a link": (link(CONFIG, "/etc/passwd"), f"{CONFIG}: is a symbolic link"),
        "weights are a pipe": (fifo, f"{WEIGHTS}: is not a regular file"),
        "weights are a directory": (
            lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
            f"{WEIGHTS}: is not a regular file",
        ),
    }


def _tensors(m: Maker) -> dict[str, tuple[Break, str]]:
    return {
        "no tensors": (weights(packed("{}")), f"{A}: missing"),
        "dtype F64": (m.values(**{A: np.zeros((4, m.ins))}), f"{A}: dtype 'F64'"),
        "dtype I8": (m.values(**{B: np.zeros((m.outs, 4), dtype=np.int8)}), f"{B}: dtype 'I8'"),
        "dtype of another kind": (m.header(lambda h: h[A].update(dtype=[])), f"{A}: dtype []"),
        "entry without shape": (m.header(lambda h: h[A].pop("shape")), f"{A}: its header entry"),
        "entry with more": (m.header(lambda h: h[A].update(more=1)), f"{A}: its header entry"),
        "negative shape": (m.header(lambda h: h[A].update(shape=[-4, -16])), f"{A}: shape"),
        "shape of floats": (m.header(lambda h: h[A].update(shape=[4.0, 16])), f"{A}: shape"),
        "shape of booleans": (m.header(lambda h: h[A].update(shape=[True, 64])), f"{A}: shape"),
        "shape against offsets": (m.header(lambda h: h[A].update(shape=[4, m.ins + 1])), f"{A}: its data_offsets span"),
        "shape that overflows": (m.header(lambda h: h[A].update(shape=[2**62, 2**62])), f"{A}: its data_offsets span"),
        "offsets backwards": (m.header(lambda h: h[A].update(data_offsets=[256, 0])), f"{A}: its data_offsets span"),
        "offsets past the end": (m.header(lambda h: h[A].update(data_offsets=[2**60, 2**60 + 256])), "data_offsets"),
        "offsets shared": (m.header(duplicate_layer), "overlap"),
        "A missing": (m.values(**{A: None}), f"{A}: missing"),
        "B missing": (m.values(**{B: None}), f"{B}: missing"),
        "A transposed": (m.values(**{A: np.ones((m.ins, 4), dtype=np.float32)}), f"{A}: has shape [{m.ins}, 4]"),
        "A of another width": (
            m.values(**{A: np.ones((4, m.ins + 4), dtype=np.float32)}),
            f"{A}: has shape [4, {m.ins + 4}]",
        ),
        "B of another rank": (m.values(**{B: np.ones((m.outs, 5), dtype=np.float32)}), f"{B}: has shape [{m.outs}, 5]"),
        "A flat": (m.values(**{A: np.ones(64, dtype=np.float32)}), f"{A}: has shape [64]"),
        "rank lie": (settings(r=8), f"rank 8 on model.layers.0.self_attn.q_proj needs [8, {m.ins}]"),
        "extra layer": (
            m.values(**{f"base_model.model.{m.beyond}.lora_A.weight": np.ones((4, 16), dtype=np.float32)}),
            f"{m.beyond}.lora_A.weight: belongs to no linear layer",
        ),
        "extra tensor": (m.values(thing=np.ones(3, dtype=np.float32)), "thing: belongs to no linear layer"),
        "no prefix": (
            weights(safetensors({name.removeprefix("base_model.model."): v for name, v in m.tensors().items()})),
            f"{A}: missing",
        ),
        "a part that is none": (
            m.values(**{f"{Q0}.lora_C.weight": np.ones((4, 4), dtype=np.float32)}),
            "lora_C.weight: belongs to no linear layer",
        ),
        "the layer's own weight": (
            m.values(**{f"{Q0}.weight": np.ones((16, 16), dtype=np.float32)}),
            f"{Q0}.weight: is not lora_A.weight or lora_B.weight",
        ),
        "a layer not targeted": (settings(target_modules=["v_proj"]), f"{A}: {CONFIG} does not adapt"),
        "a layer excluded": (settings(exclude_modules=["q_proj"]), f"{A}: {CONFIG} does not adapt"),
        "a layer too many": (
            settings(target_modules=["q_proj", "v_proj", "up_proj"]),
            "up_proj.lora_A.weight: missing",
        ),
        "NaN": (m.with_bits(A, np.nan, "F32"), f"{A}: holds NaN or infinity (first at element 7)"),
        "infinity": (m.with_bits(B, -np.inf, "F32"), f"{B}: holds NaN"),
        "NaN in F16": (m.with_bits(A, np.nan, "F16"), f"{A}: holds NaN"),
        "infinity in F16": (m.with_bits(B, np.inf, "F16"), f"{B}: holds NaN"),
        "NaN in BF16": (m.with_bits(A, np.nan, "BF16"), f"{A}: holds NaN"),
        "infinity in BF16": (m.with_bits(B, -np.inf, "BF16"), f"{B}: holds NaN"),
        "no effect": (
            weights(safetensors({n: v if "lora_A" in n else np.zeros_like(v) for n, v in m.tensors().items()})),
            "changes nothing",
        ),
        "no effect, negative zeros": (
            weights(safetensors({n: v if "lora_A" in n else -np.zeros_like(v) for n, v in m.tensors().items()})),
            "changes nothing",
        ),
        "no effect by alpha": (settings(lora_alpha=0), "changes nothing"),
    }


def _settings() -> dict[str, tuple[Break, str]]:
    return {
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
        "alpha infinite": (config_text(one_value("lora_alpha", "1e999")), "1e999 is beyond"),
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
        "target_modules would hang": (
            settings(target_modules="(?:(?=a*b*)[a-z.0-9_]*)*" * 150 + "!"),
            "target_modules",
        ),
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


def _hostile(m: Maker) -> dict[str, tuple[Break, str]]:
    """What means to cost much time or memory, or to get out of its directory."""
    return {
        "header of 63 MB": (sparse(struct.pack("<Q", 63 << 20), (63 << 20) + 8), "header says 66060288 bytes"),
        "file of nine gigabytes": (sparse(m.raw, 9 << 30), "bytes; at most 8589934592 are taken"),
        "hole in the place of data": (sparse(m.raw[: m.header_end], len(m.raw)), "changes nothing"),
        "header of spaces": (weights(packed("{" + " " * 1_000_000 + "}")), f"{A}: missing"),
        "key twice at the end of many": (
            weights(packed("{" + ",".join(f'"{i}":0' for i in range(90_000)) + ',"x":0,"x":0}')),
            "'x' appears twice",
        ),
        "config with a key twice at the end of many": (
            config_text("{" + ",".join(f'"{i}":0' for i in range(90_000)) + ',"x":0,"x":0}'),
            "'x' appears twice",
        ),
        "every tensor empty": (weights(packed(compact({str(i): EMPTY for i in range(MANY)}))), f"{A}: missing"),
        "every tensor of a strange dtype": (
            weights(packed(compact({str(i): {**EMPTY, "dtype": "U8"} for i in range(MANY)}))),
            "0: dtype 'U8'",
        ),
        "shape of a hundred thousand sizes": (
            m.header(lambda h: h[A].update(shape=[2**31] * 80_000)),
            f"{A}: shape and data_offsets must be",
        ),
        "shape of huge sizes": (m.header(lambda h: h[A].update(shape=[10**4000] * 8)), f"{A}: shape and data_offsets"),
        "name of a megabyte": (m.header(lambda h: h.update({"n" * 1_000_000: EMPTY})), "nnnn"),
        "name that is a path": (
            m.values(**{"../../../../etc/passwd": np.ones(3, dtype=np.float32)}),
            "../../../../etc/passwd: belongs to no linear layer",
        ),
        "layer that is a path": (
            m.values(**{"base_model.model.../../x.lora_A.weight": np.ones((4, 4), dtype=np.float32)}),
            "../x.lora_A.weight: belongs to no linear layer",
        ),
        "NaN in the last element": (m.with_bits(B, np.nan, "F32", at=-1), f"{B}: holds NaN"),
        "config nested deeply": (config_text('{"x":' + "[" * 200_000), f"{CONFIG}: is not valid JSON"),
        "config with a huge number": (config_text('{"r":' + "9" * 900_000 + "}"), f"{CONFIG}: is not valid JSON"),
        "rank of many digits": (config_text(one_value("r", "9" * 4000)), "r is 999"),
        "config of many strange ranks": (
            settings(rank_pattern={f"k{i}": -1 for i in range(50_000)}),
            "rank_pattern['k0'] is -1",
        ),
        "config of many expressions": (
            settings(rank_pattern={f"[a-z][b-y]{i}": 4 for i in range(30_000)}),
            "matching takes too long",
        ),
        "config of long expressions": (
            settings(alpha_pattern={f"{i}" + "(a|b|cd)" * 500: 4 for i in range(200)}),
            "matching takes too long",
        ),
        "expression of many repetitions": (settings(target_modules=".{0,65535}" * 400 + "!"), "target_modules"),
        "expression nested deeply": (settings(target_modules="(" * 2000 + ")" * 2000), "nested too deeply"),
        "layers_pattern of many": (
            settings(layers_to_transform=[0], layers_pattern=[f"l{i}" for i in range(90_000)]),
            "layers_pattern must be the plain name",
        ),
        "target_modules of many": (settings(target_modules=[f"x{i}" for i in range(90_000)]), "matches no linear"),
    }


def _unsupported(m: Maker) -> dict[str, tuple[Break, str]]:
    return {
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
        "a magnitude": (m.values(**{f"{Q0}.lora_magnitude_vector": np.ones(16, dtype=np.float32)}), "a DoRA magnitude"),
        "a saved head": (
            m.values(**{"base_model.model.lm_head.weight": np.ones((32, 16), dtype=np.float32)}),
            "base_model.model.lm_head.weight: an adapted or saved embedding",
        ),
        "an embedding": (
            m.values(**{"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 32), dtype=np.float32)}),
            "embed_tokens.lora_embedding_A: an adapted or saved embedding",
        ),
        "a bias of B": (
            m.values(**{f"{Q0}.lora_B.bias": np.ones(16, dtype=np.float32)}),
            "lora_B.bias: a bias of LoRA",
        ),
        "a trained bias": (m.values(**{f"{Q0}.bias": np.ones(16, dtype=np.float32)}), "bias: a trained bias"),
    }
