"""The kernels that `benchmarks.kernels` times beside adapters': each runs, and its bytes are its tensors'."""

from dataclasses import replace

import pytest
import torch

from benchmarks.layer_workload import KEYS, LLAMA_8B, PAGE, LayerWorkload
from server.model.attention import TorchAttention

CPU = torch.device("cpu")
SPEC = replace(
    LLAMA_8B, hidden_size=64, intermediate_size=96, num_heads=8, num_kv_heads=2, head_dim=8, vocab_size=100
)  # fmt: skip


def backend(num_pages: int) -> TorchAttention:
    return TorchAttention(SPEC.softmax_scale, SPEC.num_kv_heads, PAGE, CPU)


@pytest.mark.parametrize("rows", [3, 1024])
def test_each_launch_runs(rows: int) -> None:
    launches = {launch.kernel: launch for launch in LayerWorkload(SPEC, rows, torch.float32, CPU).launches(backend)}
    for launch in launches.values():
        launch.run(0)
        launch.run(min(launch.copies, 3) - 1)
    assert launches["silu_mul"].num_bytes == 4 * rows * (2 * 96 + 96)
    assert ("product gate_up" in launches) == (rows == 3)
    keys = KEYS if rows == 3 else 512
    sequences = 3 if rows == 3 else 2
    assert launches[f"attention {keys} keys"].num_bytes == 4 * (2 * rows * 64 + 2 * sequences * keys * 16)
    if rows == 3:
        assert launches["product qkv"].num_bytes == 4 * (96 * 64 + 3 * (96 + 64))
