"""From token ids to the text a client may see: incremental detokenising and stop strings. Pure.

Text that could still turn out to be the beginning of a stop string is held back, so that never half of one leaks.
"""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """`engine.tokenizer.Detokenizer`."""

    def feed(self, token: int) -> str: ...
    def flush(self) -> str: ...


class StopStrings:
    """Finds the first of `stops` in a text that arrives in pieces."""

    __slots__ = ("held", "include", "longest", "stops")

    def __init__(self, stops: list[str], include: bool):
        self.stops = stops
        self.include = include  # the stop string itself belongs to the output
        self.longest = max(map(len, stops), default=0)
        self.held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that has now appeared or None)."""
        text = self.held + piece
        at, hit = min(((i, s) for s in self.stops if (i := text.find(s)) >= 0), key=lambda x: x[0], default=(-1, None))
        if hit is not None:
            self.held = ""
            return text[: at + len(hit) if self.include else at], hit
        keep = self.partial(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self.longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self.stops):
                return length
        return 0

    def flush(self) -> str:
        """The text ended otherwise: what was held is text after all."""
        held, self.held = self.held, ""
        return held


class Text:
    """One sample's output text as it grows."""

    __slots__ = ("detokenizer", "min_tokens", "stops", "tokens")

    def __init__(self, detokenizer: Detokenizer, stops: list[str], include: bool, min_tokens: int):
        self.detokenizer = detokenizer
        self.stops = StopStrings(stops, include) if stops else None
        self.min_tokens = min_tokens  # stop strings count only in what comes after these
        self.tokens = 0  # counted only where there are stop strings

    def push(self, token: int) -> tuple[str, str | None]:
        """The text one more token makes visible, and the stop string that ends it, if any."""
        piece = self.detokenizer.feed(token)
        if self.stops is None:
            return piece, None
        self.tokens += 1
        if self.tokens <= self.min_tokens:
            return piece, None
        return self.stops.push(piece)

    def close(self) -> tuple[str, str | None]:
        """The text ended without a stop string: what was held back, and a stop string if the last bytes complete one."""
        rest = self.detokenizer.flush()
        if self.stops is None or self.tokens <= self.min_tokens:
            return rest, None
        text, hit = self.stops.push(rest) if rest else ("", None)
        return (text, hit) if hit is not None else (text + self.stops.flush(), None)
