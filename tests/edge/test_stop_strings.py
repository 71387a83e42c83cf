"""Stop strings cut the text where they begin, in whatever pieces it comes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edge.conversation.stop_strings import StopStrings

WORDS = st.text(alphabet="abc", max_size=12)


def cut(pieces: list[str], stops: list[str]) -> tuple[str, str]:
    matcher = StopStrings(stops)
    text = "".join(map(matcher.feed, pieces)) + matcher.flush()
    return text, matcher.matched


@given(st.lists(WORDS, max_size=5), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_the_text_ends_where_the_first_stop_string_begins(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    begins = [at for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: min(begins, default=len(text))]
    assert cut(pieces, stops) == cut([text], stops) == cut(list(text), stops)
    assert cut(pieces, stops)[0] == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["<end>"])
    assert matcher.feed("abc <e") == "abc "
    assert matcher.feed("gg") == "<egg"


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopStrings([]).feed("text") == "text"
