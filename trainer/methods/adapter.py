"""LoRA's layers on a base: which, how they begin, and how they are saved."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trainer.batches import collate
from trainer.encoding import Example
from trainer.errors import SettingsError
from trainer.loss import CausalLoss
from trainer.settings import ALL_LINEAR, Settings

EVA_ROWS = 4  # of a batch
MUTATING = ("olora", "pissa")  # change the base's weights as they begin


def linear_layers(causal_lm: Any) -> list[str]:
    """The paths of the layers that LoRA can adapt: all linear ones but the head."""
    from transformers.pytorch_utils import Conv1D

    head = causal_lm.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)  # bitsandbytes's 4-bit layer is a Linear
    return [path for path, layer in causal_lm.named_modules() if isinstance(layer, kinds) and layer is not head]


def choose_targets(paths: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """What of `paths` is `wanted`: by name ("q_proj"), whole path, or expression that matches a whole path.

    As PEFT's `target_modules`: short names where these say it all, else whole paths. Raises SettingsError for a name
    that nothing has.
    """
    names = sorted({_name(path) for path in paths})
    if not paths:
        raise SettingsError("the base cannot be adapted: it has no linear layer")
    if tuple(wanted) == (ALL_LINEAR,):
        return names
    chosen: set[str] = set()
    for pattern in wanted:
        matched = {path for path in paths if path == pattern or path.endswith(f".{pattern}") or _matches(pattern, path)}
        if not matched:
            raise SettingsError(f"target module {pattern!r} is not in the base; known are {', '.join(names)}")
        chosen |= matched
    short = {_name(path) for path in chosen}
    return sorted(short if all(path in chosen for path in paths if _name(path) in short) else chosen)


def add_adapter(causal_lm: Any, settings: Settings, targets: Iterable[str]) -> PeftModel:
    """Put fresh LoRA layers on `causal_lm`: from torch's seed, fp32, trainable. Not yet EVA's."""
    init: Any = True if settings.init == "default" else settings.init
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=_plain(settings.lora_alpha),
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=sorted(targets),
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern={pattern: _plain(alpha) for pattern, alpha in settings.alpha_pattern.items()},
        init_lora_weights=init,
        eva_config=EvaConfig() if settings.init == "eva" else None,
        task_type="CAUSAL_LM",
    )
    return _computing_as_given(get_peft_model(causal_lm, config))


def add_saved_adapter(causal_lm: Any, adapter_config: str) -> PeftModel:
    """Put LoRA layers of the shape of an `adapter_config.json` on `causal_lm`; their weights are yet to come."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-config-") as directory:
        (Path(directory) / "adapter_config.json").write_text(adapter_config, encoding="utf-8")
        config = LoraConfig.from_pretrained(directory)
    config.inference_mode = False
    if config.init_lora_weights == "eva":
        config.init_lora_weights = True
    return _computing_as_given(get_peft_model(causal_lm, config))


def start_by_eva(model: PeftModel, examples: Sequence[Example], pad_id: int, device: torch.device) -> None:
    """EVA (Paischer et al. 2024, arXiv 2410.07170): A from the directions in which the layers' inputs vary, ranks
    dealt out by how much; of `examples`' learned tokens."""
    body = CausalLoss(model.get_base_model())

    def batches() -> Any:
        for start in range(0, len(examples) - EVA_ROWS + 1, EVA_ROWS) or (0,):
            rows = [[example] for example in examples[start : start + EVA_ROWS]]
            batch = collate(rows, pad_id).to(device)
            labels = torch.full_like(batch.ids, -100).flatten()
            labels[batch.places] = batch.targets
            yield {"input_ids": batch.ids, "labels": labels.view_as(batch.ids)}

    def forward(_: Any, inputs: Mapping[str, Any]) -> None:
        with torch.no_grad():
            body.hidden(inputs["input_ids"])

    initialize_lora_eva_weights(model, dataloader=list(batches()), forward_fn=forward, show_progress_bar=False)


def save_adapter(model: PeftModel, directory: Path, base_name: str, initial: Path | None = None) -> None:
    """Write the adapter in PEFT's format, under the base's name rather than its place on this machine.

    With `initial`, the adapter that an OLoRA or PiSSA run began with, the difference from it is written: a plain LoRA
    of twice the rank, for the base as it was.
    """
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(
        str(directory),
        safe_serialization=True,
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=None if initial is None else str(initial),
    )
    (directory / "README.md").unlink(missing_ok=True)


def save_initial(model: PeftModel, directory: Path) -> None:
    """Keep the adapter as it begins, from which the difference is taken at the end."""
    config: Any = model.peft_config["default"]
    kind, config.init_lora_weights = config.init_lora_weights, True  # so that PEFT loads A and B as they are
    model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
    config.init_lora_weights = kind


def config_json(model: PeftModel) -> str:
    """The adapter's configuration as `add_saved_adapter` takes it."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-config-") as directory:
        model.peft_config["default"].save_pretrained(directory)
        values = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
    return json.dumps(values, indent=2, sort_keys=True)


def _computing_as_given(model: PeftModel) -> PeftModel:
    """Let LoRA's products take their input as it comes: PEFT would copy it to fp32, at 20 % more memory, and autocast
    then take it back."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.cast_input_dtype_enabled = False
    return model


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise SettingsError(f"target module {pattern!r} is neither a name nor an expression ({error})") from error


def _plain(value: float) -> Any:
    """A whole number as one, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value
