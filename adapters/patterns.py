"""Matching module names against regular expressions that anyone may have written.

Python's `re` backtracks: a short hostile expression keeps it busy for years, holding the interpreter's lock.
Here `re` only parses; matching follows all ways at once, as the set of positions in the name that have been
reached (Thompson, 1968), and the work that one config may ask for is bounded.
"""

import importlib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

Pattern = Callable[[str], bool]
_Step = Callable[["_Run", int], int]  # positions reached before → after; a set of positions is a bit mask

_MAX_LENGTH = 4096
_MAX_STEPS = 1_000_000  # each a fifth of a microsecond or so
_STEPS_A_CHARACTER = 30  # what parsing costs
# What a key of rank_pattern or alpha_pattern usually is; a dot in it is any character.
_PLAIN = re.compile(r"[\w.]*")
_CLASSES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_ANCHORS = {
    "AT_BEGINNING": r"^",
    "AT_BEGINNING_STRING": r"\A",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
    "AT_END": r"$",
    "AT_END_STRING": r"\Z",
}


class UnsafePattern(ValueError):
    """The expression is not valid, not of a kind that is matched here, or takes too long."""


class PatternCompiler:
    """Compiles the expressions of one config; they share its bound of work."""

    def __init__(self) -> None:
        self._steps = _MAX_STEPS

    def compile(self, expression: str) -> Pattern:
        """A predicate that is `re.fullmatch(expression, name) is not None`. Both raise UnsafePattern."""
        step = self._parse(expression)
        return lambda name: bool(step(_Run(name, self), 1) >> len(name))

    def _compile_key(self, key: str) -> Pattern:
        """A predicate that is `re.match(suffix_pattern(key), name) is not None`: "a)|(b" may end before the name."""
        step = self._parse(suffix_pattern(key))
        return lambda name: bool(step(_Run(name, self), 1))

    def _parse(self, expression: str) -> _Step:
        if len(expression) > _MAX_LENGTH:
            raise UnsafePattern(f"it is longer than {_MAX_LENGTH} characters")
        self.spend(_STEPS_A_CHARACTER * len(expression))
        try:
            parsed = importlib.import_module("re._parser").parse(expression)
            if parsed.state.flags != re.UNICODE:
                raise UnsafePattern("flags are not supported")
            return _sequence(parsed)
        except (re.error, OverflowError) as error:
            raise UnsafePattern(f"it is not valid: {error}") from None
        except RecursionError:
            raise UnsafePattern("it is nested too deeply") from None

    def compile_keys(self, keys: Sequence[str]) -> Callable[[str], int | None]:
        """What tells the index of the first key that stands for the end of a name: all of it, or what follows a dot.

        A key is an expression; that of most is plain, and any number of those costs little.
        """
        plain = _PlainKeys({key: at for at, key in reversed([*enumerate(keys)]) if _PLAIN.fullmatch(key)}, self)
        others = [(at, self._compile_key(key)) for at, key in enumerate(keys) if not _PLAIN.fullmatch(key)]

        def first(name: str) -> int | None:
            best = plain.first(name)
            for at, matches in others:
                if best is not None and at > best:
                    break
                if matches(name):
                    return at
            return best

        return first

    def spend(self, steps: int) -> bool:
        """Counts work done; always true."""
        self._steps -= steps
        if self._steps < 0:
            raise UnsafePattern("matching takes too long")
        return True


def suffix_pattern(key: str) -> str:
    """The expression that a key of rank_pattern or alpha_pattern stands for."""
    return rf"(.*\.)?({key})$"


class _PlainKeys:
    """Keys without other signs than dots, by their length and where their dots are: names of the same form are looked
    up, not compared."""

    def __init__(self, keys: Mapping[str, int], compiler: PatternCompiler) -> None:
        self._spend = compiler.spend
        self._forms: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        for key, at in keys.items():
            dots = tuple(i for i, character in enumerate(key) if character == ".")
            self._forms.setdefault((len(key), dots), {})[key] = at

    def first(self, name: str) -> int | None:
        best: int | None = None
        for (size, dots), keys in self._forms.items():
            self._spend(1)
            start = len(name) - size
            if start < 0 or (start > 0 and name[start - 1] != "."):
                continue
            end = name[start:]
            if dots:
                self._spend(2 + len(dots))
                characters = list(end)
                for dot in dots:
                    characters[dot] = "."
                end = "".join(characters)
            at = keys.get(end)
            if at is not None and (best is None or at < best):
                best = at
        return best


class _Run:
    """One name being matched."""

    def __init__(self, name: str, compiler: PatternCompiler) -> None:
        self.name = name
        self.spend = compiler.spend
        self._masks: dict[Hashable, int] = {}

    def where(self, condition: Hashable, holds: Callable[[str, int], bool]) -> int:
        """The positions of the name, its end too, at which a condition holds; worked out once for each."""
        if condition not in self._masks:
            self.spend(1 + len(self.name))
            self._masks[condition] = sum(1 << at for at in range(len(self.name) + 1) if holds(self.name, at))
        return self._masks[condition]


def _sequence(nodes: Iterable[tuple[Any, Any]]) -> _Step:
    steps = [_node(str(kind), argument) for kind, argument in nodes]

    def run(run: _Run, reached: int) -> int:
        for step in steps:
            run.spend(1)
            if not (reached := step(run, reached)):
                break
        return reached

    return run


def _node(kind: str, argument: Any) -> _Step:
    if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return _one_character((kind, str(argument)), _member(kind, argument))
    if kind == "AT":
        anchor = re.compile(_ANCHORS[str(argument)])
        holds = lambda name, at: anchor.match(name, at) is not None  # noqa: E731
        return lambda run, reached: reached & run.where(str(argument), holds)
    if kind == "SUBPATTERN" and not argument[1] and not argument[2]:  # group, flags added, flags removed, nodes
        return _sequence(argument[3])
    if kind == "BRANCH":
        return _either([_sequence(nodes) for nodes in argument[1]])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeat(argument[0], argument[1], _sequence(argument[2]))
    if kind in ("ASSERT", "ASSERT_NOT") and argument[0] == 1:
        return _ahead(_sequence(argument[1]), wanted=kind == "ASSERT")
    raise UnsafePattern(f"it uses what is not supported here ({kind.lower()})")


def _one_character(condition: Hashable, is_member: Callable[[str], bool]) -> _Step:
    holds = lambda name, at: at < len(name) and is_member(name[at])  # noqa: E731
    return lambda run, reached: (reached & run.where(condition, holds)) << 1


def _member(kind: str, argument: Any) -> Callable[[str], bool]:
    """Whether a character is one that a node stands for."""
    if kind == "LITERAL":
        return lambda character: ord(character) == argument
    if kind == "NOT_LITERAL":
        return lambda character: ord(character) != argument
    if kind == "ANY":
        return lambda character: character != "\n"
    if kind == "RANGE":
        return lambda character: argument[0] <= ord(character) <= argument[1]
    if kind == "CATEGORY":
        known = re.compile(_CLASSES[str(argument)])
        return lambda character: known.match(character) is not None
    assert kind == "IN", f"unknown part of a character class: {kind}"
    negated = str(argument[0][0]) == "NEGATE"
    members = [_member(str(part), value) for part, value in argument[negated:]]
    return lambda character: any(member(character) for member in members) != negated


def _either(ways: list[_Step]) -> _Step:
    def run(run: _Run, reached: int) -> int:
        after = 0
        for way in ways:
            after |= way(run, reached)
        return after

    return run


def _repeat(least: int, most: int, step: _Step) -> _Step:
    def run(run: _Run, reached: int) -> int:
        for _ in range(least):
            before, reached = reached, step(run, reached)
            if reached in (0, before):
                break
        fresh, count = reached, least
        while fresh and count < most:  # a way that comes late to a place does no better than the first to come there
            fresh = step(run, fresh) & ~reached
            reached |= fresh
            count += 1
        return reached

    return run


def _ahead(step: _Step, *, wanted: bool) -> _Step:
    def run(run: _Run, reached: int) -> int:
        kept, rest = 0, reached
        while rest:
            position = rest & -rest
            rest ^= position
            if bool(step(run, position)) == wanted:
                kept |= position
        return kept

    return run
