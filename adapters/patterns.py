"""Matching module names against the regular expressions of a config that anyone may have written."""

import re
from collections.abc import Callable

Pattern = Callable[[str], bool]

_MAX_LENGTH = 4096


class UnsafePattern(ValueError):
    """The expression is not valid, or not one that is matched here."""


def compile_pattern(expression: str) -> Pattern:
    """A predicate that is `re.fullmatch(expression, name) is not None`. Raises UnsafePattern."""
    if len(expression) > _MAX_LENGTH:
        raise UnsafePattern(f"longer than {_MAX_LENGTH} characters")
    try:
        compiled = re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise UnsafePattern(f"not a valid pattern: {error}") from None
    return lambda name: compiled.fullmatch(name) is not None
