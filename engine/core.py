"""The step loop of FlowServe: receive, plan, execute, reply. Knows no torch, no HTTP and no other TE.

Two forms that must give the same tokens: `plain` finishes a step before it plans the next; `overlapped` plans and
launches step n + 1 while step n runs, unless a sequence may have drafts (`Batch.must_wait`). In the second, a sequence's
end by a sampled id is seen one step late, and the extra token is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.batch import Batch, Plan
from engine.devices import Pending
from engine.executor import Executor
from engine.types import Abort, FromWorker, Start, Stop, ToWorker


class Inbox(Protocol):
    """The receiving end of the TE's queue (`shmq.Receiver`)."""

    def receive(self) -> list[bytes]: ...
    def wait(self, timeout: float | None) -> bool: ...
    def beat(self) -> None: ...


# An idle TE sleeps on its doorbell and only stamps its heartbeat this often (seconds).
IDLE_BEAT = 1.0


class Core:
    def __init__(
        self,
        batch: Batch,
        executor: Executor,
        inbox: Inbox,
        tell: Callable[[FromWorker], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.batch = batch
        self.executor = executor
        self.inbox = inbox
        self.tell = tell
        self.clock = clock
        self.leaving = False
        self.decoder = msgspec.msgpack.Decoder(ToWorker)

    def run(self, overlapped: bool) -> None:
        """Serve until a `Stop` arrives."""
        if overlapped:
            self.overlapped()
        else:
            self.plain()

    def plain(self) -> None:
        while not self.leaving:
            self.receive(idle=not self.batch.has_work())
            self.step()

    def step(self) -> None:
        """One step from plan to reply."""
        if plan := self.batch.plan():
            self.finish(plan, self.launch(plan))
        else:
            self.report()

    def overlapped(self) -> None:
        ahead: tuple[Plan, Pending] | None = None
        while not self.leaving:
            self.receive(idle=ahead is None and not self.batch.has_work())
            plan = self.batch.plan()
            launched = (plan, self.launch(plan)) if plan else None
            if ahead is not None:
                self.finish(*ahead)
            elif launched is None:
                self.report()
            ahead = launched

    def receive(self, idle: bool) -> None:
        """Take in what has arrived; with nothing to do, sleep until something does."""
        self.inbox.beat()
        while idle and not self.inbox.wait(IDLE_BEAT):
            self.inbox.beat()
        for data in self.inbox.receive():
            message = self.decoder.decode(data)
            if isinstance(message, Start):
                self.batch.start(message)
            elif isinstance(message, Abort):
                self.batch.abort(message.task, message.sample)
            elif isinstance(message, Stop):
                self.leaving = True

    def launch(self, plan: Plan) -> Pending:
        for work in plan:
            if not work.seq.started:
                work.seq.started = self.clock()
        return self.executor.launch(plan)

    def finish(self, plan: Plan, pending: Pending) -> None:
        """Wait for a launched step and reply with one message."""
        self.batch.apply(plan, pending.result())
        self.report()

    def report(self) -> None:
        for refused in self.batch.refused:
            self.tell(refused)
        self.batch.refused.clear()
        if (tokens := self.batch.take_report()) is not None:
            self.tell(tokens)
        self.batch.begin_report()
