"""How often the promised latencies were missed lately: what the autoscaler goes by. Pure."""

from __future__ import annotations

import msgspec

from engine.config import Config, Role

# The weight of the newest in what is usual: a change is followed within some ten requests, or steps. What nobody has seen anew
# for FADES seconds counts half: a bad moment is no reason to refuse for good.
LATELY, FADES = 0.1, 10.0


class Seen(msgspec.Struct):
    """First tokens, and gaps between later ones, and how many of them came later than promised."""

    ttft_misses: int = 0
    ttft_total: int = 0
    tpot_misses: int = 0
    tpot_total: int = 0


class Usual(msgspec.Struct, frozen=True):
    """What something took lately."""

    seconds: float
    at: float  # when it was seen last

    def moved(self, seconds: float, now: float) -> Usual:
        return Usual(self.seconds + LATELY * (seconds - self.seconds), now)

    def faded(self, now: float) -> float:
        return self.seconds * 0.5 ** ((now - self.at) / FADES)


class Slo:
    """Counts from one `take` to the next. Without a promise nothing is missed."""

    def __init__(self, config: Config):
        self.ttft = None if config.slo_ttft_ms is None else config.slo_ttft_ms / 1e3
        self.tpot = None if config.slo_tpot_ms is None else config.slo_tpot_ms / 1e3
        self.seen = Seen()
        self.ttfts: dict[str, Usual] = {}  # by key
        self.tpot_lately = Usual(0.0, 0.0)

    def usual_ttft(self, key: str, now: float) -> float:
        """Seconds to the first token of a key's requests, lately."""
        return self.ttfts[key].faded(now) if key in self.ttfts else 0.0

    def usual_tpot(self, now: float) -> float:
        """Seconds between two tokens, lately."""
        return self.tpot_lately.faded(now)

    def first_token(self, seconds: float, key: str, now: float) -> None:
        self.ttfts[key] = self.ttfts[key].moved(seconds, now) if key in self.ttfts else Usual(seconds, now)
        self.seen.ttft_total += 1
        self.seen.ttft_misses += self.ttft is not None and seconds > self.ttft

    def tokens(self, gap: float, count: int, now: float) -> None:
        """So many tokens came `gap` seconds after the one before."""
        self.tpot_lately = self.tpot_lately.moved(gap, now) if self.tpot_lately.seconds else Usual(gap, now)
        self.seen.tpot_total += count
        if self.tpot is not None and gap > self.tpot:
            self.seen.tpot_misses += count

    def take(self, role: Role) -> Seen:
        """What TEs of a role answer for: first tokens those that prefill, later ones those that decode."""
        seen, left = self.seen, Seen()
        if role == "decode":
            left.ttft_misses, left.ttft_total, seen.ttft_misses, seen.ttft_total = seen.ttft_misses, seen.ttft_total, 0, 0
        elif role == "prefill":
            left.tpot_misses, left.tpot_total, seen.tpot_misses, seen.tpot_total = seen.tpot_misses, seen.tpot_total, 0, 0
        self.seen = left
        return seen
