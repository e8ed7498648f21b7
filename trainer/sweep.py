"""Many small runs at once: one base is loaded, and the rows of several jobs go through it in one forward pass.

Every job leaves a run directory as `trainer fit` does, to be published, evaluated and reported on like any other. Not
for jobs that need what one run alone has: checkpoints, evaluation while training, dropout, streaming.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.ids import check_name
from trainer.errors import SettingsError
from trainer.fit import check_loss, load_base, record_step
from trainer.lanes import Lane, LaneLoop, save_lane, start_lane
from trainer.loop import Result, Step
from trainer.loss import CausalLoss
from trainer.methods import adapter as adapters
from trainer.prepare import Note, Prepared, prepare, provenance
from trainer.run_directory import MetricsFile, RunDirectory
from trainer.settings import Settings
from trainer.trackers import Tracker, open_trackers

SHARED = ("base", "method", "quantization", "double_quantization", "dtype", "device")  # one base: these are all jobs'
ALONE: Mapping[str, tuple[Any, ...]] = {  # what a sweep does not do, and the values that do not ask for it
    "dropout": (0.0,),
    "streaming": (False,),
    "eval_data": (None,),
    "eval_every": (None,),
    "patience": (None,),
    "checkpoint_every": (None,),
    "micro_batch": (None,),
    "gradient_checkpointing": ("auto", "off"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job: its run, and the result or why there is none."""

    run: RunDirectory
    result: Result | None
    error: str | None


def read_jobs(path: Path) -> list[Settings]:
    """The jobs of a YAML file: a list `jobs` of settings, each with a name, on top of those beside the list.

    Raises SettingsError, also for what cannot be in one sweep.
    """
    values = Settings.read(path)
    jobs = values.pop("jobs", None)
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        raise SettingsError(f"{path}: needs a list `jobs`, each a mapping of settings with a name")
    settings = [Settings.from_mapping({**values, **job}, f"{path}: job {i}") for i, job in enumerate(jobs, 1)]
    for number, job in enumerate(settings, 1):
        if job.name is None:
            raise SettingsError(f"{path}: job {number}: needs a name")
        check_name(job.name)
    names = [job.name for job in settings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"{path}: two jobs are named {twice[0]!r}")
    check_together(settings)
    return settings


def check_together(jobs: Sequence[Settings]) -> None:
    """Raises SettingsError for a setting that needs a run alone, or that all jobs must share and do not."""
    for job in jobs:
        if job.method == "full" or job.init in adapters.MUTATING:
            what = "method full" if job.method == "full" else f"init {job.init}"
            raise SettingsError(f"job {job.name}: {what} changes the base, which is shared; train it by itself")
        for name, allowed in ALONE.items():
            if getattr(job, name) not in allowed:
                raise SettingsError(f"job {job.name}: a sweep has no {name.replace('_', '-')}; train it by itself")
        for name in SHARED:
            if getattr(job, name) != getattr(jobs[0], name):
                raise SettingsError(f"job {job.name}: {name.replace('_', '-')} must be the same for all jobs")


def sweep(jobs: Sequence[Settings], directory: Path, at_once: int, note: Note) -> list[Outcome]:
    """Train `jobs`, `at_once` at a time, into run directories by their names in `directory`; nothing is published.

    Raises LorikeetError kinds for what is wrong before training; a job that fails later says so in its outcome.
    """
    check_together(jobs)
    resolved = [job.resolved() for job in jobs]
    first_ready = prepare(resolved[0], note)
    ready = [first_ready, *(prepare(job, note, like=first_ready) for job in resolved[1:])]
    runs = [
        RunDirectory.create(directory / str(job.name), job, provenance(job, prepared))
        for job, prepared in zip(resolved, ready, strict=True)
    ]
    note(f"loading {ready[0].base.name} once for {len(jobs)} jobs ({ready[0].device})")
    causal_lm = load_base(resolved[0], next((one for one in ready if one.attention == "sdpa"), ready[0]))
    check_loss(CausalLoss(causal_lm), ready[0], packing=any(job.packing for job in jobs))
    outcomes: list[Outcome] = []
    for first in range(0, len(jobs), at_once):
        part = slice(first, first + at_once)
        outcomes += _train(causal_lm, resolved[part], ready[part], runs[part], note)
    return outcomes


def _train(
    causal_lm: Any, jobs: Sequence[Settings], ready: Sequence[Prepared], runs: Sequence[RunDirectory], note: Note
) -> list[Outcome]:
    with ExitStack() as stack:
        lanes = [
            start_lane(causal_lm, job, prepared, _Recorder(run, job, stack, note))
            for job, prepared, run in zip(jobs, ready, runs, strict=True)
        ]
        LaneLoop(causal_lm, lanes, ready[0].device, ready[0].dtype).run()
    return [_finish(lane, run, note) for lane, run in zip(lanes, runs, strict=True)]


def _finish(lane: Lane, run: RunDirectory, note: Note) -> Outcome:
    """Write a lane's adapter and its result."""
    if lane.error:
        note(f"{lane.settings.name}: {lane.error}")
        return Outcome(run, None, lane.error)
    save_lane(lane, run.adapter)
    result = Result.of(lane.progress)
    run.write_info(run.info() | {"result": asdict(result), "seconds": round(run.seconds(), 3)})
    return Outcome(run, result, None)


class _Recorder:
    """A lane's steps to its run's metrics and trackers; `seconds` is its share of a step, by tokens."""

    def __init__(self, run: RunDirectory, settings: Settings, stack: ExitStack, note: Note) -> None:
        self._name = settings.name
        self._note = note
        self._metrics = MetricsFile(run.path / "metrics.jsonl")
        stack.callback(self._metrics.close)
        self._trackers: Tracker = open_trackers(settings.trackers, run.path, asdict(settings))
        stack.callback(self._trackers.close)

    def __call__(self, step: Step) -> None:
        record_step(step, self._metrics, self._trackers)
        if step.index + 1 == step.num_steps:
            self._note(f"{self._name}: loss {step.loss:.3f} after {step.num_steps} steps")
