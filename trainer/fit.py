"""One run from settings to a trained adapter in the run's directory, and on from where one stopped."""

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.manifest import TrainingInfo
from trainer.checkpoints import Checkpoint
from trainer.errors import RunError
from trainer.loop import Evaluation, Interrupted, Loop, Progress, Result, Step
from trainer.memory import checkpoint_layers
from trainer.methods import METHODS
from trainer.methods import adapter as adapters
from trainer.optim import optimizer_state, restore_optimizer
from trainer.prepare import Note, Prepared, prepare, provenance
from trainer.run_directory import MetricsFile, RunDirectory
from trainer.settings import Settings
from trainer.trackers import Tracker, open_trackers


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run. `seconds` is the wall time of the training loop alone, in this process."""

    run: RunDirectory
    settings: Settings
    result: Result
    num_examples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who wants to know how a run goes; `is_stopped` is asked after each step."""

    note: Note = lambda message: None
    on_step: Callable[[Step], None] = lambda step: None
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None
    is_stopped: Callable[[], bool] = lambda: False


def fit(settings: Settings, directory: Path, watcher: Watcher | None = None, base_model: Any = None) -> Report:
    """Train as `settings` say, into the new run `directory`. Nothing is published.

    `base_model` spares loading the base: a transformers model as the method's `load_base` gives it, without adapter;
    LoRA's layers are taken off again at the end. Raises LorikeetError kinds, and Interrupted.
    """
    watcher = watcher or Watcher()
    settings = settings.resolved()
    prepared = prepare(settings, watcher.note)
    run = RunDirectory.create(directory, settings, provenance(settings, prepared))
    return _train(settings, prepared, run, watcher, None, base_model)


def resume(directory: Path, watcher: Watcher | None = None) -> Report:
    """Go on with the run in `directory` from its last checkpoint, from the start if it has none; to the same bits as
    if it had never stopped (on CPU). Raises RunError if the data or the base are not what they were."""
    watcher = watcher or Watcher()
    run = RunDirectory.open(directory)
    settings = run.settings()
    prepared = prepare(settings, watcher.note)
    _check_same(run, provenance(settings, prepared))
    checkpoints = run.checkpoints(settings.keep_checkpoints)
    steps = checkpoints.steps()
    checkpoint = checkpoints.load(steps[-1]) if steps else None
    step = steps[-1] if steps else 0
    watcher.note(f"going on after step {step} of {prepared.num_steps}")
    run.trim_metrics(step)
    return _train(settings, prepared, run, watcher, checkpoint, None)


def training_info(run: RunDirectory) -> TrainingInfo:
    """What an adapter's manifest says of how it came to be."""
    settings, info = run.settings(), run.info()
    result = info["result"]
    return TrainingInfo(
        method=settings.method,
        base_quantization=settings.base_quantization,
        hyperparameters=settings.as_metadata() | {"dtype": info["dtype"]},
        metrics={"loss": result["final_loss"], "seconds": info["seconds"], "tokens": float(result["num_tokens"])},
    )


def load_base(settings: Settings, prepared: Prepared) -> Any:
    """The base as the method holds it, on the device."""
    method = METHODS[settings.method]
    return method.load_base(prepared.base.path, settings, prepared.dtype, prepared.device, prepared.attention)


def _train(
    settings: Settings,
    prepared: Prepared,
    run: RunDirectory,
    watcher: Watcher,
    checkpoint: Checkpoint | None,
    base_model: Any,
) -> Report:
    held = settings.base_quantization or str(prepared.dtype).removeprefix("torch.")
    watcher.note(f"loading {prepared.base.name} ({held}, {prepared.device})")
    torch.manual_seed(settings.seed)
    causal_lm = load_base(settings, prepared) if base_model is None else base_model
    model = _add_adapter(causal_lm, settings, prepared, run, checkpoint)
    if prepared.checkpointing:
        checkpoint_layers(causal_lm)
    progress = Progress.from_json(checkpoint.state["progress"]) if checkpoint else None
    loop = Loop(
        causal_lm, settings, pad_id=prepared.pad_id, device=prepared.device, dtype=prepared.dtype, progress=progress
    )
    if checkpoint:
        _restore(loop, checkpoint)
    loop.check(prepared.examples[0])
    watcher.note(_summary(causal_lm))
    recorder = _Recorder(loop, model, run, settings, watcher)
    started = time.perf_counter()
    try:
        result = loop.run(prepared.feed, prepared.num_steps, prepared.eval_examples, recorder)
    except Interrupted as error:
        raise Interrupted(run.path) from error
    finally:
        recorder.close()
    seconds = time.perf_counter() - started
    if settings.streaming:
        watcher.note(str(prepared.counts))
    _export(loop, causal_lm, model, prepared, run, settings)
    run.write_info(run.info() | {"result": asdict(result), "seconds": round(seconds, 3)})
    if model is not None and base_model is not None:
        model.unload()
    return Report(run, settings, result, len(prepared.examples), seconds)


def _add_adapter(
    causal_lm: Any, settings: Settings, prepared: Prepared, run: RunDirectory, checkpoint: Checkpoint | None
) -> Any:
    """LoRA's layers on `causal_lm`, as PEFT's model; None for method full."""
    if settings.method == "full":
        return None
    is_mutating = settings.init in adapters.MUTATING
    if checkpoint and checkpoint.adapter_config and not is_mutating:
        return adapters.add_saved_adapter(causal_lm, checkpoint.adapter_config)
    targets = adapters.choose_targets(adapters.linear_layers(causal_lm), settings.target_modules)
    model = adapters.add_adapter(causal_lm, settings, targets)
    if settings.init == "eva":
        adapters.start_by_eva(model, prepared.examples, prepared.pad_id, prepared.device)
    if is_mutating and not checkpoint:
        adapters.save_initial(model, run.initial)
    return model


def _restore(loop: Loop, checkpoint: Checkpoint) -> None:
    if set(loop.named) != set(checkpoint.weights):
        raise RunError("the checkpoint has other weights than this run trains; its config.yaml was changed")
    with torch.no_grad():
        for name, parameter in loop.named.items():
            parameter.copy_(checkpoint.weights[name])
    restore_optimizer(loop.optimizer, (dict(checkpoint.optimizer), checkpoint.state["optimizer"]))


def _export(loop: Loop, causal_lm: Any, model: Any, prepared: Prepared, run: RunDirectory, settings: Settings) -> None:
    """The trained weights, the best if there was an evaluation, as others read them."""
    best = run.checkpoints().load_best()
    if best:
        with torch.no_grad():
            for name, parameter in loop.named.items():
                parameter.copy_(best.weights[name])
    if model is None:
        causal_lm.to(prepared.dtype).save_pretrained(run.model)
        prepared.tokenizer.save_pretrained(run.model)
    else:
        initial = run.initial if settings.init in adapters.MUTATING else None
        adapters.save_adapter(model, run.adapter, prepared.base.name, initial)


def _check_same(run: RunDirectory, now: dict[str, Any]) -> None:
    """Raises RunError if what the run is made from has changed: it could not go on as it began."""
    then = run.info()
    for name in ("base_digest", "tokenizer_digest", "template_digest", "data_digest", "eval_data_digest", "dtype"):
        if then.get(name) != now[name]:
            raise RunError(f"{run.path}: cannot be resumed: {name.replace('_', ' ')} is not what it was")


def _summary(causal_lm: Any) -> str:
    """What is trained of how much, as PEFT prints it. 4-bit weights count as what they stand for."""
    trained = every = 0
    for parameter in causal_lm.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        every += count
        trained += count if parameter.requires_grad else 0
    return f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / every:.4f}"


class _Recorder:
    """The loop's listener: to the metrics, the trackers, the checkpoints and the watcher."""

    def __init__(self, loop: Loop, model: Any, run: RunDirectory, settings: Settings, watcher: Watcher) -> None:
        self._loop = loop
        self._config = None if model is None else adapters.config_json(model)
        self._checkpoints = run.checkpoints(settings.keep_checkpoints)
        self._watcher = watcher
        self._trackers = open_trackers(settings.trackers, run.path, asdict(settings))
        self._metrics = MetricsFile(run.path / "metrics.jsonl")

    def stepped(self, step: Step) -> None:
        record_step(step, self._metrics, self._trackers)
        self._watcher.on_step(step)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._metrics.write({"step": evaluation.step, "eval_loss": evaluation.loss, "is_best": evaluation.is_best})
        self._trackers.log(evaluation.step, {"eval_loss": evaluation.loss})
        self._watcher.on_evaluation(evaluation)

    def save(self, progress: Progress) -> None:
        self._checkpoints.save(progress.step, self._snapshot(progress))

    def save_best(self, progress: Progress) -> None:
        self._checkpoints.save_best(self._snapshot(progress))

    def note(self, message: str) -> None:
        self._watcher.note(message)

    def is_stopped(self) -> bool:
        return self._watcher.is_stopped()

    def close(self) -> None:
        self._metrics.close()
        self._trackers.close()

    def _snapshot(self, progress: Progress) -> Checkpoint:
        tensors, numbers = optimizer_state(self._loop.optimizer)
        state = {"progress": progress.to_json(), "optimizer": numbers}
        return Checkpoint(dict(self._loop.named), tensors, state, self._config)


def record_step(step: Step, metrics: MetricsFile, trackers: Tracker) -> None:
    """A step's numbers, where they are kept. Raises DiskFull."""
    values = {
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "tokens_per_second": round(step.num_tokens / step.seconds, 1),
        "memory_bytes": peak_memory(),
    }
    counts = {"epoch": step.epoch, "tokens": step.num_tokens, "learned": step.num_learned, "seconds": step.seconds}
    metrics.write({"step": step.index + 1} | values | counts)
    trackers.log(step.index + 1, values)


def peak_memory() -> int:
    """The most bytes held so far: on a GPU in use by torch, else by this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
