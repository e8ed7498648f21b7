"""Errors that the engine reports, as the exceptions they were there."""

from collections.abc import Iterator

from adapters.errors import InvalidAdapter, LorikeetError
from server.engine.messages import ErrorPayload
from server.errors import InvalidRequest


class EngineErrors:
    """Knows every error of the tree that is loaded, by its reason."""

    def __init__(self) -> None:
        self._by_reason = {kind.reason: kind for kind in _tree(LorikeetError)}

    def __call__(self, payload: ErrorPayload) -> LorikeetError:
        """An unknown reason becomes the root error, INTERNAL."""
        kind = self._by_reason.get(payload.reason, LorikeetError)
        error = kind.__new__(kind)
        LorikeetError.__init__(error, payload.message, retry_after=payload.retry_after, **payload.metadata)
        if isinstance(error, InvalidAdapter):
            error.faults = tuple(payload.faults)
        if isinstance(error, InvalidRequest):
            error.field = payload.metadata.get("field", "")
        return error


def _tree(root: type[LorikeetError]) -> Iterator[type[LorikeetError]]:
    """Children first, so that of two that share a reason the one nearer the root wins."""
    for child in root.__subclasses__():
        yield from _tree(child)
    yield root
