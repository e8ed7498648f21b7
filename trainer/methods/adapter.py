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

EVA_ROWS = 4  # of a batch, at least
EVA_SHARE = EvaConfig().rho  # directions that are looked for, of a layer's rank
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
    """Put fresh LoRA layers on `causal_lm`: from torch's seed, fp32, trainable. Not yet EVA's.

    Raises SettingsError for a pattern that no layer has, and a rank that a layer is too small to begin with.
    """
    _check_ranks(causal_lm, settings, set(targets := sorted(targets)))
    init: Any = True if settings.init == "default" else settings.init
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=_plain(settings.lora_alpha),
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
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
    config: Any = model.peft_config["default"]
    groups = _eva_groups(examples, round(EVA_SHARE * max(config.r, *config.rank_pattern.values(), 1)))
    body = CausalLoss(model.get_base_model())

    def batches() -> Any:
        for group in groups:
            batch = collate([[example] for example in group], pad_id).to(device)
            labels = torch.full_like(batch.ids, -100).flatten()
            labels[batch.places] = batch.targets
            yield {"input_ids": batch.ids, "labels": labels.view_as(batch.ids)}

    def forward(_: Any, inputs: Mapping[str, Any]) -> None:
        with torch.no_grad():
            body.hidden(inputs["input_ids"])

    initialize_lora_eva_weights(  # every process of several has the same rows, so there is nothing to gather
        model,
        dataloader=list(batches()),
        forward_fn=forward,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


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


def _eva_groups(examples: Sequence[Example], num_directions: int) -> list[list[Example]]:
    """Rows in groups of at least EVA_ROWS with as many learned tokens as directions are looked for: of fewer PEFT takes
    no notice, and would wait for ever. Raises SettingsError if the data have too few."""
    groups: list[list[Example]] = [[]]
    num_learned = 0
    for example in examples:
        if len(groups[-1]) >= EVA_ROWS and num_learned >= num_directions:
            groups.append([])
            num_learned = 0
        groups[-1].append(example)
        num_learned += int(example.mask.sum())
    if len(groups) > 1 and (len(groups[-1]) < EVA_ROWS or num_learned < num_directions):
        del groups[-1]
    elif num_learned < num_directions:
        raise SettingsError(
            f"init eva needs data with {num_directions} learned tokens for this rank, not {num_learned}"
        )
    return groups


def _check_ranks(causal_lm: Any, settings: Settings, targets: set[str]) -> None:
    """Raises SettingsError for a pattern that no layer has, and a rank of more directions than a layer has."""
    paths = [path for path in linear_layers(causal_lm) if path in targets or _name(path) in targets]
    for name, patterns in (("rank-pattern", settings.rank_pattern), ("alpha-pattern", settings.alpha_pattern)):
        for pattern in patterns:
            if not any(_is_of(pattern, path, name) for path in paths):
                raise SettingsError(f"{name} {pattern!r} is of no layer that is trained")
    if settings.init == "default":
        return
    for path in paths:
        own = [rank for pattern, rank in settings.rank_pattern.items() if _is_of(pattern, path, "rank-pattern")]
        rank = own[0] if own else settings.rank
        width, height = _sizes(causal_lm.get_submodule(path))
        most = int(width / EVA_SHARE) if settings.init == "eva" else min(width, height)
        if rank > most:
            raise SettingsError(f"init {settings.init} can give {path} a rank of {most} at most, not {rank}")


def _sizes(layer: Any) -> tuple[int, int]:
    """What goes in and what comes out."""
    if isinstance(layer, nn.Linear):  # whose weight may be packed
        return layer.in_features, layer.out_features
    width, height = layer.weight.shape
    return width, height


def _is_of(pattern: str, path: str, setting: str) -> bool:
    """Whether PEFT takes a rank's or alpha's `pattern` for the layer at `path`."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise SettingsError(f"{setting} {pattern!r} is neither a name nor an expression ({error})") from error


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
