"""The tokenizer and chat templates against transformers, on tokenizers saved by transformers."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.errors import BaseModelError, InvalidRequest
from server.frontend.tokenizer import Tokenizer
from server.frontend.types import ChatMessage
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer, sentencepiece_tokenizer

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
INST = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
Date: {{ date_string }}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}"""
JSON_TURNS = """{% set ns = namespace(last='') %}
{% for message in messages %}
{% set ns.last = message.role %}
{{ message | tojson }}
{% generation %}{{ message.content[:3] | upper }}{% endgeneration %}
{{ {'b': '<&>é', 'a': [1, none, true]} | tojson(indent=2) }}
{% endfor %}
last={{ ns.last }}{% if pad_token is defined %} pad={{ pad_token }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "inst": INST, "headers": HEADERS, "json": JSON_TURNS}

content = st.text(max_size=20)
conversations = st.lists(content, min_size=1, max_size=5).map(
    lambda turns: [ChatMessage(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
)


def save(directory: Path, backend: Any, **settings: Any) -> tuple[Tokenizer, Any]:
    """Saved by transformers, read by ours and by AutoTokenizer."""
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(directory)
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    if request.param == "byte-level":
        backend, names = byte_level_tokenizer(), {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    else:
        backend, names = sentencepiece_tokenizer(), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save(tmp_path_factory.mktemp("tokenizer"), backend, **names)


@given(text=st.one_of(st.text(min_size=1), st.sampled_from(["the<|end|> quick", " <s>x</s> ", "a<tool>b"])))
@settings(max_examples=150)
def test_encodes_text_as_transformers_does(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    assert ours.encode_text(text) == theirs.encode(text)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_encodes_chats_as_transformers_does(template: str, tmp_path: Path) -> None:
    ours, theirs = save(
        tmp_path,
        byte_level_tokenizer(),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=template,
    )

    @given(conversations)
    @settings(max_examples=60)
    def check(messages: list[ChatMessage]) -> None:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == expected

    check()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_the_config_decides_which_special_tokens_go_around_a_text(tmp_path: Path, bos: bool, eos: bool) -> None:
    ours, theirs = save(
        tmp_path,
        sentencepiece_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=bos,
        add_eos_token=eos,
    )
    ids = ours.encode_text("the dog")
    assert ids == theirs.encode("the dog")
    assert (ids[0] == 0, ids[-1] == 1) == (bos, eos)


def test_special_tokens_may_be_dicts_or_in_their_own_file(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    config = {
        "bos_token": {"content": "<|begin|>", "lstrip": False, "__type": "AddedToken"},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    ids = Tokenizer.load(tmp_path).encode_chat([ChatMessage("user", "the")])
    assert (ids[0], ids[-1]) == (0, 1)


def test_a_token_that_only_the_config_calls_special_adds_no_text(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<tool>"}))
    backend = Tokenizer.load(tmp_path).backend
    assert backend.decode([backend.token_to_id("<tool>")], skip_special_tokens=True) == ""


def test_the_template_file_goes_before_the_configs(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("new")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.backend.decode(tokenizer.encode_chat([ChatMessage("user", "x")])) == "new"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only user and assistant roles') }}", "only user and assistant roles"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages[3].content.strip() }}", "no element 3"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_refuses_is_the_requests_fault(tmp_path: Path, template: str, reason: str) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        Tokenizer.load(tmp_path).encode_chat([ChatMessage("user", "hello")])
    assert caught.value.field == "messages"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        Tokenizer.load(tmp_path).encode_chat([ChatMessage("user", "hello")])
    assert caught.value.field == "messages"


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequest, match="text: is not valid Unicode"):
        Tokenizer.load(tmp_path).encode_text("a\ud800b")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("chat_template.jinja", "{% if %}", "chat template, line 1"),
        ("chat_template.jinja", "\xff", "chat_template.jinja is not UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str | None, content: str, message: str) -> None:
    if file is not None:
        byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(BaseModelError, match=message):
        Tokenizer.load(tmp_path)


def test_encoding_a_long_text_lets_other_threads_run(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = Tokenizer.load(tmp_path), "the quick fox " * 50_000
    encoding = threading.Event()
    encoded: list[int] = []

    def encode() -> None:
        encoding.set()
        encoded.extend(tokenizer.encode_text(text))

    thread = threading.Thread(target=encode)
    thread.start()
    encoding.wait()
    turns = 0
    while thread.is_alive():
        time.sleep(0)
        turns += 1
    assert turns > 20  # with the lock held it would be a few, before and after
    assert encoded == tokenizer.encode_text(text)


def test_the_front_end_imports_neither_torch_nor_transformers_nor_protobuf() -> None:
    program = (
        "import sys, importlib, pkgutil, server.frontend as package\n"
        "names = [module.name for module in pkgutil.iter_modules(package.__path__)]\n"
        "for name in names: importlib.import_module('server.frontend.' + name)\n"
        "print(*{name.split('.')[0] for name in sys.modules}, 'google.protobuf' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "tokenizers" in loaded
    assert not {"torch", "transformers", "grpc", "safetensors", "True"} & set(loaded)
