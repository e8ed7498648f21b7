"""The optimizer's state, from a checkpoint back to where the optimizer looks for it."""

import torch

from trainer.optim import build_optimizer, restore_optimizer
from trainer.settings import Settings


def test_the_state_of_a_resumed_run_lies_where_its_weights_do() -> None:
    """Fused AdamW reads its step counts on the weights' device; `meta` stands in for a GPU."""
    named = {"lora_A": torch.nn.Parameter(torch.zeros(2, 3, device="meta"))}
    optimizer = build_optimizer(named, Settings())
    saved = {"0.step": torch.tensor(4.0), "0.exp_avg": torch.zeros(2, 3), "0.exp_avg_sq": torch.zeros(2, 3)}
    restore_optimizer(optimizer, (saved, {}))
    state = optimizer.state[named["lora_A"]]
    assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )
