"""A trained adapter into the store."""

import tempfile
from pathlib import Path

from peft import PeftModel

from adapters.manifest import TrainingInfo
from adapters.stores import Store
from adapters.versions import Version
from server.base.resolve import BaseModel


def publish_adapter(
    model: PeftModel, base: BaseModel, store: Store, name: str, label: str, training: TrainingInfo
) -> Version:
    """Save `model`'s adapter in PEFT's format, publish it as `name@label`. Raises what `Store.publish` does."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.name  # not the directory on this machine
    with tempfile.TemporaryDirectory(prefix="lorikeet-adapter-") as directory:
        model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
        return store.publish(
            Path(directory),
            name,
            base_digest=base.digest,
            base_name=base.name,
            linears=base.spec.linears(),
            label=label,
            training=training,
        )
