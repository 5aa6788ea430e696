"""Which packed weights lie in host memory (pure): those used last, and those that are likely to be asked for next.

`make_room` says what goes when the bytes are too many: what was used least recently, or what will hardly be asked for.
`Predictor` learns when each model is asked for: the hour of the day, the hour of the week, and what goes on now. `what_to_load`
says what to have in memory before it is asked for, `pool_size` how many processes to keep warm. The control process asks and has
the keeper pack and drop; nothing here does either, or knows what is there.

`now` is Unix seconds in the predictor, whose days are those of UTC (that shifts a rhythm and doesn't change it), and seconds of
any one clock elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

# ---- making room --------------------------------------------------------------------------------------------------


class Entry(msgspec.Struct, frozen=True):
    """One model's packed weights."""

    key: str
    nbytes: int
    last_used: float  # seconds
    pinned: bool = False  # TEs use it, or it is being packed: it can't be dropped


def order(entry: Entry, expected: Mapping[str, float]) -> tuple[float, float]:
    """What is dropped first is least: what fewest requests are expected for, byte for byte, and of equals what was used least
    recently. Where nothing is expected of any that is the plain order by use."""
    return expected.get(entry.key, 0.0) / max(1, entry.nbytes), entry.last_used


def choose(entries: Iterable[Entry], over: int, expected: Mapping[str, float]) -> list[Entry] | None:
    """The first entries in order that free `over` bytes, without those that needn't go. None: all of them are too little."""
    gone: list[Entry] = []
    for entry in sorted((e for e in entries if not e.pinned), key=lambda e: order(e, expected)):
        if over <= 0:
            break
        gone.append(entry)
        over -= entry.nbytes
    if over > 0:
        return None
    # A large one that went late may have made it needless to drop a small one before.
    for entry in reversed(gone[:]):
        if over + entry.nbytes <= 0:
            gone.remove(entry)
            over += entry.nbytes
    return gone


def make_room(entries: Iterable[Entry], budget: int, need: int, expected: Mapping[str, float] | None = None) -> list[str] | None:
    """The entries to drop so that `need` bytes more fit: least recently used first, or those that the fewest requests are
    `expected` for (`Predictor.expected`). None: not even without all that may be dropped."""
    entries = list(entries)
    gone = choose(entries, sum(entry.nbytes for entry in entries) + need - budget, expected or {})
    return None if gone is None else [entry.key for entry in gone]


# ---- who is asked for next ------------------------------------------------------------------------------------------

HOUR = 3600.0
DAY_HOURS, WEEK_HOURS = 24, 168
# A day counts for so much less than the one after it, in the mean of an hour's requests: three days are learned from, a habit
# that has changed is forgotten in a week.
DAY_FADES = 0.7
# Weeks are few: the last one says about half of it.
WEEK_FADES = 0.5
# Of what is expected, the part that the rhythm tells when it has been seen; the rest is the present rate going on. By halves: a
# burst that has no hour is believed as much as an hour that hasn't begun.
RHYTHM = 0.5
# Seconds over which the present rate is taken: the requests of one sitting of a person.
PRESENT = 900.0
# ... and over which its rise or fall is seen, which may double or halve what is expected of it.
TREND = 180.0
TREND_MOST = 2.0


class Habit(msgspec.Struct):
    """When one model is asked for: of fixed size, however long it is watched."""

    hour: int  # since 1970, that `count` is of
    count: float = 0.0
    # For each hour of the day and of the week: (faded sum of requests, faded number of such hours).
    day: list[tuple[float, float]] = msgspec.field(default_factory=lambda: [(0.0, 0.0)] * DAY_HOURS)
    week: list[tuple[float, float]] = msgspec.field(default_factory=lambda: [(0.0, 0.0)] * WEEK_HOURS)
    seen: float = 0.0  # when `slow` and `fast` are of
    slow: float = 0.0  # requests a second over PRESENT
    fast: float = 0.0  # ... and over TREND

    def move_to(self, now: float) -> None:
        """Close the hours that are over. Of a pause of months only the last week is gone through."""
        hour = int(now // HOUR)
        if self.hour < hour:
            self.close_hour()
            self.hour = max(self.hour, hour - WEEK_HOURS)
        while self.hour < hour:
            self.close_hour()
        passed = max(0.0, now - self.seen)
        self.slow *= math.exp(-passed / PRESENT)
        self.fast *= math.exp(-passed / TREND)
        self.seen = now

    def close_hour(self) -> None:
        for table, fades in ((self.day, DAY_FADES), (self.week, WEEK_FADES)):
            at = self.hour % len(table)
            total, hours = table[at]
            table[at] = (total * fades + self.count, hours * fades + 1.0)
        self.hour += 1
        self.count = 0.0

    def asked(self, count: int, now: float) -> None:
        self.move_to(now)
        self.count += count
        self.slow += count / PRESENT
        self.fast += count / TREND

    def usual(self, hour: int) -> tuple[float, float]:
        """(requests in that hour, how much is known of it from 0 to 1). The hour of the week counts where it has been seen twice;
        before, every day is like the others."""
        total, hours = self.week[hour % WEEK_HOURS]
        if hours <= 1.0:
            total, hours = self.day[hour % DAY_HOURS]
        return (total / hours, min(1.0, hours)) if hours else (0.0, 0.0)

    def expected(self, now: float, horizon: float) -> float:
        """Requests in the `horizon` seconds from `now` on. `now` is not before the last `asked`."""
        self.move_to(now)
        rhythm, known, at = 0.0, 0.0, now
        while at < now + horizon:
            hour = int(at // HOUR)
            until = min((hour + 1) * HOUR, now + horizon)
            usual, sure = self.usual(hour)
            rhythm += usual * (until - at) / HOUR
            known += sure * (until - at) / horizon
            at = until
        trend = min(TREND_MOST, max(1 / TREND_MOST, self.fast / self.slow)) if self.slow else 1.0
        # What goes on now goes on for about as long as it has: over a long horizon the rate fades as it was taken.
        present = self.slow * trend * PRESENT * -math.expm1(-horizon / PRESENT)
        part = RHYTHM * known
        return part * rhythm + (1 - part) * present


class Prediction(msgspec.Struct, frozen=True):
    key: str
    requests: float  # expected within the horizon

    @property
    def chance(self) -> float:
        """That there is at least one, if they come independently."""
        return -math.expm1(-self.requests)


class Predictor:
    """One `Habit` a model."""

    def __init__(self) -> None:
        self.habits: dict[str, Habit] = {}

    def asked(self, key: str, now: float, count: int = 1) -> None:
        if key not in self.habits:
            self.habits[key] = Habit(int(now // HOUR), seen=now)
        self.habits[key].asked(count, now)

    def forget(self, key: str) -> None:
        self.habits.pop(key, None)

    def predict(self, now: float, horizon: float = 600.0) -> list[Prediction]:
        """Who is asked for in the next `horizon` seconds, the most likely first. Ten minutes: packing takes seconds, and what is
        asked for later can be loaded later."""
        predictions = [Prediction(key, habit.expected(now, horizon)) for key, habit in self.habits.items()]
        return sorted(predictions, key=lambda p: (-p.requests, p.key))

    def expected(self, now: float, horizon: float = 600.0) -> dict[str, float]:
        """The same as requests by model, for `make_room`."""
        return {p.key: p.requests for p in self.predict(now, horizon)}


# ---- what to load ahead ---------------------------------------------------------------------------------------------

# Chance of a request below which nothing is read from disk for it: one in ten loads would be of use.
LIKELY = 0.1
# What is loaded must be so many times as likely to be asked for as what is dropped for it: or two alike would take turns.
BETTER = 1.5


class Preload(msgspec.Struct, frozen=True):
    key: str
    drop: list[str]  # before


def what_to_load(
    predictions: Sequence[Prediction], entries: Iterable[Entry], sizes: Mapping[str, int], budget: int
) -> list[Preload]:
    """What to load ahead, in this order, and what to drop for it: the models likeliest to be asked for, byte for byte.

    `sizes`: bytes of the packed weights of each model that can be loaded; `entries`: those that are there."""
    chance = {p.key: p.chance for p in predictions}
    expected = {p.key: p.requests for p in predictions}
    there = {entry.key: entry for entry in entries}
    # What is likeliest for its size first: many small models are worth more than a large one that is as likely as each.
    wanted = [key for key in sizes if key not in there and chance.get(key, 0.0) >= LIKELY]
    wanted.sort(key=lambda key: (-chance[key] / max(1, sizes[key]), key))
    steps: list[Preload] = []
    for key in wanted:
        drop = choose(there.values(), sum(entry.nbytes for entry in there.values()) + sizes[key] - budget, expected)
        if drop is None or chance[key] < BETTER * sum(chance.get(entry.key, 0.0) for entry in drop):
            continue
        steps.append(Preload(key, [entry.key for entry in drop]))
        for entry in drop:
            del there[entry.key]
        there[key] = Entry(key, sizes[key], math.inf, pinned=True)  # nothing chosen later may drop it
    return steps


# ---- warm processes -------------------------------------------------------------------------------------------------

# Seconds within which spawns need processes of their own from the pool: the keeper refills it when it is idle again.
BURST = 2.0
# Seconds after which a burst counts half: what happened an hour ago may come again, and some megabytes each are no reason
# to be unprepared; after a night it is forgotten.
BURST_FADES = 1200.0
POOL_LEAST = 1  # the first request after a quiet time wants one
POOL_MOST = 64


def pool_size(spawns: Sequence[float], now: float) -> int:
    """Warm processes worth keeping. `spawns`: when TEs and ranks were started lately, the oldest first, in seconds."""
    most, first = 0.0, 0
    for last, at in enumerate(spawns):
        while spawns[first] < at - BURST:
            first += 1
        most = max(most, (last - first + 1) * 0.5 ** (max(0.0, now - at) / BURST_FADES))
    return max(POOL_LEAST, min(POOL_MOST, round(most)))
