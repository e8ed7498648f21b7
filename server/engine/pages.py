"""The KV cache's pages: who holds which, and which can be reused as a prefix. Numbers only, no tensor.

A page holds `page_size` consecutive positions of one sequence. A page whose tokens are all computed and known is
*published* under a key that chains over (the sequence's `kv_key`, key of the page before, its own tokens), so that
equal keys mean equal KV: same adapter, served the same way, same tokens, same positions. Keys are 256-bit BLAKE2b
digests, not Python hashes: a collision would serve one request's KV to another. Several sequences may hold a published
page; none writes to it.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from server.engine.sequence import Sequence


def _root_key(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=32, person=b"adapter").digest()


def _page_key(parent: bytes, tokens: list[int]) -> bytes:
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=32, person=b"page").digest()


class PageManager:
    """A fixed pool of pages 0 … num_pages - 1. Each is free, cached (published, held by nobody, reusable) or in use."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        assert num_pages > 0, "a pool has pages"
        assert page_size > 0, "a page has room"
        self.num_pages = num_pages
        self.page_size = page_size
        self._prefix_caching = prefix_caching
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._refs = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now: free ones, and cached ones at the price of forgetting them."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, seq: Sequence, headroom: int = 0) -> int | None:
        """Give a sequence without pages those for all its known tokens, cached ones first.

        Returns how many leading tokens are already computed: whole pages, and at least one token is left to
        compute. None, and nothing changes, if fewer than `headroom` pages would remain available.
        """
        assert not seq.pages, "allocate is for a sequence without pages"
        matched = self._match(seq)
        num_new = self.pages_for(seq.num_known) - len(matched)
        num_revived = sum(1 for page in matched if self._refs[page] == 0)
        if self.num_available - num_revived - num_new < headroom:
            return None
        for page in matched:
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1
        seq.pages = matched + [self._take() for _ in range(num_new)]
        seq.num_published = len(matched)
        return len(matched) * self.page_size

    def extend(self, seq: Sequence, num_tokens: int) -> bool:
        """Make the sequence's pages cover `num_tokens` positions; False, and nothing changes, if none is left."""
        num_new = self.pages_for(num_tokens) - len(seq.pages)
        if num_new <= 0:
            return True
        if num_new > self.num_available:
            return False
        for _ in range(num_new):
            seq.pages.append(self._take())
        return True

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Offer the full pages among the first `num_tokens` positions, whose KV is written, to later sequences.

        A page whose content is already published by another stays its holder's own."""
        num_full = num_tokens // self.page_size
        if num_full <= seq.num_published or not self._prefix_caching:
            return
        assert num_tokens <= seq.num_known, "a page is published only when its tokens are known"
        self._make_keys(seq, num_full)
        for index in range(seq.num_published, num_full):
            page, key = seq.pages[index], seq.page_keys[index]
            if key not in self._page_of:
                self._page_of[key] = page
                self._key_of[page] = key
        seq.num_published = num_full

    def free(self, seq: Sequence) -> None:
        """Take the sequence's pages back. Published ones stay cached; the prefix's tail is forgotten first."""
        for page in reversed(seq.pages):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if self._key_of[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None
        seq.pages = []

    def _match(self, seq: Sequence) -> list[int]:
        if not self._prefix_caching:
            return []
        matched: list[int] = []
        for index in range((seq.num_known - 1) // self.page_size):
            self._make_keys(seq, index + 1)
            page = self._page_of.get(seq.page_keys[index])
            if page is None:
                break
            matched.append(page)
        return matched

    def _make_keys(self, seq: Sequence, num_keys: int) -> None:
        for index in range(len(seq.page_keys), num_keys):
            parent = seq.page_keys[-1] if seq.page_keys else _root_key(seq.kv_key)
            start = index * self.page_size
            seq.page_keys.append(_page_key(parent, seq.tokens(start, start + self.page_size)))

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            key = self._key_of[page]
            assert key is not None, f"cached page {page} has no key"
            del self._page_of[key]
            self._key_of[page] = None
        self._refs[page] = 1
        return page

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Assert that each page is exactly one of free, cached, in use, and held as often as `holders` say."""
        held: Counter[int] = Counter()
        for seq in holders:
            assert len(set(seq.pages)) == len(seq.pages), f"{seq.request_id} holds a page twice"
            held.update(seq.pages)
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        free, cached = set(self._free), set(self._cached)
        assert not free & cached, f"both free and cached: {free & cached}"
        for page in range(self.num_pages):
            assert self._refs[page] == held[page], f"page {page}: {self._refs[page]} references, {held[page]} holders"
            assert (self._refs[page] == 0) == (page in free or page in cached), f"page {page} is lost"
            key = self._key_of[page]
            assert key is None or self._page_of.get(key) == page, f"page {page}: its key leads elsewhere"
            assert page not in cached or key is not None, f"page {page}: cached without a key"
            assert page not in free or key is None, f"page {page}: free with a key"
        assert len(self._page_of) == sum(key is not None for key in self._key_of), "a key leads to no page"
