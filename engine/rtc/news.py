"""What a TE tells of KV blocks: which came to its device and which went, and which it heard to be in a slower tier of the box.

For the control process's prompt tree. Knows neither steps nor queues: the step loop asks when it may tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.rtc import RTC
from engine.rtc.cost import Tier
from engine.rtc.tiers import Tiers
from engine.types import BlockNews


class News:
    def __init__(self, rtc: RTC, tiers: Tiers | None):
        """Both note what changes from now on."""
        self.rtc = rtc
        self.tiers = tiers
        self.number = 0  # of the last one
        self.whole = bool(rtc.by_key)  # the next one is to tell all that the device has
        rtc.news = {}
        if tiers is not None:
            tiers.news = deque()

    def take(self) -> BlockNews | None:
        """What is new since the last call; None: nothing."""
        changed, moved = self.rtc.news, self._moved()
        assert changed is not None
        if not (changed or moved or self.whole):
            return None
        self.number += 1
        stored = self.rtc.by_key if self.whole else [key for key, here in changed.items() if here]
        news = BlockNews(
            number=self.number,
            stored=b"".join(stored),
            evicted=b"" if self.whole else b"".join(key for key, here in changed.items() if not here),
            dram=joined(moved, "dram"),
            ssd=joined(moved, "ssd"),
            gone=joined(moved, None),
            whole=self.whole,
        )
        self.rtc.news, self.whole = {}, False
        return news

    def _moved(self) -> dict[bytes, Tier | None]:
        """Where blocks were last heard to be."""
        moved: dict[bytes, Tier | None] = {}
        heard = self.tiers.news if self.tiers is not None else None
        while heard:
            key, tier = heard.popleft()
            moved[key] = tier
        return moved


def joined(moved: dict[bytes, Tier | None], tier: Tier | None) -> bytes:
    keys: Iterable[bytes] = (key for key, where in moved.items() if where == tier)
    return b"".join(keys)
