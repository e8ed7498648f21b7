"""What of the data is learned, token by token, for a person to look at."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data import open_source
from trainer.encoding import Counts, Example
from trainer.prepare import Note, find_base, load_tokenizer, make_encoder, read_config
from trainer.settings import Settings


@dataclass(frozen=True, slots=True)
class Shown:
    """An example: its pieces in order, each with whether it is learned. `place` says where its row is."""

    place: str
    pieces: tuple[tuple[str, bool], ...]

    @property
    def num_learned(self) -> int:
        """Tokens that are learned."""
        return sum(learned for _, learned in self.pieces)


def preview(settings: Settings, num_rows: int, note: Note) -> Iterator[Shown]:
    """The examples of the first `num_rows` rows of the data, as they would be trained on. Raises DataError."""
    base = find_base(settings.base, note)
    tokenizer = load_tokenizer(base.path)
    encoder = make_encoder(settings, tokenizer, base.path, read_config(base.path))
    for row in islice(open_source(Path(settings.data)).rows(), num_rows):
        for example in encoder.encode_all([row], Counts()):
            yield Shown(row.place, tuple(pieces(tokenizer, example)))


def pieces(tokenizer: Any, example: Example) -> Iterator[tuple[str, bool]]:
    """Each token's own text. A character whose bytes lie in several tokens appears with the last of them."""
    held: list[int] = []
    for token, learned in zip(example.ids.tolist(), example.mask.tolist(), strict=True):
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < 4:
            yield "", learned
        else:
            yield text, learned
            held = []
