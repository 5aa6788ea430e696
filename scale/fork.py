"""Who gives its weights to whom (pure): new TEs take them from running TEs of the same model, of which there may be one.

A TE that has its weights is a holder and can give them on, so that one source to many becomes a tree. A holder sends to one taker
at a time: two streams out of one port take twice as long each, and what the source computes for its requests is disturbed as long
as it sends. Nothing is sent where the taker can map the holder's memory, whatever that does besides: in the memory of the host,
and on the very accelerator that the holder is on.

What the plan knows of the wires is how near two TEs are:

    same device     map: nothing is copied
    same host       copy over the links inside a server
    same domain     copy over the fast links between servers, where there are such
    anywhere        copy over the network

A copy goes a longer way only to a host (or domain) that has no holder and none under way: its other TEs get theirs from that one
over the shorter way. It costs a round inside the host, and leaves the slow wires to those who need them. Up to half of the
holders send to such places before all that is near is served: a far copy takes long, and a tree of its own grows from it.

Nothing here sends anything or knows a process: `assign` says what can start now, and is asked again when something has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import msgspec

from engine.devices import kind

Way = Literal["map", "copy"]


class Holder(msgspec.Struct, frozen=True):
    """A TE that has its weights. `index`: the first of its devices; `free`: it sends to nobody now."""

    te: int
    device: str  # "cpu", "npu", "cuda": only TEs on the same kind give to each other
    index: int
    free: bool
    host: int = 0
    domain: int = 0  # hosts whose devices reach each other by the fast links


class Taker(msgspec.Struct, frozen=True):
    """A TE that wants weights. It has as many ranks as its holder, so the first device tells where all of them lie."""

    te: int
    device: str
    index: int
    host: int = 0
    domain: int = 0


Start = tuple[Taker, Holder, Way]

# How near two TEs are, the nearest first.
SAME_DEVICE, SAME_HOST, SAME_DOMAIN, ANYWHERE = range(4)


def nearness(a: Holder | Taker, b: Holder | Taker) -> int:
    return next(level for level in range(SAME_DEVICE, ANYWHERE + 1) if place(a, level) == place(b, level))


def place(te: Holder | Taker, level: int) -> tuple[object, ...]:
    """Where a TE is, as exactly as `level` asks: two TEs with the same place are at least so near. The memory of a host is one
    device, whichever cores a TE there computes on."""
    if level == SAME_DEVICE and not kind(te.device).own_memory:
        level = SAME_HOST
    return (te.device, te.domain, te.host, te.index)[: 4 - level]


def assign(
    holders: Sequence[Holder],
    takers: Sequence[Taker],
    coming: Sequence[Taker] = (),
    refused: Collection[tuple[int, int]] = frozenset(),
) -> list[Start]:
    """What can start now, the nearest first, and among the equally near in the order given. Whoever is not named waits until
    something has ended, or takes another path: where this is empty and nothing is coming, no running TE can help.

    `coming`: takers whose copy is under way. `refused`: (taker, holder) numbers of what was tried and failed: not tried again."""
    starts: list[Start] = []
    waiting: list[Taker] = []
    mapped: dict[tuple[object, ...], list[Holder]] = {}
    for holder in holders:
        mapped.setdefault(place(holder, SAME_DEVICE), []).append(holder)
    for taker in takers:
        there = mapped.get(place(taker, SAME_DEVICE), ())
        source = next((h for h in there if (taker.te, h.te) not in refused), None)
        if source is not None:
            starts.append((taker, source, "map"))
        elif kind(taker.device).own_memory:  # what lies in the memory of another host is not for TEs to fetch
            waiting.append(taker)
    return starts + copies(holders, waiting, coming, refused)


def copies(
    holders: Sequence[Holder], takers: Sequence[Taker], coming: Sequence[Taker], refused: Collection[tuple[int, int]]
) -> list[Start]:
    starts: list[Start] = []
    free = {h.te: h for h in holders if h.free}
    waiting = {t.te: t for t in takers}
    barred = {taker for taker, _ in refused}  # may have to go a longer way, although somebody near has the weights

    def start(level: int, most: int) -> int:
        """Start copies between TEs that are as near as `level`, not more than `most`. Returns how many."""
        there_or_coming: list[Holder | Taker] = [*holders, *coming, *(taker for taker, _, _ in starts)]
        # A place one step smaller that has a holder, or will have one, serves its own.
        served = {place(te, level - 1) for te in there_or_coming}
        sources: dict[tuple[object, ...], list[Holder]] = {}
        for holder in reversed(free.values()):  # taken from the end: the first comes first
            sources.setdefault(place(holder, level), []).append(holder)
        before = len(starts)
        for taker in list(waiting.values()):
            here = place(taker, level - 1)
            if len(starts) - before == most:
                break
            if here in served and taker.te not in barred:
                continue
            able = sources.get(place(taker, level), [])
            at = next((n for n in range(len(able) - 1, -1, -1) if (taker.te, able[n].te) not in refused), None)
            if at is None:
                continue
            source = able.pop(at)
            starts.append((taker, source, "copy"))
            served.add(here)
            del free[source.te], waiting[taker.te]
        return len(starts) - before

    hosts = {place(holder, SAME_HOST) for holder in holders}
    seeds = len(holders) // 2 - sum(place(te, SAME_HOST) not in hosts for te in coming)
    for level in (ANYWHERE, SAME_DOMAIN):
        seeds -= start(level, max(0, seeds))
    for level in (SAME_HOST, SAME_DOMAIN, ANYWHERE):
        start(level, len(takers))
    return starts


# ---- the whole plan, ahead of time ----------------------------------------------------------------------------------


class Move(msgspec.Struct, frozen=True):
    """One taker's weights on their way, in seconds from the start of the plan."""

    taker: int
    source: int
    way: Way
    began: float
    ended: float  # when the taker had them, or when the source died
    depth: int  # of the tree: 1 for those who took from a TE that was there at the start
    done: bool


class Plan(msgspec.Struct, frozen=True):
    moves: list[Move]  # by the time they ended
    left: list[Taker]  # whom no running TE could help

    @property
    def seconds(self) -> float:
        return max((move.ended for move in self.moves), default=0.0)

    @property
    def depth(self) -> int:
        return max((move.depth for move in self.moves), default=0)


def schedule(
    holders: Sequence[Holder],
    takers: Sequence[Taker],
    seconds: Callable[[Holder, Taker, Way], float],
    deaths: Mapping[int, float] | None = None,
) -> Plan:
    """How it goes if everything takes as long as `seconds` says, and the TEs in `deaths` die at these times: whoever took from
    one of them is served again by another, from the beginning."""
    have = {h.te: h for h in holders}
    depths = dict.fromkeys(have, 0)
    want = {t.te: t for t in takers}
    began: dict[int, tuple[float, Start]] = {}  # by taker
    busy: set[int] = set()
    moves: list[Move] = []
    deaths = deaths or {}
    # (time, 0 death | 1 end, TE, when its move began): deaths come first, what ends at the same moment has not arrived whole.
    events: list[tuple[float, int, int, float]] = [(at, 0, te, 0.0) for te, at in deaths.items()]
    heapq.heapify(events)
    now = 0.0

    def end(te: int, done: bool) -> None:
        since, (taker, source, way) = began.pop(te)
        if way == "copy":
            busy.discard(source.te)
        moves.append(Move(te, source.te, way, since, now, depths[source.te] + 1, done))
        if done:
            have[te] = Holder(te, taker.device, taker.index, True, taker.host, taker.domain)
            depths[te] = depths[source.te] + 1

    while True:
        idle = [t for t in want.values() if t.te not in began]
        under_way = [start[0] for _, start in began.values()]
        table = [msgspec.structs.replace(h, free=h.te not in busy) for h in have.values()]
        for start in assign(table, idle, under_way):
            taker, source, way = start
            began[taker.te] = (now, start)
            if way == "copy":
                busy.add(source.te)
            heapq.heappush(events, (now + seconds(source, taker, way), 1, taker.te, now))
        if not began or not events:
            return Plan(moves, list(want.values()))
        # What ends at the same moment is taken together, so that the next round is planned once.
        now = events[0][0]
        while events and events[0][0] <= now:
            _, kind, te, since = heapq.heappop(events)
            if kind == 1:
                if te in began and began[te][0] == since:
                    end(te, True)
                    del want[te]
            else:
                for other in [t for t, (_, start) in began.items() if te in (t, start[1].te)]:
                    end(other, False)
                have.pop(te, None)
                want.pop(te, None)
