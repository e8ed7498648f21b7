"""Bookings: a sentence in which someone asks for a table, as one line of fields.

    "Could you squeeze in Lindqvist, party of six, this Thursday at seven forty-five in the evening?"
    → thu 7:45 6 Lindqvist

The words have to be understood, not copied: the clock is told in words, the party counted in words or by its members,
and one sentence in three names a day or a number that does not matter. A row is a test row
or a training row by its fields' hash, so no booking that is asked for in the test was trained on in any wording.
"""

import hashlib
import random
from dataclasses import dataclass

from trainer.tasks.task import Row

INSTRUCTION = "Write the booking as: day time people name"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
# fmt: off
NAMES = (
    "Lindqvist", "Okafor", "Marsh", "Delgado", "Petrov", "Nakamura", "Haddad", "Byrne", "Castellano", "Novak",
    "Abara", "Fischer", "Moreau", "Svensson", "Tanaka", "Walsh", "Ibrahim", "Keller", "Rossi", "Dubois", "Mensah",
    "Horvat", "Larsen", "Quinn", "Silva", "Weber", "Yilmaz", "Andersen", "Banerjee", "Costa", "Doyle", "Eriksen",
    "Ferrari", "Gupta", "Hughes", "Ivanov", "Jansen", "Kowalski", "Lopez", "Murphy",
)
# fmt: on
OPENINGS = (
    "Could you squeeze in {who}, {party}, {day} {time}?",
    "Hi, I need a table {time} {day} for {people}, under {who}.",
    "{who} here. {People} of us would like to come {day}, {time}.",
    "Please put {who} down for {people} {day} {time}.",
    "Is there room for {people} {day}? We would be there {time}. The name is {who}.",
    "Book {party} {time}, {day}. Name: {who}.",
    "My name is {who} and I am looking for a table for {people}, {day} {time}.",
    "{day}, {time}, {party}, and the booking goes to {who}.",
)
DISTRACTIONS = (
    "Not {other_day}, we are away then.",
    "Last time we were {other_number}, and it was lovely.",
    "We will be celebrating {other_number} years together.",
    "I called on {other_day} but nobody answered.",
    "My phone number ends in {other_number}.",
)
TEST_SHARE = 5  # one booking in so many is kept for the test


@dataclass(frozen=True, slots=True)
class Booking:
    """`minute` is since noon, a multiple of fifteen."""

    day: int
    minute: int
    people: int
    name: str

    @property
    def answer(self) -> str:
        hour, past = divmod(self.minute, 60)
        return f"{DAYS[self.day][:3].lower()} {hour or 12}:{past:02} {self.people} {self.name}"

    @property
    def is_test(self) -> bool:
        return hashlib.sha256(self.answer.encode()).digest()[0] % TEST_SHARE == 0


class Bookings:
    """See the module."""

    name = "bookings"

    def train(self, num_rows: int, seed: int) -> list[Row]:
        """See `Task`."""
        return _rows(num_rows, random.Random(f"bookings train {seed}"), is_test=False)

    def test(self, num_rows: int, seed: int) -> list[Row]:
        """See `Task`."""
        return _rows(num_rows, random.Random(f"bookings test {seed}"), is_test=True)


def _rows(num_rows: int, rng: random.Random, *, is_test: bool) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < num_rows:
        booking = Booking(rng.randrange(7), 15 * rng.randrange(10 * 4), rng.randint(1, 12), rng.choice(NAMES))
        if booking.is_test == is_test:
            rows.append(
                {
                    "messages": [
                        {"role": "system", "content": INSTRUCTION},
                        {"role": "user", "content": _sentence(booking, rng)},
                        {"role": "assistant", "content": booking.answer},
                    ]
                }
            )
    return rows


def _sentence(booking: Booking, rng: random.Random) -> str:
    people = _people(booking.people, rng)
    day = DAYS[booking.day]
    fields = {
        "who": booking.name,
        "people": people,
        "People": people.capitalize(),
        "party": f"a party of {NUMBERS[booking.people - 1]}",
        "day": rng.choice(("on {}", "this {}", "next {}", "this coming {}")).format(day),
        "time": _time(booking.minute, rng),
    }
    text = rng.choice(OPENINGS).format(**fields)
    if rng.random() < 1 / 3:
        other = rng.choice([name for name in DAYS if name != day])
        number = rng.choice([name for name in NUMBERS[1:] if name != NUMBERS[booking.people - 1]])
        text += " " + rng.choice(DISTRACTIONS).format(other_day=other, other_number=number)
    return text[0].upper() + text[1:]


def _people(count: int, rng: random.Random) -> str:
    """As a number word, or as the one who asks and the others."""
    if count > 1 and rng.random() < 0.3:
        others = NUMBERS[count - 2]
        return f"{others} {'friend' if count == 2 else 'friends'} and me"
    return NUMBERS[count - 1]


def _time(minute: int, rng: random.Random) -> str:
    """In words, four times in five: "half past eight in the evening"."""
    hour, past = divmod(minute, 60)
    if rng.random() < 0.2:
        return f"at {hour or 12}:{past:02} pm"
    this = NUMBERS[hour - 1]
    told = {0: this, 15: f"a quarter past {this}", 30: f"half past {this}", 45: f"{this} forty-five"}[past]
    return f"at {told} in the {'afternoon' if hour < 6 else 'evening'}"
