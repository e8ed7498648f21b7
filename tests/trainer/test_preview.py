"""What `trainer preview` shows is what is trained on; `trainer estimate` adds up."""

import json
from pathlib import Path

import pytest

from server.base.resolve import BaseModel
from trainer.cli import main
from trainer.preview import preview
from trainer.settings import Settings


def test_the_pieces_are_the_text_and_the_learned_ones_the_answer(base: BaseModel, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "été?"}, {"role": "assistant", "content": "漢字 👍🏽 dogs"}]
    data.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "never shown"}))
    (shown,) = preview(Settings(base=str(base.path), data=str(data)), 1, lambda note: None)
    assert shown.place == f"{data}:1"
    assert "".join(text for text, _ in shown.pieces) == (
        "<|begin|>user\nété?<|end|>\n<|begin|>assistant\n漢字 👍🏽 dogs<|end|>\n"
    )
    assert "".join(text for text, learned in shown.pieces if learned) == "漢字 👍🏽 dogs<|end|>"


def test_the_commands_print_it(base: BaseModel, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--base", str(base.path), "--device", "cpu"]
    assert main(["preview", *options, "--data", str(data), "--rows", "1"]) == 0
    assert "«seven lazy dogs<|end|>»" in capsys.readouterr().out
    assert main(["preview", *options]) == 2
    assert "data is missing" in capsys.readouterr().err
    assert main(["estimate", *options, "--length", "32", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["checkpointing"]["off"]
    assert parts.pop("total") == sum(parts.values()) > 0
