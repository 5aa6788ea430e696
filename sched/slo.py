"""How often the promised latencies were missed lately: what the autoscaler goes by. Pure."""

from __future__ import annotations

import msgspec

from engine.config import Config, Role

# The weight of the newest in what is usual: a change is followed within some ten requests, or steps.
LATELY = 0.1


class Seen(msgspec.Struct):
    """First tokens, and gaps between later ones, and how many of them came later than promised."""

    ttft_misses: int = 0
    ttft_total: int = 0
    tpot_misses: int = 0
    tpot_total: int = 0


class Slo:
    """Counts from one `take` to the next. Without a promise nothing is missed."""

    def __init__(self, config: Config):
        self.ttft = None if config.slo_ttft_ms is None else config.slo_ttft_ms / 1e3
        self.tpot = None if config.slo_tpot_ms is None else config.slo_tpot_ms / 1e3
        self.seen = Seen()
        self.usual_ttft: dict[str, float] = {}  # key -> seconds, lately
        self.usual_tpot = 0.0

    def first_token(self, seconds: float, key: str) -> None:
        usual = self.usual_ttft.get(key, seconds)
        self.usual_ttft[key] = usual + LATELY * (seconds - usual)
        self.seen.ttft_total += 1
        self.seen.ttft_misses += self.ttft is not None and seconds > self.ttft

    def tokens(self, gap: float, count: int) -> None:
        """So many tokens came `gap` seconds after the one before."""
        self.usual_tpot += LATELY * (gap - self.usual_tpot) if self.usual_tpot else gap
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
