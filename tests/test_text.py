from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sched.text import StopStrings, Text


class Spelling:
    """A detokenizer whose tokens are characters; 0 is the first byte of one that the next completes."""

    def __init__(self):
        self.open = False

    def feed(self, token: int) -> str:
        if token == 0:
            self.open = True
            return ""
        text, self.open = ("é" if self.open else chr(token)), False
        return text

    def flush(self) -> str:
        return "\ufffd" if self.open else ""


def plain(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The oracle: the earliest stop in the whole text, the first named among those that begin there."""
    hits = [(text.find(s), i) for i, s in enumerate(stops) if s in text]
    if not hits:
        return text, None
    at, i = min(hits)
    return text[: at + len(stops[i]) if include else at], stops[i]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.booleans(), st.data())
def test_no_half_stop_string_ever_leaks(text, stops, include, data):
    """Cut a text anywhere: what is shown is always a beginning of what the end will be."""
    matcher, shown, hit = StopStrings(stops, include), "", None
    rest = text
    while rest and hit is None:
        cut = data.draw(st.integers(1, len(rest)))
        piece, hit = matcher.push(rest[:cut])
        rest = rest[cut:]
        shown += piece
        if hit is None and not include:
            for stop in stops:
                assert stop not in shown
                assert not any(
                    shown.endswith(stop[:k]) and matcher.held == "" and rest.startswith(stop[k:]) for k in range(1, len(stop))
                )
    if hit is None:
        shown += matcher.flush()
    consumed = text[: len(text) - len(rest)]
    want, _ = plain(consumed, stops, include)
    assert (shown == want) or (hit is not None and include and shown.startswith(want))
    assert (hit is None) == (plain(text, stops, include)[1] is None)


def test_text_waits_for_whole_characters_and_flushes_a_broken_one():
    text = Text(Spelling(), [], False, 0)
    assert [text.push(t)[0] for t in (0, 1, 65, 0)] == ["", "é", "A", ""]
    assert text.close() == ("\ufffd", None)


def test_held_text_comes_out_at_the_end():
    text = Text(Spelling(), ["xyz"], False, 0)
    assert text.push(ord("x")) == ("", None) and text.push(ord("y")) == ("", None)
    assert text.close() == ("xy", None)


def test_min_tokens_outlasts_a_stop_string():
    text = Text(Spelling(), ["b"], False, 2)
    assert [text.push(ord(c)) for c in "abab"] == [("a", None), ("b", None), ("a", None), ("", "b")]
