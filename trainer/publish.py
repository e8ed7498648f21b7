"""The gate between a run and the store: what is published was checked and scored as the server will run it.

1. The files are read, validated and placed by the server's own loader, its canary compares them with the model.
2. Rows are scored by the server's forward pass, and by transformers with PEFT from the same files: a difference means
   that what would be served is not what was trained.
3. Base, tokenizer, template and data digests, the method, its settings and the scores go into the manifest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.errors import BaseMismatch
from adapters.ids import check_label, check_name
from adapters.manifest import Scores
from adapters.stores import Store
from adapters.versions import Version
from server.base.resolve import BaseModel, resolve_base
from trainer.devices import choose_device
from trainer.encoding import Counts, Example
from trainer.errors import RunError, SettingsError, TrainingError
from trainer.evaluate import Decoder, evaluate
from trainer.fit import training_info
from trainer.prepare import digest_files, encode_rows, load_tokenizer, make_encoder, read_config, read_end_ids
from trainer.reference import peft_losses
from trainer.run_directory import RunDirectory
from trainer.served import Loss, ServedBase
from trainer.settings import Settings

NUM_ROWS = 64  # scored, unless told otherwise
STANDARD_ERRORS = 3
MOST = 10


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far the served loss may be from the trainer's (nats a token, times the loss where that is above one), and
    how far above the loss on the quantized base that an adapter was trained on (nats a token)."""

    parity: float = 1e-3
    quantization: float = 0.1

    def allowed(self, served: Sequence[Loss], trained: Sequence[Loss]) -> float:
        """How far the means of the same rows' losses may be apart: `parity`, and on top three standard errors, which is
        how far rounding alone takes them where the rows are few; never ten times `parity`."""
        num_tokens = Loss.sum(trained).num_tokens
        mean = (Loss.sum(served).total - Loss.sum(trained).total) / num_tokens
        offs = [one.total - other.total - mean * one.num_tokens for one, other in zip(served, trained, strict=True)]
        spread = math.sqrt(sum(off**2 for off in offs)) / num_tokens
        return min(self.parity + STANDARD_ERRORS * spread, MOST * self.parity) * max(1.0, Loss.sum(trained).mean)


@dataclass(frozen=True, slots=True)
class Publication:
    """What to call a run's adapter, and what decides on it. `data` None means the run's evaluation rows, or failing
    those its training rows; `answers` has them answered too; `expected` is as in `Store.move_label`."""

    name: str
    label: str = "latest"
    data: Path | None = None
    num_rows: int = NUM_ROWS
    answers: bool = False
    expected: str | None = None
    tolerance: Tolerance = Tolerance()


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The rows that decide. `digest` is of their file, `held_out` whether they were kept from training. With `decoder`
    they are answered too."""

    rows: Sequence[Example]
    digest: str
    held_out: bool
    decoder: Decoder | None = None
    end_ids: frozenset[int] = frozenset()


def publish_run(run: RunDirectory, store: Store, publication: Publication, note: Callable[[str], None]) -> Version:
    """Score a run's adapter and publish it. Nothing is published unless it is served as it was trained.

    Raises RunError for a run that is not finished, BaseMismatch if its base is another now, and what `score` and
    `Store.publish` raise.
    """
    check_name(publication.name)
    check_label(publication.label)
    settings, info = run.settings(), run.info()
    if settings.method == "full":
        raise SettingsError("method full makes a model, not an adapter: it cannot be published")
    if "result" not in info:
        raise RunError(f"{run.path}: is not finished; `trainer resume {run.path}` goes on with it")
    base = resolve_base(settings.base, note)
    if base.digest != info["base_digest"]:
        raise BaseMismatch(f"{run.path}: was trained on base {info['base_digest']}; {base.name} is {base.digest}")
    rows = read_rows(settings, base, publication, info["data_digest"])
    scores = score(run.adapter, base, rows, settings, publication.tolerance)
    note(_said(scores))
    training = replace(
        training_info(run),
        data_digest=info["data_digest"],
        tokenizer_digest=info["tokenizer_digest"],
        template_digest=info["template_digest"],
        scores=scores,
    )
    return store.publish(
        run.adapter,
        publication.name,
        base_digest=base.digest,
        base_name=base.name,
        linears=base.spec.linears(),
        label=publication.label,
        expected=publication.expected,
        training=training,
    )


def read_rows(settings: Settings, base: BaseModel, publication: Publication, trained_on: str) -> ScoredRows:
    """The rows that a publication is decided on; `trained_on` is the digest of the training rows. Raises DataError."""
    path = publication.data or Path(settings.eval_data or settings.data)
    tokenizer = load_tokenizer(base.path)
    encoder = make_encoder(settings, tokenizer, base.path, read_config(base.path))
    examples = encode_rows(path, encoder, Counts(), publication.num_rows)
    digest = digest_files(path)
    return ScoredRows(
        examples,
        digest,
        held_out=digest != trained_on,
        decoder=tokenizer if publication.answers else None,
        end_ids=frozenset(read_end_ids(base.path, tokenizer.eos_token_id)),
    )


def score(
    directory: Path, base: BaseModel, scored: ScoredRows, settings: Settings, tolerance: Tolerance = Tolerance()
) -> Scores:
    """Load a PEFT directory as the server does and score it. Raises InvalidAdapter kinds as the server would, and
    TrainingError where serving would not do what training did."""
    device = choose_device(settings.device)
    served = ServedBase(base.path, base.spec, device)
    adapter = served.load_adapter(directory)
    found = evaluate(served, adapter, scored.rows, scored.decoder, scored.end_ids)
    bare = Loss.sum(served.losses(scored.rows)).mean
    dtype = served.dtype
    del served, adapter  # the next one needs the room
    plain = replace(settings, method="lora", init="default")
    trained = peft_losses(base.path, directory, scored.rows, dtype, device, plain)
    quantized = None
    if settings.base_quantization is not None:
        quantized = Loss.sum(peft_losses(base.path, directory, scored.rows, dtype, device, settings)).mean
    _check(found.losses, trained, quantized, tolerance)
    return Scores(
        rows_digest=scored.digest,
        held_out=scored.held_out,
        num_rows=found.num_rows,
        num_tokens=found.loss.num_tokens,
        loss=found.loss.mean,
        trainer_loss=Loss.sum(trained).mean,
        base_loss=bare,
        quantized_loss=quantized,
        exact_match=found.exact_match,
    )


def _check(served: Sequence[Loss], trained: Sequence[Loss], quantized: float | None, tolerance: Tolerance) -> None:
    loss, expected, allowed = Loss.sum(served).mean, Loss.sum(trained).mean, tolerance.allowed(served, trained)
    if not abs(loss - expected) <= allowed:
        raise TrainingError(
            f"served, the adapter's loss is {loss:.5f}, by the trainer {expected:.5f}: further apart than "
            f"{allowed:.2g}, so it would not do what it was trained to; nothing is published"
        )
    if quantized is not None and not loss - quantized <= tolerance.quantization:
        raise TrainingError(
            f"the loss on the 16-bit base that is served is {loss:.3f}, on the quantized one that it was trained on "
            f"{quantized:.3f}: worse by more than {tolerance.quantization:g}; nothing is published"
        )


def _said(scores: Scores) -> str:
    kind = "held-out" if scores.held_out else "training"
    text = f"served, the loss on {scores.num_rows} {kind} rows is {scores.loss:.4f} (base {scores.base_loss:.4f}, "
    text += f"trainer {scores.trainer_loss:.4f})"
    return text if scores.exact_match is None else f"{text}; {scores.exact_match:.1%} of the answers are exact"
