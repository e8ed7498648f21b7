"""Packed adapters kept in host memory, so that coming back to the device needs no file."""

from collections import OrderedDict
from collections.abc import Iterator

from server.lora.weights import PackedAdapter


class HostTier:
    """At most `num_bytes` of packed adapters by digest, least recently used out first. 0 keeps none.

    An adapter stays while it is on the device too: leaving the device then costs nothing.
    """

    def __init__(self, num_bytes: int) -> None:
        self._budget = num_bytes
        self._entries: OrderedDict[str, PackedAdapter] = OrderedDict()  # least recently used first
        self.used_bytes = 0
        self.num_evictions = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __iter__(self) -> Iterator[tuple[str, PackedAdapter]]:
        return iter(self._entries.items())

    def get(self, digest: str) -> PackedAdapter | None:
        self.touch(digest)
        return self._entries.get(digest)

    def touch(self, digest: str) -> None:
        """Count as used now; absent is fine."""
        if digest in self._entries:
            self._entries.move_to_end(digest)

    def put(self, digest: str, packed: PackedAdapter) -> None:
        """Keep an adapter at the expense of others; one larger than all of the tier is not kept."""
        size = packed.num_bytes
        if digest in self._entries or size > self._budget:
            self.touch(digest)
            return
        while self.used_bytes + size > self._budget:
            self.drop(next(iter(self._entries)))
            self.num_evictions += 1
        self._entries[digest] = packed
        self.used_bytes += size

    def drop(self, digest: str) -> None:
        """Absent is fine."""
        packed = self._entries.pop(digest, None)
        if packed is not None:
            self.used_bytes -= packed.num_bytes

    def check_integrity(self) -> None:
        total = sum(packed.num_bytes for packed in self._entries.values())
        assert total == self.used_bytes <= self._budget, f"{self.used_bytes} bytes counted, {total} held"
