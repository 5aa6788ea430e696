"""The autoscaler of one deployment: it shows `scale.autoscale` what the JE sees, and has done what that decides. It looks only
while there is something to see, and sleeps as long as nothing can have to be decided."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from engine.config import Role, seats
from engine.types import UserError
from scale import autoscale

if TYPE_CHECKING:
    from sched.deployment import Deployment

log = logging.getLogger(__name__)

# Seconds between two looks while there is something to see: a tenfold jump is answered within two.
LOOK = 0.25
# Seconds after which growth is tried again that found no room, or whose TE could not come up.
RETRY = 30.0


class Autoscaler:
    def __init__(self, deployment: Deployment, clock: Callable[[], float]):
        self.deployment = deployment
        self.clock = clock
        self.memories: dict[Role, autoscale.Memory] = {}
        self.decisions: Counter[tuple[Role, str]] = Counter()  # (role, up or down) -> how often
        self.reason = ""  # of the newest decision, and why it came to nothing
        self.refused: dict[Role, tuple[int, int]] = {}  # (target, count) that came to nothing: not again until `retry_at`
        self.retry_at = 0.0
        self.activity = asyncio.Event()  # a request has come, or the last one has ended
        self.task: asyncio.Task[None] | None = None

    # ---- how many there may be --------------------------------------------------------------------------------------
    def bounds(self, role: Role) -> autoscale.Bounds:
        """How many TEs of a role."""
        config = self.deployment.asked
        start = sum(seat.role == role for seat in seats(config))
        least = config.min_te if config.min_te is not None else 0 if config.keep_alive is not None else start
        return autoscale.Bounds(least, max(config.max_te or 0, start, least), config.keep_alive)

    @property
    def fixed(self) -> bool:
        """As many TEs as at the start, for good."""
        config = self.deployment.asked
        return config.keep_alive is None and config.min_te in (None, config.te) and config.max_te in (None, config.te)

    # ---- what it is told --------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """The model comes up from nothing."""
        self.memories.clear()
        if not self.fixed and self.task is None:
            self.task = asyncio.create_task(self.run(), name=f"deepserve-autoscaler-{self.deployment.id}")

    def told(self, role: Role, target: int) -> None:
        """A person wants so many: that isn't changed at once."""
        self.memories[role] = autoscale.told(self.memories.get(role, autoscale.Memory()), target, self.clock())

    def hear(self, role: Role, why: UserError) -> None:
        """A TE can't come up."""
        self.reason = str(why)
        if (memory := self.memories.get(role)) is not None:
            self.refuse(role, memory.target)

    def refuse(self, role: Role, target: int) -> None:
        self.refused[role] = target, self.deployment.count(role)
        self.retry_at = self.clock() + RETRY

    # ---- what it does -----------------------------------------------------------------------------------------------
    async def run(self) -> None:
        while True:
            self.activity.clear()
            try:
                for role in sorted(set(self.deployment.wanted) - {"semi"}):
                    if self.deployment.slots:
                        await self.look(role)
            except Exception:  # a bug; the next look may go well
                log.exception("event=look_failed model=%s", self.deployment.id)
                await asyncio.sleep(LOOK)
            if self.deployment.busy:
                await asyncio.sleep(LOOK)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.activity.wait(), self.pause())

    def pause(self) -> float | None:
        """Seconds until something may have to be decided if no request comes; None: nothing will."""
        spare = [count for role, count in self.deployment.wanted.items() if count > self.bounds(role).min_te]
        keep_alive = self.deployment.asked.keep_alive
        if any(count > 1 for count in spare):
            return LOOK
        if not spare or keep_alive is None:
            return None
        return max(0.001, keep_alive - self.deployment.idle_s)

    async def look(self, role: Role) -> None:
        deployment = self.deployment
        count = deployment.count(role)
        signals = deployment.listener.signals(role, deployment.idle_s, self.clock())
        signals = msgspec.structs.replace(signals, starting=max(0, count - signals.ready))
        decision = autoscale.decide(signals, self.bounds(role), self.memories.get(role, autoscale.Memory()))
        self.memories[role] = decision.memory
        target = decision.target
        if target == count or ((target, count) == self.refused.get(role) and self.clock() < self.retry_at):
            return
        self.refused.pop(role, None)
        self.decisions[role, "up" if target > count else "down"] += 1
        self.reason = decision.reason
        log.info("event=scale model=%s role=%s from=%d to=%d why=%s", deployment.id, role, count, target, decision.reason)
        if target == 0:
            deployment.leave()
            return
        try:
            await deployment.resize(role, target, decision.reason)
        except UserError as e:
            self.refuse(role, target)
            self.reason = f"{decision.reason}; but {e}"
