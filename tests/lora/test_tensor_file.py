"""Tensors read from a file that may change under the reader, against what safetensors wrote."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import InvalidAdapter
from server.lora.weights import TensorFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_that_were_saved(path: Path, dtype: torch.dtype) -> None:
    saved = {name: torch.randn(rows, 7).to(dtype) for name, rows in (("a", 3), ("b", 5), ("c", 1))}
    save_file(saved, path)
    fd = os.open(path, os.O_RDONLY)
    file = TensorFile(fd)
    for name, tensor in saved.items():
        assert torch.equal(file.tensor(name, (tensor.shape[0], 7)), tensor)
    os.close(fd)


def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_crash(path: Path) -> None:
    """Under a memory map the process would be killed by SIGBUS."""
    save_file({"a": torch.ones(64, 1024), "b": torch.ones(64, 1024)}, path)
    fd = os.open(path, os.O_RDONLY)
    file = TensorFile(fd)
    os.truncate(path, 4096)
    with pytest.raises(InvalidAdapter, match="b: truncated"):
        file.tensor("b", (64, 1024))
    for name, shape in (("c", (64, 1024)), ("a", (64, 1023))):
        with pytest.raises(InvalidAdapter, match=f"{name}: changed"):
            file.tensor(name, shape)
    os.close(fd)
