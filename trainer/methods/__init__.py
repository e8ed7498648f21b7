"""How the base is held while training, one module a method, named by `METHODS`; and LoRA's layers on it."""

from collections.abc import Mapping
from types import MappingProxyType

from trainer.methods.base import Method
from trainer.methods.full import Full
from trainer.methods.lora import Lora
from trainer.methods.qlora import QLora

METHODS: Mapping[str, Method] = MappingProxyType({"lora": Lora(), "qlora": QLora(), "full": Full()})

__all__ = ["METHODS", "Method"]
