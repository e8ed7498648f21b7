"""One run from settings to a trained adapter in the run's directory, and on from where one stopped."""

import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters.manifest import TrainingInfo
from trainer.checkpoints import Checkpoint, writing
from trainer.devices import autocast
from trainer.errors import RunError
from trainer.fake_model import materialise, meta_model
from trainer.fused import fuse_where_it_pays
from trainer.groups import Alone, Group, first_process_first
from trainer.loop import Evaluation, Interrupted, Listener, Loop, Progress, Result, Step
from trainer.loss import CausalLoss
from trainer.memory import checkpoint_layers
from trainer.methods import METHODS
from trainer.methods import adapter as adapters
from trainer.optim import optimizer_state, restore_optimizer
from trainer.prepare import Note, Prepared, prepare, provenance
from trainer.run_directory import MetricsFile, RunDirectory
from trainer.settings import Settings
from trainer.sharding import gather, like, shard, whole
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


def fit(
    settings: Settings,
    directory: Path,
    watcher: Watcher | None = None,
    base_model: Any = None,
    group: Group | None = None,
) -> Report:
    """Train as `settings` say, into the new run `directory`. Nothing is published.

    `base_model` spares loading the base: a transformers model as the method's `load_base` gives it, without adapter;
    LoRA's layers are taken off again at the end. With `group` this is one process of several, which all call this; the
    first alone writes. Raises LorikeetError kinds, and Interrupted.
    """
    watcher, group = watcher or Watcher(), group or Alone()
    settings = settings.resolved()
    run = RunDirectory(directory)
    with first_process_first(group):
        prepared = prepare(settings, watcher.note, num_devices=group.size)
        if group.rank == 0:
            run = RunDirectory.create(directory, settings, provenance(settings, prepared) | {"devices": group.size})
    return _train(settings, prepared, run, watcher, None, base_model, group)


def resume(directory: Path, watcher: Watcher | None = None, group: Group | None = None) -> Report:
    """Go on with the run in `directory` from its last checkpoint, from the start if it has none; to the same bits as
    if it had never stopped (on CPU, with as many processes). Raises RunError if the data or the base are not what they
    were."""
    watcher, group = watcher or Watcher(), group or Alone()
    run = RunDirectory.open(directory)
    settings = run.settings()
    checkpoints = run.checkpoints(settings.keep_checkpoints)
    with first_process_first(group):
        prepared = prepare(settings, watcher.note, num_devices=group.size)
        steps = checkpoints.steps()
        step = steps[-1] if steps else 0
        checkpoint = checkpoints.load(step) if steps else None
        if group.rank == 0:
            _check_same(run, provenance(settings, prepared))
            run.trim_metrics(step)
            run.write_info(run.info() | {"devices": group.size})
    watcher.note(f"going on after step {step} of {prepared.num_steps}")
    return _train(settings, prepared, run, watcher, checkpoint, None, group)


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
    """The base as the method holds it, on the device; on the CPU if its weights are to be sharded."""
    device = torch.device("cpu") if prepared.sharded else prepared.device
    method = METHODS[settings.method]
    return method.load_base(prepared.base.path, settings, prepared.dtype, device, prepared.attention)


def _train(
    settings: Settings,
    prepared: Prepared,
    run: RunDirectory,
    watcher: Watcher,
    checkpoint: Checkpoint | None,
    base_model: Any,
    group: Group,
) -> Report:
    prepared = replace(  # by the device with the least room, since all have to do the same
        prepared, sharded=group.any(prepared.sharded), checkpointing=group.any(prepared.checkpointing)
    )
    held = settings.base_quantization or str(prepared.dtype).removeprefix("torch.")
    where = f"{prepared.device} × {group.size}" if group.size > 1 else str(prepared.device)
    watcher.note(f"loading {prepared.base.name} ({held}{', sharded' if prepared.sharded else ''}, {where})")
    torch.manual_seed(settings.seed)
    causal_lm, model = _build(settings, prepared, run, checkpoint, base_model, group)
    loss = _checked_loss(causal_lm, settings, prepared, group, watcher.note)
    watcher.note(_summary(causal_lm))
    if prepared.sharded:
        shard(loss, group, prepared.device)
    loop = Loop(
        causal_lm,
        settings,
        loss=loss,
        pad_id=prepared.pad_id,
        device=prepared.device,
        dtype=prepared.dtype,
        group=group,
        progress=Progress.from_json(checkpoint.state["progress"]) if checkpoint else None,
    )
    if checkpoint:
        _restore(loop, checkpoint)
    elif not prepared.sharded:
        group.share([parameter.detach() for parameter in loop.named.values()])
    result, seconds = _run(loop, model, prepared, run, settings, watcher, group)
    if settings.streaming:
        watcher.note(str(prepared.counts))
    gather(loss, keep=group.rank == 0)
    if group.rank == 0:
        _export(causal_lm, model, prepared, run, settings)
        run.write_info(run.info() | {"result": asdict(result), "seconds": round(run.seconds(), 3)})
    if model is not None and base_model is not None:
        model.unload()
    return Report(run, settings, result, len(prepared.examples), seconds)


def _build(
    settings: Settings,
    prepared: Prepared,
    run: RunDirectory,
    checkpoint: Checkpoint | None,
    base_model: Any,
    group: Group,
) -> tuple[Any, Any]:
    """The model that is trained; and as PEFT's, None for method full. Of one that is to be sharded, all processes but
    the first have the shapes alone."""
    model = None
    if prepared.sharded and group.rank:
        causal_lm = meta_model(prepared.base.path, settings, prepared.dtype, prepared.attention)
        materialise(causal_lm)
    else:
        causal_lm = load_base(settings, prepared) if base_model is None else base_model
        model = _add_adapter(causal_lm, settings, prepared, run if group.rank == 0 else None, checkpoint)
    if prepared.checkpointing:
        checkpoint_layers(causal_lm)
    return causal_lm, model


def _checked_loss(causal_lm: Any, settings: Settings, prepared: Prepared, group: Group, note: Note) -> CausalLoss:
    """The loss, through fused layers where there are any. Raises what `check_loss` does."""
    fused = None
    if settings.method != "full" and not prepared.sharded:
        fused = fuse_where_it_pays(causal_lm, prepared.device, prepared.dtype, note)
    loss = CausalLoss(causal_lm, fused)
    if group.rank == 0:
        check_loss(loss, prepared, packing=settings.packing)
    return loss


def check_loss(loss: CausalLoss, prepared: Prepared, *, packing: bool) -> None:
    """Raises TrainingError if it is not the model's own, on the start of an example, or if packed rows would see each
    other."""
    causal_lm = loss.causal_lm.eval()
    ids = torch.from_numpy(prepared.examples[0].ids).long().to(causal_lm.device)
    with autocast(causal_lm.device, prepared.dtype):
        loss.check(ids)
        if packing:
            loss.check_packing(ids)


def _run(
    loop: Loop,
    model: Any,
    prepared: Prepared,
    run: RunDirectory,
    settings: Settings,
    watcher: Watcher,
    group: Group,
) -> tuple[Result, float]:
    """What came of the loop, and its seconds. Raises Interrupted."""
    listener: Listener = _Follower(loop, watcher)
    started = time.perf_counter()
    with ExitStack() as stack:
        if group.rank == 0:
            listener = recorder = _Recorder(loop, model, run, settings, watcher)
            stack.callback(recorder.close)
        try:
            result = loop.run(prepared.feed, prepared.num_steps, prepared.eval_examples, listener)
        except Interrupted as error:
            raise Interrupted(run.path) from error
    return result, time.perf_counter() - started


def _add_adapter(
    causal_lm: Any, settings: Settings, prepared: Prepared, run: RunDirectory | None, checkpoint: Checkpoint | None
) -> Any:
    """LoRA's layers on `causal_lm`, as PEFT's model; None for method full. How they begin is kept in `run`."""
    if settings.method == "full":
        return None
    is_mutating = settings.init in adapters.MUTATING
    if checkpoint and checkpoint.adapter_config and not is_mutating:
        return adapters.add_saved_adapter(causal_lm, checkpoint.adapter_config)
    targets = adapters.choose_targets(adapters.linear_layers(causal_lm), settings.target_modules)
    model = adapters.add_adapter(causal_lm, settings, targets)
    if settings.init == "eva":
        adapters.start_by_eva(model, prepared.examples, prepared.pad_id, prepared.device)
    if is_mutating and run and not checkpoint:
        with writing(run.initial):
            adapters.save_initial(model, run.initial)
    return model


def _restore(loop: Loop, checkpoint: Checkpoint) -> None:
    if set(loop.named) != set(checkpoint.weights):
        raise RunError("the checkpoint has other weights than this run trains; its config.yaml was changed")
    with torch.no_grad():
        for name, parameter in loop.named.items():
            parameter.copy_(like(checkpoint.weights[name], parameter))
    restore_optimizer(loop.optimizer, (dict(checkpoint.optimizer), checkpoint.state["optimizer"]))


def _export(causal_lm: Any, model: Any, prepared: Prepared, run: RunDirectory, settings: Settings) -> None:
    """The trained weights, the best if there was an evaluation, as others read them."""
    best = run.checkpoints().load_best()
    if best:
        with torch.no_grad():
            for name, parameter in causal_lm.named_parameters():
                if name in best.weights:
                    parameter.copy_(best.weights[name])
    if model is None:
        for parameter in causal_lm.parameters():  # not `.to`, which asks modules that were sharded for their shards
            parameter.data = parameter.data.to(prepared.dtype)
        with writing(run.model):
            causal_lm.save_pretrained(run.model)
            prepared.tokenizer.save_pretrained(run.model)
    else:
        initial = run.initial if settings.init in adapters.MUTATING else None
        with writing(run.adapter):
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
        return replace(take_snapshot(self._loop, progress, keep=True), adapter_config=self._config)


class _Follower:
    """The listener of every process but the first: it takes part in what all have to, and writes nothing."""

    def __init__(self, loop: Loop, watcher: Watcher) -> None:
        self._loop = loop
        self.stepped = watcher.on_step
        self.is_stopped = watcher.is_stopped

    def evaluated(self, evaluation: Evaluation) -> None:
        """The first process's."""

    def save(self, progress: Progress) -> None:
        take_snapshot(self._loop, progress, keep=False)

    def save_best(self, progress: Progress) -> None:
        take_snapshot(self._loop, progress, keep=False)

    def note(self, message: str) -> None:
        """The first process's."""


def take_snapshot(loop: Loop, progress: Progress, *, keep: bool) -> Checkpoint:
    """What the run is now, whole and on the CPU, in the processes that `keep` it. Every process has to call this."""
    weights = {}
    for name, parameter in loop.named.items():
        value = whole(parameter).detach()
        if keep:
            weights[name] = value.cpu()
    tensors, numbers = optimizer_state(loop.optimizer, keep=keep)
    return Checkpoint(weights, tensors, {"progress": progress.to_json(), "optimizer": numbers})


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
