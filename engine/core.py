"""The step loop of FlowServe: receive, plan, execute, reply. Knows no torch, no HTTP and no other TE.

Two forms that must give the same tokens: `plain` finishes a step before it plans the next; `overlapped` plans and
launches step n + 1 while step n runs, unless a sequence may have drafts (`Batch.must_wait`). In the second, a sequence's
end by a sampled id is seen one step late, and the extra token is dropped.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec
import numpy as np

from engine.batch import Batch
from engine.devices import Pending
from engine.distflow import Completion
from engine.executor import Executor
from engine.handover import Done, Outbound
from engine.rtc.news import News
from engine.rtc.order import Order
from engine.rtc.tiers import Tiers
from engine.rtc.wire import Event, Fetched, Found, Gone, Measured, Saved, Stepped
from engine.sequence import Plan, Sequence
from engine.spmd import End, Turn
from engine.types import (
    Abort,
    Adopt,
    Adopted,
    Closed,
    Forget,
    FromWorker,
    HandedOver,
    Link,
    Move,
    Recount,
    Release,
    Share,
    Start,
    Stop,
    ToWorker,
    Unlink,
    UserError,
)

log = logging.getLogger(__name__)


class Inbox(Protocol):
    """The receiving end of the TE's queue (`shmq.Receiver`)."""

    def receive(self) -> list[bytes]: ...
    def wait(self, timeout: float | None) -> bool: ...
    def beat(self) -> None: ...
    def rouse(self) -> None: ...


# Made once, in the keeper: that takes 2 ms, and memory that TEs share.
DECODER = msgspec.msgpack.Decoder(ToWorker)
# An idle TE sleeps on its doorbell and only stamps its heartbeat this often (seconds).
IDLE_BEAT = 1.0
# An idle TE has memory for so much of its KV cache more than it uses, and gets it in such pieces: fresh memory takes up to 4 ms
# a piece where the system must ask its host, 45 of the 445 ms of a prompt of 1024 tokens on the machine this was measured on. A
# share of the cache, which is the smaller the more TEs the box is meant for: 64 MiB of the 4 GiB that a TE alone has at most.
AHEAD_SHARE, PIECE_BYTES = 1 / 64, 2 << 20
IDLE_ENOUGH = 0.1  # seconds without work before that begins: until then the next request may come, or other TEs be starting
# Watermarks of the device's KV blocks: where fewer than the first share could be taken without losing one, idle blocks are copied
# to a slower tier until it is the second; so many at once at most, so that a prompt's need of blocks finds most of them.
LOW_SHARE, HIGH_SHARE, COPIED_SHARE = 1 / 2, 3 / 4, 1 / 8
# Seconds from one news of KV blocks to the next while steps run: a message costs both ends some 20 µs, steps of small models take
# less than a millisecond, and where a prompt's prefix was a moment ago is good enough to choose a TE by. What is left is told
# before the TE sleeps.
NEWS_SECONDS = 0.05


class Core:
    def __init__(
        self,
        batch: Batch,
        executor: Executor,
        inbox: Inbox,
        tell: Callable[[FromWorker], None],
        *,
        outbound: Outbound | None = None,
        agree: Callable[[Turn], Turn] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`outbound`: the way to other TEs' pools, where there are any. `agree`: with several ranks, what all of them take in
        this turn, for what this one would."""
        self.batch = batch
        self.executor = executor
        self.inbox = inbox
        self.tell = tell
        self.outbound = outbound
        self.tiers: Tiers | None = None  # the way to the DRAM and SSD tiers; None: there are none, or the master has it
        self.saving = False  # idle blocks are being copied out, up to the high watermark
        self.news: News | None = None  # of KV blocks; None: they have no keys, or the master tells it
        self.told = float("-inf")  # ... when it was, last; seconds of the clock
        self.agree = agree
        self.said = 0  # checksum of all ids sampled so far, with several ranks
        self.clock = clock
        self.events: list[Event] = []  # of the slower tiers, measured by the loop; the next turn takes them in
        self.ends: deque[End] = deque()  # of transfers, from DistFlow's thread
        self.awaited: dict[int, Done] = {}  # by a transfer's number
        self.followed = 0  # transfers
        self.launches = self.finishes = 0  # steps
        self.launched: deque[float] = deque()  # when the steps that run were launched
        self.finished = 0.0  # when the last one was over
        self.closing: deque[tuple[int, Sequence]] = deque()  # ended handovers, and how many steps must be over
        self.leaving = False
        blocks, nbytes = batch.rtc.blocks, executor.kv.nbytes
        self.ahead, self.piece = int(blocks * AHEAD_SHARE), max(1, PIECE_BYTES * blocks // nbytes)
        self.committed = 0  # KV blocks that there is memory for

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
        if idle:
            self.tell_news(0.0)
        patience = IDLE_ENOUGH
        while idle and not self.inbox.wait(patience):
            self.inbox.beat()
            # Not while a receiver is to hear of a sequence, or takes its first step: a piece in between makes both twice as long.
            patience = 0.0 if not self.batch.handing and self.commit_ahead() else IDLE_BEAT
        messages, ends, events = self.inbox.receive(), self.drain(), self.tier_events()
        if self.agree is not None:
            messages, ends, events, _ = self.agree((messages, ends, events, self.said))
        self.settle(ends)
        for event in events:
            self.hear(event)
        for data in messages:
            self.obey(DECODER.decode(data))
        if self.tiers is not None:
            for ticket, keys in self.batch.loads.lookups:
                self.tiers.look_up(ticket, keys)
        self.batch.loads.lookups.clear()

    def follow(self, done: Done) -> Callable[[Completion], None]:
        """What a transfer is to call at its end, so that the loop calls `done`: on every rank of a TE in the same turn. Ranks
        follow the same transfers in the same order, and so give them the same numbers."""
        self.followed += 1
        number = self.followed
        self.awaited[number] = done

        def ended(completion: Completion) -> None:
            self.ends.append((number, completion.error))
            self.inbox.rouse()

        return ended

    def drain(self) -> list[End]:
        """Transfers that have ended since the last call."""
        return [self.ends.popleft() for _ in range(len(self.ends))]

    def settle(self, ends: list[End]) -> None:
        for number, error in ends:
            self.awaited.pop(number)(error)

    def obey(self, message: ToWorker) -> None:
        batch = self.batch
        if isinstance(message, Start):
            batch.start(message)
        elif isinstance(message, Abort):
            for seq in batch.abort(message.task, message.sample):
                if seq.handover is not None and not seq.gone:
                    self.closing.append((self.launches, seq))
            self.close_ended()
        elif isinstance(message, Adopt):
            if batch.adopt(message.seq, np.frombuffer(message.generated, np.int32)):
                batch.notices.append(Adopted(message.seq))
        elif isinstance(message, Release):
            batch.let_go(message.seq)
        elif isinstance(message, Move):
            if why := batch.move(message.seq, message.handover):
                batch.notices.append(HandedOver(message.seq, -1, why))
        elif isinstance(message, Link):
            for peer in message.peers:
                try:
                    self.linked.link(peer)
                except UserError as e:  # a TE that has died meanwhile: we hear of that too, and the others live
                    log.warning("event=link_failed why=%s", e)
        elif isinstance(message, Unlink):
            self.linked.unlink(message.te)
        elif isinstance(message, Forget):
            batch.rtc.forget(message.context)
        elif isinstance(message, Recount):
            if self.news is not None:
                self.news.whole = True
        elif isinstance(message, Share):
            self.executor.device.set_share(message.percent)
        else:
            assert isinstance(message, Stop)
            self.leaving = True

    @property
    def linked(self) -> Outbound:
        assert self.outbound is not None, "only a TE that told of its pool is asked for what needs others"
        return self.outbound

    # ---- handovers --------------------------------------------------------------------------------------------------
    def hand_over(self) -> None:
        """Sequences that are computed here go on elsewhere."""
        for seq in self.batch.handed:
            if seq.lent:
                self.handed_over(seq, None)  # computed where it goes on
            elif not seq.ended:
                self.linked.finish(seq, partial(self.handed_over, seq))
        self.batch.handed.clear()

    def handed_over(self, seq: Sequence, error: str | None) -> None:
        if seq.ended:
            return  # cancelled meanwhile: `close_ended` tells
        if error is not None and seq.moving:
            self.batch.take_back(seq, error)
        elif error is not None:  # the receiver is gone, and whoever sent the sequence here knows or will
            self.batch.end(seq)
            self.batch.notices.append(Closed(seq.id))
        else:
            seq.gone = True
            self.batch.notices.append(HandedOver(seq.id, seq.known - 1))

    def close_ended(self) -> None:
        """Tell of handovers that ended early, as soon as no step can write where they were to go."""
        while self.closing and self.closing[0][0] <= self.finishes:
            _, seq = self.closing.popleft()
            told = partial(self.batch.notices.append, Closed(seq.id))
            if seq.lent:
                told()
            else:
                self.linked.close(seq, told)

    # ---- slower tiers -----------------------------------------------------------------------------------------------
    def tier_events(self) -> list[Event]:
        """What the tiers' thread has done and the clock has shown since the last call; with several ranks on the master alone."""
        if self.tiers is None:
            return []
        events = [*self.events, *self.tiers.take()]
        self.events.clear()
        return events

    def hear(self, event: Event) -> None:
        """Take in what has come about in the slower tiers: on every rank in the same turn."""
        batch, load = self.batch, self.batch.load
        if isinstance(event, Stepped):
            if batch.loads.costs is not None:
                batch.loads.costs.stepped(event.prefill_tokens, event.sequences, event.seconds)
        elif isinstance(event, Found):
            batch.found(event)
        elif isinstance(event, Fetched):
            batch.fetched(event)
        elif isinstance(event, Saved):
            batch.rtc.copy_done(event.blocks)
            load.blocks_swapped += sum(event.kept)
            batch.stuck = False
        elif isinstance(event, Measured):
            batch.loads.costs, batch.rtc.unsaved = event.costs, Order()
        else:
            assert isinstance(event, Gone)
            batch.loads.costs = batch.rtc.unsaved = None
            load.tiers_gone = 1
        if self.tiers is not None:
            fill = self.tiers.fill
            load.dram_bytes, load.ssd_bytes = fill.dram_bytes, fill.ssd_bytes
            load.dram_evictions, load.ssd_evictions = fill.dram_evictions, fill.ssd_evictions
            load.blocks_torn, load.files_unwritten = self.tiers.torn, self.tiers.failed_writes

    def use_tiers(self) -> None:
        """Begin the copies that are due. Every step that could still write a block which is copied into is over by now, on all
        ranks: each has met the master since it wrote."""
        batch, rtc = self.batch, self.batch.rtc
        if batch.loads.fetches:
            self.commit(rtc.touched)
        if self.tiers is not None:
            for ticket, found, first, blocks in batch.loads.fetches:
                self.tiers.fetch(ticket, found, first, blocks)
            for found in batch.loads.unwanted:
                self.tiers.release(found)
        batch.loads.fetches.clear()
        batch.loads.unwanted.clear()
        batch.load.blocks_lost = rtc.losses
        if rtc.unsaved is None:
            return
        pool = min(rtc.blocks, max(rtc.reach, rtc.touched))
        wanted = int(pool * HIGH_SHARE) - rtc.spare
        self.saving = wanted > 0 and (self.saving or rtc.spare < pool * LOW_SHARE)
        if self.saving and not rtc.copied:
            blocks = rtc.copy(min(wanted, max(1, int(pool * COPIED_SHARE))))
            if blocks and self.tiers is not None:
                self.tiers.swap_out(blocks, [rtc.keys[b] or b"" for b in blocks], [rtc.until[b] for b in blocks])

    def commit_ahead(self) -> bool:
        """Commit another piece of KV memory beyond what is used; False where there is enough."""
        enough = min(self.batch.rtc.touched + self.ahead, self.batch.rtc.blocks)
        if self.committed >= enough:
            return False
        self.commit(min(self.committed + self.piece, enough))
        return True

    def commit(self, blocks: int) -> None:
        """Have memory for the first `blocks` KV blocks."""
        if blocks > self.committed:
            self.executor.kv.commit(blocks)
            self.committed = blocks

    def launch(self, plan: Plan) -> Pending:
        self.commit(self.batch.rtc.touched)
        for work in plan:
            if not work.seq.started:
                work.seq.started = self.clock()
        pending = self.executor.launch(plan)
        self.launches += 1
        self.launched.append(self.clock())
        if self.outbound is not None:
            self.outbound.launched(plan, pending)
        return pending

    def finish(self, plan: Plan, pending: Pending) -> None:
        """Wait for a launched step and reply with one message."""
        out = pending.result()
        if self.agree is not None:
            self.said = zlib.crc32(out.ids, self.said)
        self.batch.apply(plan, out)
        self.finishes += 1
        now, began = self.clock(), max(self.launched.popleft(), self.finished)
        self.finished = now
        self.batch.load.step_seconds += now - began
        if self.tiers is not None and (prefill := sum(work.count for work in plan if work.count > 1)):
            self.events.append(Stepped(prefill, len(plan), now - began))
        self.report()

    def report(self) -> None:
        if (tokens := self.batch.take_report()) is not None:
            self.tell(tokens)
        for seq in self.batch.finished:
            self.closing.append((self.launches, seq))
        self.batch.finished.clear()
        self.close_ended()
        self.hand_over()
        self.use_tiers()
        if self.batch.expected:
            self.commit(self.batch.rtc.touched)  # others write there soon, and would touch it page by page
        for notice in self.batch.notices:  # after the tokens that they speak of
            self.tell(notice)
        self.batch.notices.clear()
        self.tell_news(NEWS_SECONDS)

    def tell_news(self, after: float) -> None:
        """Tell which KV blocks came and went, where that was told last more than so many seconds ago."""
        if self.news is None or (now := self.clock()) - self.told < after:
            return
        if (news := self.news.take()) is not None:
            self.tell(news)
            self.told = now
