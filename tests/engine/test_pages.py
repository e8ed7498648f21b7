"""The page manager against a model of what each page holds."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.engine.messages import AdapterRef, SamplingParams, StopParams
from server.engine.pages import PageManager
from server.engine.sequence import Sequence


def sequence(prompt: list[int], digest: str = "") -> Sequence:
    adapter = AdapterRef(digest, "/") if digest else None
    return Sequence("r", prompt, SamplingParams(seed=0), StopParams(max_tokens=8), 0.0, adapter)


def computed(pages: PageManager, prompt: list[int], digest: str = "") -> Sequence:
    """A sequence that ran its prompt and published it, and still holds its pages."""
    seq = sequence(prompt, digest)
    assert pages.allocate(seq) is not None
    pages.publish(seq, len(prompt))
    return seq


def test_a_running_prefix_is_shared_not_copied() -> None:
    pages = PageManager(8, 4)
    first = computed(pages, list(range(10)))
    second = sequence(list(range(10)))
    assert pages.allocate(second) == 8
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert pages.num_used == 4
    pages.free(first)
    pages.check_integrity([second])
    assert pages.num_used == 3


def test_a_whole_prompt_in_the_cache_leaves_a_token_to_compute() -> None:
    pages = PageManager(8, 4)
    pages.free(computed(pages, list(range(8))))
    second = sequence(list(range(8)))
    assert pages.allocate(second) == 4


def test_only_published_pages_are_found() -> None:
    pages = PageManager(8, 4)
    first, second = sequence(list(range(9))), sequence(list(range(9)))
    pages.allocate(first)
    pages.publish(first, 7)
    assert pages.allocate(second) == 4


@pytest.mark.parametrize(
    ("prompt", "digest"),
    [
        ([1, 1, 1, 1, 2, 2, 2, 2, 9], "other"),
        ([1, 1, 1, 1, 2, 2, 2, 2, 9], ""),
        ([2, 2, 2, 2, 1, 1, 1, 1, 9], "mine"),
        ([257, 1, 1, 1, 2, 2, 2, 2, 9], "mine"),
    ],
)
def test_another_adapter_or_another_past_shares_nothing(prompt: list[int], digest: str) -> None:
    pages = PageManager(8, 4)
    pages.free(computed(pages, [1, 1, 1, 1, 2, 2, 2, 2, 9], "mine"))
    assert pages.allocate(sequence(prompt, digest)) == 0


def test_the_least_recently_used_is_forgotten_first_and_a_prefix_from_its_tail() -> None:
    pages = PageManager(4, 4)
    old, new = computed(pages, [1] * 8), computed(pages, [2] * 8)
    pages.free(old)
    pages.free(new)
    taker = sequence([3, 3, 3, 3, 3])
    pages.allocate(taker)  # both pages of `old`
    pages.free(taker)
    assert pages.allocate(sequence([2] * 8)) == 4
    pages = PageManager(4, 4)
    pages.free(computed(pages, [1] * 16))
    taker = sequence([3])
    pages.allocate(taker)
    pages.free(taker)
    assert pages.allocate(sequence([1] * 16)) == 12


def test_allocation_is_all_or_nothing_and_keeps_the_headroom() -> None:
    pages = PageManager(4, 4)
    holder = computed(pages, [1] * 8)
    assert pages.allocate(sequence([2] * 9)) is None
    assert pages.allocate(sequence([2] * 5), headroom=1) is None
    pages.check_integrity([holder])
    assert pages.num_used == 2
    shared = sequence([1] * 9)
    assert pages.allocate(shared, headroom=1) == 8
    assert pages.extend(shared, 16)
    assert not pages.extend(shared, 17)
    pages.check_integrity([holder, shared])


def test_cached_pages_taken_again_do_not_count_as_room() -> None:
    pages = PageManager(3, 4)
    pages.free(computed(pages, [1] * 12))
    assert pages.num_available == 3
    assert pages.allocate(sequence([1] * 13)) is None
    assert pages.allocate(sequence([1] * 12)) == 8


def test_without_prefix_caching_nothing_is_reused() -> None:
    pages = PageManager(8, 4, prefix_caching=False)
    pages.free(computed(pages, [1] * 8))
    assert pages.allocate(sequence([1] * 8)) == 0


class Pages(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet, so that prefixes collide often."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageManager(6, 2)
        self.held: list[tuple[Sequence, int]] = []  # with how many tokens are written
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        digest=st.sampled_from(["", "a", "b"]),
        headroom=st.integers(0, 2),
    )
    def allocate(self, prompt: list[int], digest: str, headroom: int) -> None:
        seq = sequence(prompt, digest)
        num_cached = self.pages.allocate(seq, headroom)
        if num_cached is None:
            assert not seq.pages
            return
        assert self.pages.num_available >= headroom
        assert num_cached < len(prompt)
        assert len(seq.pages) == self.pages.pages_for(len(prompt))
        self.held.append((seq, num_cached))

    @rule(index=st.integers(0, 9), num_tokens=st.integers(1, 4))
    def write(self, index: int, num_tokens: int) -> None:
        if self.held:
            seq, written = self.held.pop(index % len(self.held))
            stop = min(written + num_tokens, len(seq.prompt))
            for position in range(written, stop):
                self.slots[self.slot(seq, position)] = seq.digest, tuple(seq.prompt[: position + 1])
            self.pages.publish(seq, stop)
            self.held.append((seq, stop))

    @rule(index=st.integers(0, 9), token=st.integers(0, 1))
    def append(self, index: int, token: int) -> None:
        if self.held:
            seq, _ = self.held[index % len(self.held)]
            available = self.pages.num_available
            if self.pages.extend(seq, len(seq.prompt) + 1):
                seq.prompt.append(token)
            else:
                assert available == 0

    @rule(index=st.integers(0, 9))
    def free(self, index: int) -> None:
        if self.held:
            self.pages.free(self.held.pop(index % len(self.held))[0])

    def slot(self, seq: Sequence, position: int) -> tuple[int, int]:
        return seq.pages[position // self.pages.page_size], position % self.pages.page_size

    @invariant()
    def every_page_holds_its_sequences_own_history(self) -> None:
        self.pages.check_integrity(seq for seq, _ in self.held)
        for seq, written in self.held:
            for position in range(written):
                assert self.slots[self.slot(seq, position)] == (seq.digest, tuple(seq.prompt[: position + 1]))


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
