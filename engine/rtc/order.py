"""Who is given up next: by last use, with retention that decays. Pure; every tier has one.

What somebody asked to be kept a while (`cache_ttl`, a session) counts as if it had been used later, by as much as is left of its
time. So it starts ahead of what is used now, loses a second of that every second, and at its end is what it would have been
without. Nothing is ever pinned by it: where everything is kept, the one with the least priority goes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K", int, bytes, str)
Place = tuple[float, float, int]  # (used, until, number): what a thing is ordered by
Entry = tuple[float, int, int, K]  # (sorting key, number, version, thing); stale where the thing has left or has another version

# Heaps are rebuilt, in a pass over all, when they hold twice as many entries as there are things, and so many more.
SLACK = 256


class Order(Generic[K]):
    """Idle things. Times are seconds of any clock that doesn't go back; of equal ones what was added first goes first."""

    def __init__(self) -> None:
        self.things: dict[K, tuple[Place, int]] = {}  # and the version of its entries
        self.plain: list[Entry[K]] = []  # by use
        self.kept: list[Entry[K]] = []  # by use + until: all lose priority alike, so their order stays
        self.ends: list[Entry[K]] = []  # of `kept`, by until
        self.number = self.version = 0

    def __len__(self) -> int:
        return len(self.things)

    def __contains__(self, thing: K) -> bool:
        return thing in self.things

    def __iter__(self) -> Iterator[K]:
        return iter(self.things)

    def add(self, thing: K, now: float, until: float = 0.0) -> None:
        """`thing` was used until `now` and is to be kept until `until`."""
        self.number += 1
        self.put_back(thing, (now, until, self.number), now)

    def discard(self, thing: K) -> None:
        self.things.pop(thing, None)

    def take(self, thing: K) -> Place:
        """Take `thing` out for a while: its place, for `put_back`."""
        return self.things.pop(thing)[0]

    def put_back(self, thing: K, place: Place, now: float) -> None:
        """Where it was, as if it had never been out."""
        self.version += 1
        self.things[thing] = (place, self.version)
        self._push(thing, now)
        if len(self.plain) + len(self.kept) > 2 * len(self.things) + SLACK:
            self.plain, self.kept, self.ends = [], [], []
            for one in self.things:
                self._push(one, now)

    def keep(self, thing: K, until: float, now: float) -> None:
        """Another time to be kept until, for something used when it was."""
        (used, _, number), _ = self.things[thing]
        self.put_back(thing, (used, until, number), now)

    def until(self, thing: K) -> float:
        return self.things[thing][0][1]

    def first(self, now: float) -> K | None:
        """The thing with the least priority, or None where there is none."""
        while self.ends and self.ends[0][0] <= now:  # kept long enough: ordered by its use alone from here on
            _, number, version, thing = entry = heapq.heappop(self.ends)
            if not self._stale(entry):
                heapq.heappush(self.plain, (self.things[thing][0][0], number, version, thing))
        while self.plain and self._stale(self.plain[0]):
            heapq.heappop(self.plain)
        while self.kept and (self._stale(self.kept[0]) or self.until(self.kept[0][3]) <= now):
            heapq.heappop(self.kept)
        if not self.plain or not self.kept:
            left = self.plain or self.kept
            return left[0][3] if left else None
        plain, kept = self.plain[0], self.kept[0]
        return plain[3] if plain[:2] < (kept[0] - now, kept[1]) else kept[3]

    def pop(self, now: float) -> K:
        """Take the thing with the least priority. Raises `KeyError` where there is none."""
        thing = self.first(now)
        if thing is None:
            raise KeyError("nothing is idle")
        del self.things[thing]
        return thing

    def priority(self, thing: K, now: float) -> tuple[float, int]:
        """What `thing` is ordered by; the least goes first."""
        (used, until, number), _ = self.things[thing]
        return (used + until - now if until > now else used), number

    # ---- inside -----------------------------------------------------------------------------------------------------
    def _push(self, thing: K, now: float) -> None:
        (used, until, number), version = self.things[thing]
        if until > now:
            heapq.heappush(self.kept, (used + until, number, version, thing))
            heapq.heappush(self.ends, (until, number, version, thing))
        else:
            heapq.heappush(self.plain, (used, number, version, thing))

    def _stale(self, entry: Entry[K]) -> bool:
        found = self.things.get(entry[3])
        return found is None or found[1] != entry[2]
