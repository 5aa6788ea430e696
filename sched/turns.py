"""Whose task is next, and which TEs may have it now: the fairness line with what each key has on each TE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from engine.config import Config
from sched.cluster import TE
from sched.fairness import AGING, INPUT, OUTPUT, Flow, Line, Room, beyond_share, takes
from sched.live import LiveTask
from sched.tenants import Tenant


class Turns:
    """Tasks without a TE, of one model, and how much of the TEs each key has."""

    def __init__(self, config: Config):
        self.config = config
        self.line: Line[LiveTask] = Line()
        self.outstanding: Counter[str] = Counter()  # key -> its sequences, here or on a TE
        self.sequences: Counter[tuple[int, str]] = Counter()  # (TE, key) -> its sequences there
        self.unread: Counter[tuple[int, str]] = Counter()  # ... and tokens of prompts without a first token

    def follow(self, config: Config) -> None:
        """The model's files were read again."""
        self.config = config

    def __len__(self) -> int:
        return len(self.line)

    def __contains__(self, entry: LiveTask) -> bool:
        return entry in self.line

    def __iter__(self) -> Iterator[LiveTask]:
        return iter(self.line)

    # ---- the line ---------------------------------------------------------------------------------------------------
    def flow(self, tenant: Tenant) -> Flow[LiveTask]:
        return self.line.flow(tenant)

    def add(self, entry: LiveTask, now: float) -> None:
        """A new task waits."""
        self.line.add(entry, entry.request.flow, entry.request.submission.priority, now)

    def again(self, entry: LiveTask, now: float) -> None:
        """A task that lost its TE waits, before all others of its key."""
        self.line.again(entry, entry.request.flow, now)

    def remove(self, entry: LiveTask) -> None:
        self.line.remove(entry)

    def heads(self, now: float) -> list[LiveTask]:
        """The next task of each key, the foremost first."""
        return self.line.heads(now)

    def over_share(self, flow: Flow[LiveTask], new: int, most: int, now: float) -> bool:
        """Whether a key's `new` sequences can be refused where there are `most` already: not while it has less than its part."""
        if not self.line.others(flow, now):
            return True
        return self.line.over_share(flow, self.outstanding[flow.tenant.name], new, most, now)

    def waiting(self, flow: Flow[LiveTask], seats: int, outstanding: int, now: float) -> float:
        """Sequences before a new one of a key, of the `outstanding` ones of all keys: those beyond the seats, or beyond its share
        of them where others are about."""
        if not self.line.others(flow, now):
            return max(0.0, outstanding - seats)
        return max(0.0, self.outstanding[flow.tenant.name] - seats * self.line.share(flow, now))

    def company(self, flow: Flow[LiveTask], now: float) -> bool:
        """Whether a key that sends a task now ends another one's being alone."""
        latest = self.line.latest
        return bool(latest) and latest[0] is not flow and self.line.others(flow, now) and not self.line.others(latest[0], now)

    # ---- who may go where -------------------------------------------------------------------------------------------
    def share(self, entry: LiveTask, now: float, weight: float) -> float | None:
        """The part of a TE that a task's key may have; None while no other key is about. `weight`: of all keys that are."""
        flow = entry.request.flow
        return self.line.share(flow, now, weight) if self.line.others(flow, now) else None

    def with_seats(self, tes: Iterable[TE]) -> list[TE]:
        """TEs that could begin something: while several keys are about, no other one is given anything."""
        return [te for te in tes if te.sequences < self.config.max_num_seqs or not te.sequences]

    def closed(self, entry: LiveTask, share: float | None, tes: Iterable[TE]) -> list[int]:
        """TEs that are not to be given a task now, because its key has enough there."""
        if share is None:
            return []
        return [te.id for te in tes if not takes(self.room(te, entry, share), entry.open_samples)]

    def kept_for(self, entry: LiveTask, share: float | None, tes: Iterable[TE], now: float) -> list[int]:
        """The TE that those behind a task are not to be given, since it makes room for that one: where several keys are about
        and it has waited for long, because it wants more seats at once than the others ever leave free together."""
        if share is None or entry.open_samples < 2 or now - entry.request.flow.since < AGING:
            return []
        decoding = [te for te in tes if te.state == "ready" and not te.draining and te.role != "prefill" and te.lender < 0]
        return [min(decoding, key=lambda te: te.sequences).id] if decoding else []

    def room(self, te: TE, entry: LiveTask, share: float) -> Room:
        assert self.config.max_num_batched_tokens is not None
        name = entry.request.flow.tenant.name
        return Room(
            seats=self.config.max_num_seqs,
            taken=te.sequences,
            mine=self.sequences[te.id, name],
            budget=self.config.max_num_batched_tokens,
            unread=te.prompt_tokens,
            mine_unread=self.unread[te.id, name],
            blocks=te.load.blocks_total,
            blocks_used=te.load.blocks_used,
            share=share,
        )

    def rank(self, entry: LiveTask, share: float | None, te: TE) -> int:
        """What a TE is told to share out its steps by. While one key is about, its requests' own priorities; among several, what
        is within a key's share goes before what is beyond."""
        if share is None:
            return entry.request.submission.priority
        return int(beyond_share(self.room(te, entry, share), entry.open_samples))

    def sent(self, entry: LiveTask, now: float) -> None:
        """A task goes to a TE. What a dead TE has computed of it counted already."""
        self.line.sent(entry, entry.charge if entry.task.attempts == 1 else 0, now)

    # ---- what keys have ---------------------------------------------------------------------------------------------
    def generated(self, entry: LiveTask, tokens: int) -> None:
        entry.request.flow.charge(OUTPUT * tokens)

    def computed(self, entry: LiveTask, tokens: int) -> None:
        """A TE had to compute so many tokens of a task's prompt, perhaps others than were thought when it was sent there."""
        if entry.task.attempts == 1:
            entry.request.flow.charge(INPUT * (tokens - entry.charge))

    def count(self, te: TE, entry: LiveTask, sequences: int = 0, tokens: int = 0) -> None:
        """A task has so many sequences, and tokens of prompts, more on a TE."""
        name = entry.request.flow.tenant.name
        for counter, more in ((self.sequences, sequences), (self.unread, tokens)):
            if more:
                counter[te.id, name] += more
                if not counter[te.id, name]:
                    del counter[te.id, name]

    def came(self, flow: Flow[LiveTask], sequences: int) -> None:
        """A key has so many sequences more, or fewer."""
        name = flow.tenant.name
        self.outstanding[name] += sequences
        if not self.outstanding[name]:
            del self.outstanding[name]
