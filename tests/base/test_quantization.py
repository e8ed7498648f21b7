"""Which layers a name keeps in 16 bits, by transformers' rule; which quantized checkpoints are refused."""

from typing import Any

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from server.base.quantization import Quantization, stored_quantization, wanted_quantization
from server.errors import BaseModelError, ConfigError, UnsupportedModel

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [*(f"model.layers.{i}.{name}" for i in range(12) for name in MODULES), "lm_head"]


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.1", "down_proj", "mlp.gate_proj", "model.layers.11.mlp", "model", PATHS[7]]
)
def test_names_mean_what_they_mean_to_transformers(name: str) -> None:
    kept = [path for path in PATHS if Quantization("nf4", keep=(name,)).keeps(path)]
    assert kept == [path for path in PATHS if not should_convert_module(path, [name])]
    assert kept


def test_a_part_of_a_name_is_none() -> None:
    with pytest.raises(ConfigError, match="'proj': the base has no linear layer"):
        Quantization("nf4", keep=("lm_head", "proj")).check_keep(PATHS)


FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def config(**fields: Any) -> dict[str, Any]:
    return {"quantization_config": {**FOUR_BITS, **fields}}


def test_what_a_config_says() -> None:
    assert stored_quantization({}) is None
    assert stored_quantization(config()) == "nf4"
    assert stored_quantization({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}) == "fp4"
    for fields, words in (
        ({"quant_method": "awq"}, "awq"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "8 bits"),
        ({"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type is 'af4'"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            stored_quantization(config(**fields))
    with pytest.raises(BaseModelError, match="quantization_config is not an object"):
        stored_quantization({"quantization_config": "nf4"})


def test_what_is_wanted() -> None:
    settings: tuple[int, bool, tuple[str, ...]] = (128, False, ("lm_head",))
    assert wanted_quantization({}, "fp4", *settings) == Quantization("fp4", 128, False, ("lm_head",))
    assert wanted_quantization({}, None, *settings) is None
    assert wanted_quantization({}, "none", *settings) is None
    assert wanted_quantization(config(), "nf4", *settings) is None, "it is so already"
    with pytest.raises(ConfigError, match="quantized to nf4 already"):
        wanted_quantization(config(), "none", *settings)
