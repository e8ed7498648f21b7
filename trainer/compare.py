"""Methods against each other on one base, one data set and one test: trained, served, asked, and put in one table.

Every run is a process of its own, so that its peak memory is its own; what it learned is scored by the server's forward
pass on the base that it was trained on: qlora's in 4 bits, and beside it in 16. A run that is there already is not
trained or asked again, so a comparison that was stopped goes on.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from server.base.quantization import Quantization
from server.base.resolve import BaseModel, resolve_base
from trainer.devices import choose_device
from trainer.errors import TrainingError
from trainer.evaluate import Questions, encode_questions, evaluate
from trainer.prepare import digest_files
from trainer.run_directory import RunDirectory
from trainer.served import ServedBase
from trainer.settings import CONFIG_FILE, Settings

Note = Callable[[str], None]
GIB = 1 << 30
SCORES_FILE = "scores.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared. `settings` are those of every run but for method and seed; `learning_rates` those that a
    method has for itself. `test` are rows that no run has seen, of which the first `num_test` are asked."""

    methods: tuple[str, ...]
    num_seeds: int
    settings: Settings
    test: Path
    num_test: int
    learning_rates: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Score:
    """On the test rows: nats a learned token, and the share of answers that are exactly right."""

    loss: float
    exact_match: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One run. `seconds` is the training loop's, `peak_bytes` the process's (on a GPU torch's), `trained_share` what
    of all the model's parameters was trained. `score` is on the base that it was trained on, `score_16bit` on the one
    in 16 bits where that is another."""

    method: str
    seed: int
    score: Score
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    trained_share: float
    score_16bit: Score | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of a plan. `base` is the base without any adapter."""

    base: Score
    trials: tuple[Trial, ...]

    @property
    def methods(self) -> list[str]:
        """In the order in which they came."""
        return list(dict.fromkeys(trial.method for trial in self.trials))

    def of(self, method: str) -> list[Trial]:
        """A method's trials."""
        return [trial for trial in self.trials if trial.method == method]

    def mean(self, method: str, value: Callable[[Trial], float]) -> float:
        """Over a method's seeds."""
        return statistics.fmean(map(value, self.of(method)))

    def ratio(self, one: str, other: str, value: Callable[[Trial], float]) -> float:
        """The means of two methods, divided; NaN where the other's is zero."""
        divisor = self.mean(other, value)
        return self.mean(one, value) / divisor if divisor else math.nan


def compare(plan: Plan, directory: Path, note: Note) -> Iterator[Comparison]:
    """Train and score every method with every seed, in `directory`: what there is after each. Raises LorikeetError
    kinds."""
    base = resolve_base(plan.settings.base, note)
    device = choose_device(plan.settings.device)
    questions = encode_questions(plan.test, plan.num_test, base)
    scores = _Scores(directory / SCORES_FILE, plan)
    bare = scores.get("base", lambda: _score(base, device, None, questions))
    note(f"base: {bare.exact_match:.1%} of the answers are exact")
    trials: list[Trial] = []
    runs = [(method, seed) for seed in range(plan.num_seeds) for method in plan.methods]
    for number, (method, seed) in enumerate(runs, 1):
        note(f"run {number} of {len(runs)}: {method}, seed {seed}")
        name = _name(method, seed)
        _train(plan, method, seed, directory / name, note)  # while it runs, nothing else takes its memory
        run = RunDirectory.open(directory / name)
        ask = partial(_score_run, run, base, device, questions)
        score = scores.get(name, ask)
        trial = _trial(run, base, score)
        if (trained := _quantization(run.settings())) is not None:
            score = scores.get(f"{name} on {trained.quant_type}", partial(ask, trained))
            trial = replace(trial, score=score, score_16bit=trial.score)
        note(f"{method}, seed {seed}: {score.exact_match:.1%}")
        trials.append(trial)
        yield Comparison(bare, tuple(trials))


class _Scores:
    """Scores by name, in a file; those on other test rows do not count."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path = path
        self._rows = {"test_digest": digest_files(plan.test), "num_test": plan.num_test}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._scores: dict[str, Any] = known["scores"] if known.get("rows") == self._rows else {}

    def get(self, name: str, make: Callable[[], Score]) -> Score:
        """The score that is there, or one made and kept."""
        if name not in self._scores:
            self._scores[name] = asdict(make())
            text = json.dumps({"rows": self._rows, "scores": self._scores}, indent=2)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(text + "\n", encoding="utf-8")
        return Score(**self._scores[name])


def _name(method: str, seed: int) -> str:
    return f"{method}-{seed}"


def _train(plan: Plan, method: str, seed: int, directory: Path, note: Note) -> None:
    """In a process of its own. Raises TrainingError with what it said last, and for a run with other settings."""
    rate = plan.learning_rates.get(method, plan.settings.learning_rate)
    settings = replace(plan.settings, method=method, seed=plan.settings.seed + seed, learning_rate=rate, name=None)  # type: ignore[arg-type]
    command = [sys.executable, "-m", "trainer.cli"]
    if (directory / CONFIG_FILE).is_file():
        run = RunDirectory.open(directory)
        if run.settings() != settings.resolved():
            raise TrainingError(f"{directory}: is a run with other settings; take another --out")
        if "result" in run.info():
            return
        command += ["resume", str(directory)]
    else:
        config = directory.with_suffix(".yaml")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(settings.to_yaml(), encoding="utf-8")
        command += ["fit", "--config", str(config), "--run", str(directory)]
    said = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None, "it is a pipe"
        for said in process.stderr:
            note(f"  {said.rstrip()}")
    if process.returncode:
        raise TrainingError(f"{method}, seed {seed}: {said.strip() or f'ended with {process.returncode}'}")


def _trial(run: RunDirectory, base: BaseModel, score: Score) -> Trial:
    settings = run.settings()
    steps = [line for line in run.metrics() if "tokens" in line]
    seconds = run.seconds()
    num_base = _num_parameters(base.path)
    num_adapter = 0 if settings.method == "full" else _num_parameters(run.adapter)
    return Trial(
        method=settings.method,
        seed=settings.seed,
        score=score,
        seconds=seconds,
        tokens_per_second=sum(line["tokens"] for line in steps) / seconds,
        peak_bytes=max(line["memory_bytes"] for line in steps),
        trained_share=num_adapter / (num_base + num_adapter) if num_adapter else 1.0,
    )


def _quantization(settings: Settings) -> Quantization | None:
    """Of the base that a run with these was trained on."""
    if settings.base_quantization is None:
        return None
    return Quantization(settings.base_quantization, double=settings.double_quantization)


def _score_run(
    run: RunDirectory,
    base: BaseModel,
    device: torch.device,
    questions: Questions,
    quantization: Quantization | None = None,
) -> Score:
    if run.settings().method == "full":
        return _score(resolve_base(str(run.model)), device, None, questions)
    return _score(base, device, run.adapter, questions, quantization)


def _score(
    base: BaseModel,
    device: torch.device,
    adapter: Path | None,
    questions: Questions,
    quantization: Quantization | None = None,
) -> Score:
    served = ServedBase(base.path, base.spec, device, quantization)
    loaded = None if adapter is None else served.load_adapter(adapter)
    found = evaluate(served, loaded, questions.rows, questions.decoder, questions.end_ids)
    assert found.exact_match is not None, "the answers were asked for"
    return Score(found.loss.mean, found.exact_match)


def _num_parameters(directory: Path) -> int:
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def as_json(comparison: Comparison, plan: Plan) -> str:
    """Everything, and what it was measured with."""
    settings = plan.settings.as_metadata()
    document: dict[str, Any] = {
        "base": asdict(comparison.base),
        "trials": [asdict(trial) for trial in comparison.trials],
        "ratios": {f"{one}/{other}": values for one, other, values in _ratios(comparison)},
        "settings": {name: value for name, value in settings.items() if name not in ("method", "seed")},
        "learning_rates": dict(plan.learning_rates),
        "data_digest": digest_files(Path(plan.settings.data)),
        "test_digest": digest_files(plan.test),
        "num_test": plan.num_test,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return json.dumps(document, indent=2) + "\n"


def as_markdown(comparison: Comparison) -> str:
    """One table, and the ratios below it."""
    rows = [
        ["method", "exact match", "loss", "seconds", "tokens/s", "peak memory", "trained"],
        ["---", "--:", "--:", "--:", "--:", "--:", "--:"],
        ["base", f"{comparison.base.exact_match:.1%}", f"{comparison.base.loss:.4f}", "", "", "", ""],
    ]
    for method in comparison.methods:
        trials = comparison.of(method)
        rows.append(
            [
                method,
                *_score_cells([trial.score for trial in trials]),
                f"{comparison.mean(method, lambda trial: trial.seconds):.0f}",
                f"{comparison.mean(method, lambda trial: trial.tokens_per_second):.0f}",
                f"{comparison.mean(method, lambda trial: trial.peak_bytes) / GIB:.2f} GiB",
                f"{comparison.mean(method, lambda trial: trial.trained_share):.2%}",
            ]
        )
        if others := [trial.score_16bit for trial in trials if trial.score_16bit is not None]:
            rows.append([f"{method}, served in 16 bits", *_score_cells(others), "", "", "", ""])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    seeds = {method: len(comparison.of(method)) for method in comparison.methods}
    said = ", ".join(f"{count} ({method})" for method, count in seeds.items())
    if len(set(seeds.values())) == 1:
        said = str(seeds[comparison.methods[0]])
    lines += ["", "One seed." if said == "1" else f"Means over {said} seeds, ± their standard deviation.", ""]
    for one, other, values in _ratios(comparison):
        said = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        lines.append(f"- {one} / {other}: {said}")
    return "\n".join(lines) + "\n"


def _score_cells(scores: Sequence[Score]) -> tuple[str, str]:
    """Exact match and loss: means, the first ± its standard deviation."""
    exact = [score.exact_match for score in scores]
    spread = f" ± {statistics.stdev(exact):.1%}" if len(exact) > 1 else ""
    return f"{statistics.fmean(exact):.1%}{spread}", f"{statistics.fmean(score.loss for score in scores):.4f}"


def _ratios(comparison: Comparison) -> list[tuple[str, str, dict[str, float]]]:
    pairs: Sequence[tuple[str, str]] = (("qlora", "lora"), ("lora", "full"), ("qlora", "full"))
    known = comparison.methods
    return [
        (
            one,
            other,
            {
                "exact match": comparison.ratio(one, other, lambda trial: trial.score.exact_match),
                "peak memory": comparison.ratio(one, other, lambda trial: trial.peak_bytes),
                "tokens/s": comparison.ratio(one, other, lambda trial: trial.tokens_per_second),
            },
        )
        for one, other in pairs
        if one in known and other in known
    ]
