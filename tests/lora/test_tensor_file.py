"""Tensors read from a file that may change under the reader, against what safetensors wrote."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import InvalidAdapter
from adapters.validation import Limits, opened, read_header
from server.lora.weights import read_tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_that_were_saved(path: Path, dtype: torch.dtype) -> None:
    saved = {name: torch.randn(rows, 7).to(dtype) for name, rows in (("a", 3), ("b", 5), ("c", 1))}
    assert_read_back(saved, path)


def test_dtypes_may_be_mixed_and_lie_unaligned(path: Path) -> None:
    saved = {"a": torch.randn(1, 1).half(), "b": torch.randn(3, 5), "c": torch.randn(3, 3).bfloat16()}
    save_file({"b": saved["b"]}, path)
    header = {
        "a": {"dtype": "F16", "shape": [1, 1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [3, 5], "data_offsets": [2, 62]},
        "c": {"dtype": "BF16", "shape": [3, 3], "data_offsets": [62, 80]},
    }
    raw = json.dumps(header).encode()
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in saved.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert_read_back(saved, path, write=False)


def assert_read_back(saved: dict[str, torch.Tensor], path: Path, write: bool = True) -> None:
    if write:
        save_file(saved, path)
    with opened(path) as fd:
        found = read_tensors(fd, read_header(fd, Limits()))
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_crash(path: Path) -> None:
    """Under a memory map the process would be killed by SIGBUS."""
    save_file({"a": torch.ones(64, 1024), "b": torch.ones(64, 1024)}, path)
    with opened(path) as fd:
        entries = read_header(fd, Limits())
        os.truncate(path, entries[1].start + 8)
        with pytest.raises(InvalidAdapter, match="b: truncated"):
            read_tensors(fd, entries)
        os.truncate(path, 4096)
        with pytest.raises(InvalidAdapter, match="a: truncated"):
            read_tensors(fd, entries)
