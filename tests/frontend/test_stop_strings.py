"""Against a search of the whole text, cut in every way."""

from hypothesis import given
from hypothesis import strategies as st

from server.frontend.stop_strings import StopStrings


def naive(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first (the longest of those), None if there is none."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


few_chars = st.text("ab\n", max_size=20)


@given(st.lists(few_chars, max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=5))
def test_equals_a_search_of_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += watch.add(piece)
        if watch.matched:
            break
    text = "".join(pieces)
    expected = naive(text, stops)
    assert watch.matched == (expected is not None)
    assert shown + watch.flush() == (text if expected is None else expected)


@given(st.lists(few_chars, max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=5))
def test_holds_back_no_more_than_could_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += watch.add(piece)
        if watch.matched:
            return
        begins = [size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])]
        assert shown == text[: len(text) - max(begins, default=0)]


def test_a_match_across_pieces_is_not_shown() -> None:
    watch = StopStrings(["\n\nUser:"])
    assert watch.add("fine.\n") == "fine."
    assert watch.add("\nUs") == ""
    assert watch.add("er: hi") == ""
    assert watch.matched


def test_text_that_only_looked_like_a_stop_string_is_shown_late() -> None:
    watch = StopStrings(["END!"])
    assert watch.add("the EN") == "the "
    assert watch.add("D?") == "END?"
    assert watch.flush() == ""
