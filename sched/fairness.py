"""Whose task is next, and whether a TE takes it now: what keeps one API key from living at another's expense. Pure.

Tasks wait in a `Line`, each in its key's flow. Between flows it goes by

1. the key's priority, lower first. A flow of a lower level that has had no turn for `AGING` seconds for each level between rises
   to the top, and falls back with its turn; of two turns running at most one goes to such a flow. So whatever others send
   nobody starves, whether high or low;
2. within a level by virtual tokens: what a key has been served, a prompt token as 1 and an output token, which costs more of a
   TE's time, as 2, divided by its weight. The one that was served least goes first. A key that comes back after a pause begins
   where the least served of those that wait is: an idle hour is no credit ("Fairness in Serving Large Language Models",
   OSDI'24).

Within a flow the request's own `priority` counts, where a level is worth `AGING` seconds of waiting. So a caller's number moves
only the caller's own requests.

What a TE has begun it finishes, so fairness is lost where one key's tasks fill it. While several keys are about, tasks are
therefore kept here until a TE can begin them (`takes`), and some of its room is left to keys that have less than their share.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from sched.tenants import Tenant

T = TypeVar("T")

INPUT, OUTPUT = 1.0, 2.0  # virtual tokens that a token counts; OpenAI and others price them alike or further apart
AGING = 5.0  # seconds of waiting that are worth one level of priority: a person notices them, a batch job does not
# A key that has sent nothing for so many seconds is not about: nothing is kept free for it. People read and write for minutes.
ABOUT = 600.0
# One part in so many of a TE's seats and KV blocks is left free for who comes next. Large batches gain little from the last
# eighth, and it is what somebody who comes now would otherwise wait a whole answer for.
LEFT_FREE = 8
# Step budgets of uncomputed prompts that a TE gets: one for the step that runs and one for the next, which is planned meanwhile.
# Fewer would let it wait for us, more would be more that a new prompt waits for.
STEPS_AHEAD = 2
# ... of a key that has more than its share of the seats: who comes now waits for the step that runs and the one that is planned,
# so those stay short. Its sequences end one by one, and so come its prompts: it loses little.
BEYOND_AHEAD = 0.5


class Flow(Generic[T]):
    """One key's tasks that wait, and what it has been served."""

    __slots__ = ("heap", "places", "seen", "served", "since", "tenant", "virtual")

    def __init__(self, tenant: Tenant):
        self.tenant = tenant
        self.virtual = 0.0  # tokens served, by weight, and what it was brought up to
        self.heap: list[tuple[float, int, T]] = []  # (rank, number in the line, task); some may have left
        self.places: dict[T, int] = {}  # tasks that wait, and their numbers
        self.since = 0.0  # seconds: its last turn, or later when it began to wait
        self.served = -1.0  # seconds: its last turn
        self.seen = float("-inf")  # seconds: when it last sent a task

    def charge(self, tokens: float) -> None:
        """It was served so many virtual tokens; fewer than none where a prompt was cheaper than thought."""
        self.virtual += tokens / self.tenant.weight

    def head(self) -> T | None:
        while self.heap:
            _, number, task = self.heap[0]
            if self.places.get(task) == number:
                return task
            heapq.heappop(self.heap)
        return None


class Line(Generic[T]):
    """All tasks of a model that wait for a TE. Tasks are hashable; `now` is in seconds, of any clock that never goes back."""

    def __init__(self) -> None:
        self.flows: dict[str, Flow[T]] = {}
        self.owner: dict[T, Flow[T]] = {}  # of those that wait
        self.waiting: dict[str, Flow[T]] = {}  # flows that have a task here
        self.latest: list[Flow[T]] = []  # the two that sent a task last, the newest first
        self.left: dict[int, float] = {}  # priority -> virtual tokens of the flow of it that stopped waiting last
        self.rose = False  # the last turn went to a flow that rose
        self.number = 0
        self.before = 0  # numbers of tasks that start again count down

    def __len__(self) -> int:
        return len(self.owner)

    def __contains__(self, task: T) -> bool:
        return task in self.owner

    def __iter__(self) -> Iterator[T]:
        return iter(self.owner)

    def flow(self, tenant: Tenant) -> Flow[T]:
        found = self.flows.get(tenant.name)
        if found is None:
            found = self.flows[tenant.name] = Flow(tenant)
        return found

    def add(self, task: T, flow: Flow[T], priority: int, now: float) -> None:
        """A new task, with its request's own priority."""
        self.number += 1
        flow.seen = now
        if self.latest[:1] != [flow]:
            self.latest = [flow, *self.latest[:1]]
        self.put(task, flow, now + priority * AGING, self.number, now)

    def again(self, task: T, flow: Flow[T], now: float) -> None:
        """A task whose TE died goes before all of its flow; of several the one that is put here last."""
        self.before -= 1
        self.put(task, flow, float("-inf"), self.before, now)

    def put(self, task: T, flow: Flow[T], rank: float, number: int, now: float) -> None:
        if not flow.places:
            level = flow.tenant.priority
            others = [f.virtual for f in self.waiting.values() if f.tenant.priority == level]
            flow.virtual = max(flow.virtual, min(others) if others else self.left.get(level, 0.0))
            flow.since = now
            self.waiting[flow.tenant.name] = flow
        flow.places[task] = number
        self.owner[task] = flow
        heapq.heappush(flow.heap, (rank, number, task))

    def remove(self, task: T) -> None:
        """It goes to a TE, or has been cancelled. Raises `KeyError` where it isn't here."""
        flow = self.owner.pop(task)
        del flow.places[task]
        if not flow.places:
            flow.heap.clear()
            del self.waiting[flow.tenant.name]
            self.left[flow.tenant.priority] = flow.virtual

    def sent(self, task: T, prompt_tokens: int, now: float) -> None:
        """A waiting task goes to a TE, which has so many tokens of its prompt to compute (none where it starts again)."""
        flow = self.owner[task]
        self.rose = self.has_risen(flow, self.top(), now)
        flow.charge(INPUT * prompt_tokens)
        flow.since = flow.served = now
        self.remove(task)

    def top(self) -> int:
        """The best level that anybody waits on."""
        return min((flow.tenant.priority for flow in self.waiting.values()), default=0)

    def has_risen(self, flow: Flow[T], top: int, now: float) -> bool:
        return now - flow.since >= (flow.tenant.priority - top) * AGING > 0

    def heads(self, now: float) -> list[T]:
        """The next task of every flow that has one, the foremost first. Where no TE can take one of them, the next may go."""
        top = self.top()

        def place(flow: Flow[T]) -> tuple[int, int, float, float]:
            if self.has_risen(flow, top, now):
                return top, 1 if self.rose else -1, flow.since, 0.0
            return flow.tenant.priority, 0, flow.virtual, flow.served

        return [head for flow in sorted(self.waiting.values(), key=place) if (head := flow.head()) is not None]

    def others(self, flow: Flow[T], now: float) -> bool:
        """Whether another key than this one's is about."""
        return any(other is not flow and now - other.seen < ABOUT for other in self.latest)

    def weight(self, now: float) -> float:
        """Of all keys that are about."""
        return sum(f.tenant.weight for f in self.flows.values() if now - f.seen < ABOUT)

    def share(self, flow: Flow[T], now: float, weight: float | None = None) -> float:
        """The part that a key may have of what there is, among those that are about. `weight`: theirs, where that is known."""
        whole = self.weight(now) if weight is None else weight
        own = flow.tenant.weight
        return own / (whole if now - flow.seen < ABOUT else whole + own)

    def over_share(self, flow: Flow[T], mine: int, new: int, most: int, now: float) -> bool:
        """Whether a key that has `mine` sequences here or on TEs, and brings `new` ones, would have more than its share of the
        `most` that there may be. Where all of them are taken, a key within its share is let in all the same: one key's queue
        can't be another's refusal."""
        return mine + new > most * self.share(flow, now)


class Room(msgspec.Struct, frozen=True):
    """What a TE has and what is in it, for a task of one key."""

    seats: int  # sequences it runs at once
    taken: int  # sequences it has
    mine: int  # ... of this key
    budget: int  # tokens a step computes
    unread: int  # prompt tokens of tasks that have no token yet
    mine_unread: int  # ... of this key
    blocks: int  # of KV
    blocks_used: int  # by sequences that run
    share: float  # this key's part: `Line.share`


def takes(room: Room, new: int) -> bool:
    """Whether a TE takes a task of `new` sequences now, while several keys are about. No TE that is empty refuses anything.

    A key within its share of the seats may have any that is free, one beyond it leaves some free: so who comes now finds a seat,
    and those that it takes are left free again as sequences end. Prompts are kept back once a TE has enough for two steps, and
    this key its share of those, or half a step where it is beyond its share; KV blocks are left to keys without any there."""
    if room.taken and room.taken + new > room.seats:
        return False
    beyond = beyond_share(room, new)
    if beyond and room.taken + new > room.seats - free(room.seats):
        return False
    if beyond and room.mine_unread >= BEYOND_AHEAD * room.budget:
        return False
    ahead = STEPS_AHEAD * room.budget
    if room.unread >= ahead and room.mine_unread and room.mine_unread >= ahead * room.share:
        return False
    return not (room.mine and room.blocks_used > room.blocks - free(room.blocks))


def beyond_share(room: Room, new: int) -> bool:
    """Whether a task of `new` sequences more would give its key more than its share of a TE's seats. What is within goes before
    what is beyond when the TE shares out a step (`Start.priority`)."""
    return room.mine > 0 and room.mine + new > room.share * room.seats


def free(count: int) -> int:
    """How many of so many are left free."""
    return 0 if count < 2 else max(1, count // LEFT_FREE)
