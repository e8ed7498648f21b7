"""Stop strings: ends a text where one of them would appear, however the text is cut into pieces.

An Aho-Corasick automaton (1975) reads each character once. Its depth is the length of the longest end of the text
that begins a stop string, and so exactly what must be held back.
"""

from collections.abc import Sequence


class StopStrings:
    """Watches one text. The stop string that is complete first wins, the longest of those that end together; it and
    what follows are not part of the text. `strings` must not hold an empty one."""

    __slots__ = ("_children", "_depth", "_fail", "_held", "_match", "_state", "matched")

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "an empty stop string"
        # Node 0 is the root; of each node: its children, where to go on a mismatch, its depth, and the length of
        # the longest stop string that ends there (0: none).
        self._children: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match = [0]
        for string in strings:
            self._insert(string)
        self._link()
        self._state = 0
        self._held = ""
        self.matched = False

    def add(self, text: str) -> str:
        """What can be shown now: of the text held back and this, all that can not belong to a stop string. Once one
        is complete, `matched` is true and this is the last of the text."""
        assert not self.matched, "text after a stop string"
        children, fail, match, state = self._children, self._fail, self._match, self._state
        held = len(self._held)
        text = self._held + text
        for position in range(held, len(text)):
            char = text[position]
            while state and char not in children[state]:
                state = fail[state]
            state = children[state].get(char, 0)
            if match[state]:
                self.matched = True
                self._held = ""
                return text[: position + 1 - match[state]]
        self._state = state
        shown = len(text) - self._depth[state]
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _insert(self, string: str) -> None:
        node = 0
        for char in string:
            child = self._children[node].get(char)
            if child is None:
                child = self._children[node][char] = len(self._children)
                self._children.append({})
                self._fail.append(0)
                self._depth.append(self._depth[node] + 1)
                self._match.append(0)
            node = child
        self._match[node] = len(string)

    def _link(self) -> None:
        """Breadth first: a node's mismatch leads to the longest proper end of its string that is in the tree."""
        queue = list(self._children[0].values())
        for node in queue:
            for char, child in self._children[node].items():
                state = self._fail[node]
                while state and char not in self._children[state]:
                    state = self._fail[state]
                self._fail[child] = self._children[state].get(char, 0)
                self._match[child] = self._match[child] or self._match[self._fail[child]]
                queue.append(child)
