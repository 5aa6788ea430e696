"""Which models are up, on a box that hasn't the memory for all of them.

A model that wants to come up while the budget is full has the least recently used ones put to sleep. One that is busy is
displaced only after it has had its time, so that models asked for in turn don't chase each other out; it takes no more tasks
then, and what it runs is finished first. Nothing is refused for lack of memory but a model that would not fit alone.

What sleeps keeps its packed weights in memory, as another budget allows; the least recently used of those are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from engine.devices import kind
from engine.types import OutOfMemory
from scale.preload import Entry, make_room

if TYPE_CHECKING:
    from sched.deployment import Deployment

log = logging.getLogger(__name__)

# A busy model is displaced only after it has been up for so many seconds: some tens of times what waking it takes.
RESIDENCE = 2.0


class Residency:
    """`deployments` are all models of the server."""

    def __init__(self, budget: int, weights_budget: int, clock: Callable[[], float] = time.monotonic):
        """`budget`: bytes that models which are up may take together. `weights_budget`: bytes of packed weights that may be kept
        beside for models that are not up."""
        self.budget = budget
        self.weights_budget = weights_budget
        self.clock = clock
        self.deployments: list[Deployment] = []
        self.expected: Callable[[], dict[str, float] | None] = lambda: None  # requests that each model is expected to get
        self.changed = asyncio.Event()
        self.lock = asyncio.Lock()
        self.trimming: asyncio.Task[None] | None = None

    @property
    def used(self) -> int:
        """Bytes that the models which are up take."""
        return sum(d.footprint for d in self.deployments)

    @contextlib.asynccontextmanager
    async def room(self, who: Deployment, need: int, *, grows: bool = False) -> AsyncIterator[None]:
        """There are `need` bytes for `who` as long as the context lasts; what it takes within counts from then on. For a model
        that `grows` there need not be, if it has been put to sleep meanwhile.

        Raises `OutOfMemory` where it would not fit alone or, for one that grows, not beside busy ones."""
        alone = who.footprint - who.going + need
        if alone > self.budget:
            raise OutOfMemory(
                f"{who.id} needs {alone} bytes (weights {who.plan.weight_bytes}, the rest for its TEs) and --memory-budget is"
                f" {self.budget}: use {alone} or more, or a smaller --kv-cache-memory-bytes",
                "memory_budget",
            )
        async with self.lock:
            await self.make(who, need, grows)
            yield
        self.look()

    async def make(self, who: Deployment, need: int, grows: bool) -> None:
        """Have other models put to sleep until there is room."""
        told = False
        while self.used + need > self.budget and (who.slots or not grows):
            self.changed.clear()
            missing = self.used + need - self.budget - sum(d.going for d in self.deployments)
            if missing <= 0:  # enough are on their way out
                await self.changed.wait()
                continue
            others = [d for d in self.deployments if d is not who and d.slots]
            due = {d.id: self.due(d) for d in others}
            entries = [
                Entry(d.id, d.footprint - d.going, d.last_used, pinned=due[d.id] > 0 or (grows and d.busy)) for d in others
            ]
            victims = make_room(entries, sum(entry.nbytes for entry in entries), missing)
            if victims:
                for d in others:
                    if d.id in victims:
                        log.info("event=displaced model=%s for=%s busy=%s", d.id, who.id, d.busy)
                        d.leave()
                continue
            if grows:
                raise OutOfMemory(
                    f"{who.id} can't grow by {need} bytes: --memory-budget {self.budget} is in use", "memory_budget"
                )
            if not told:
                told = True
                who.progress(f"{who.id}: waiting for memory that other models use")
            soon = [seconds for seconds in due.values() if seconds > 0]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(soon) if soon else None)

    def due(self, d: Deployment) -> float:
        """Seconds until a model may be displaced by another that wakes up. One that is busy has its time first, once it is up."""
        if not d.busy:
            return 0.0
        return math.inf if d.state == "loading" else max(0.0, d.up_since + RESIDENCE - self.clock())

    def look(self) -> None:
        """Something has changed: whoever waits for room looks again, and weights that are too many are dropped."""
        self.changed.set()
        if (self.trimming is None or self.trimming.done()) and self.too_many():
            self.trimming = asyncio.create_task(self.trim(), name="deepserve-trim-weights")

    def kept(self) -> list[Entry]:
        """Packed weights in memory, by model. On cpu those of a model that is up are in use; an accelerator has its own copy."""
        entries = []
        for d in self.deployments:
            if d.made is not None and (nbytes := d.cluster.packed.get(d.made.key)):
                used = bool(d.slots or d.leaving) and not kind(d.config.device).own_memory
                coming = d.state == "loading"
                entries.append(Entry(d.id, nbytes, d.last_used, pinned=used or coming))
        return entries

    def too_many(self) -> list[str]:
        """Models whose packed weights are to be dropped."""
        idle = [entry for entry in self.kept() if not entry.pinned]
        return make_room(idle, self.weights_budget, 0, self.expected()) or []

    async def trim(self) -> None:
        while victims := self.too_many():
            await self.drop(victims)

    async def drop(self, victims: list[str]) -> None:
        """Have these models' packed weights dropped, but those that are in use by now."""
        for d in self.deployments:
            if d.id in victims and any(entry.key == d.id and not entry.pinned for entry in self.kept()):
                log.info("event=weights_dropped model=%s bytes=%d", d.id, await d.drop_weights())

    async def close(self) -> None:
        if self.trimming is not None:
            self.trimming.cancel()
            await asyncio.wait((self.trimming,))
