"""Adapter names as label values: few enough for Prometheus, whatever is published."""

BASE_LABEL = "base"
OTHER_LABEL = "_other"


class AdapterLabels:
    """The first `limit` names seen keep theirs; all later ones, and one that is the base's label, share `_other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def __call__(self, name: str) -> str:
        if not name:
            return BASE_LABEL
        if name in self._names:
            return name
        if len(self._names) < self._limit and name != BASE_LABEL:
            self._names.add(name)
            return name
        return OTHER_LABEL

    def known(self, name: str) -> str:
        """The label that it has, or would share; none is given."""
        return BASE_LABEL if not name else name if name in self._names else OTHER_LABEL
