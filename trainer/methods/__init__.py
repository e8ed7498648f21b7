"""How the frozen base is held while its adapter trains. One module a method; `METHODS` names them."""

from collections.abc import Mapping
from types import MappingProxyType

from trainer.methods.base import Method
from trainer.methods.lora import Lora
from trainer.methods.qlora import QLora

METHODS: Mapping[str, Method] = MappingProxyType({"lora": Lora(), "qlora": QLora()})

__all__ = ["METHODS", "Method"]
