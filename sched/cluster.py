"""The cluster manager: the table of TEs, their life from fork to death, and the keeper they come from.

Each TE id has one coroutine that brings it up, waits for its end and brings it up again; the keeper has another. Who
listens hears `ready`, `lost` and each message. Nothing here knows of requests.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal, Protocol

import msgspec

from engine.types import Failed, FromWorker, Load, Ready, Stop, UserError
from scale import ladder
from scale.keeper_client import KeeperClient, KeeperDied
from sched.link import LocalLink

TEState = Literal["starting", "loading", "ready", "stopping", "dead"]
NEXT: dict[tuple[TEState, str], TEState] = {
    ("starting", "forked"): "loading",
    ("starting", "died"): "dead",
    ("loading", "announced"): "ready",
    ("loading", "died"): "dead",
    ("ready", "stop"): "stopping",
    ("ready", "died"): "dead",
    ("stopping", "died"): "dead",
}

# A TE or keeper that dies young is brought up again after these seconds; one that lived longer than STEADY starts the row anew.
BACKOFF = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
STEADY = 10.0
STILLBORN = 5  # starts in a row that never got ready, after which starting is given up: the next would end the same
# How often a busy TE's heartbeat is looked at. The beat itself is a word in shared memory: looking costs no message.
LOOK = 1.0
IDLE_LIMIT = 5.0  # an idle TE whose beat is older than this many seconds is not healthy
STOP_GRACE = 2.0  # seconds for a TE to leave on `Stop` before it is killed


class Listener(Protocol):
    """Whoever hears of TEs: the job executor."""

    def ready(self, te: TE) -> None: ...
    def lost(self, te: TE, why: str) -> None: ...
    def message(self, te: TE, message: FromWorker) -> None: ...


class TE:
    """One task executor, from this side."""

    def __init__(self, te: int, model: str, listener: Listener):
        self.id = te
        self.model = model
        self.role = "colocated"
        self.state: TEState = "starting"
        self.pid = 0
        self.load = Load()
        self.blocks = 0
        self.memory: dict[str, int] = {}
        self.climb: ladder.Climb | None = None
        self.since = time.time()
        self.failure: Failed | None = None
        self.sequences = 0  # given to it and not ended; the job executor counts
        self.prompt_tokens = 0  # of these, prompt tokens of sequences that have no first token yet
        self.listener = listener
        self.announced: asyncio.Event = asyncio.Event()
        self.dead: asyncio.Event = asyncio.Event()
        self.link = LocalLink(self.receive, self.died)

    def move(self, event: str) -> None:
        self.state = NEXT[self.state, event]
        self.since = time.time()

    def receive(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.blocks, self.memory = message.blocks, message.memory
            now = time.monotonic()
            assert self.climb is not None
            self.climb.finish(message.steps, message.at, now)
            self.move("announced")
            self.announced.set()
        elif isinstance(message, Failed):
            self.failure = message
        else:
            self.listener.message(self, message)

    def died(self) -> None:
        self.move("died")
        self.dead.set()

    def why(self) -> str:
        """What ended it."""
        return self.failure.why if self.failure is not None else f"TE {self.id} (pid {self.pid}) died"

    def stuck(self, now: float, limit: float) -> bool:
        """Its step loop has not come round for `limit` seconds. An idle TE's comes round every second."""
        return self.state == "ready" and self.link.beat_age(now) > limit

    def healthy(self, now: float, limit: float) -> bool:
        """Ready, and its step loop comes round: within `limit` seconds where a step may be running."""
        return self.state == "ready" and not self.stuck(now, limit if self.sequences else min(limit, IDLE_LIMIT))


class Cluster:
    def __init__(self, plan: ladder.Plan, model: str, count: int, listener: Listener, stall_timeout: float):
        self.plan = plan
        self.model = model
        self.count = count
        self.listener = listener
        self.stall_timeout = stall_timeout
        self.table: dict[int, TE] = {}
        self.keeper: KeeperClient | None = None
        self.keeper_starts = 0
        self.restarts = 0  # TEs brought up again after a death
        self.climbs: list[ladder.Climb] = []
        self.failure: UserError | None = None  # why no TE can ever come up with these settings
        self.keeper_there = asyncio.Event()
        self.first_ready = asyncio.Event()  # set as well when `failure` is

    # ---- life -------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Keep the keeper and every TE alive until cancelled; then end them all."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.keep_keeper())
                group.create_task(self.watch_beats())
                for te in range(self.count):
                    group.create_task(self.keep_te(te))
        except* UserError as errors:
            first = errors.exceptions[0]
            self.give_up(first if isinstance(first, UserError) else UserError(str(first)))
        finally:
            await self.stop()

    def give_up(self, why: UserError) -> None:
        """No TE will ever come up."""
        self.failure = why
        self.first_ready.set()

    async def keep_keeper(self) -> None:
        deaths = 0
        while True:
            self.keeper = KeeperClient(self.te_exited)
            self.keeper_starts += 1
            self.keeper_there.set()
            started = time.monotonic()
            await self.keeper.gone.wait()
            self.keeper_there.clear()
            await self.keeper.close()
            deaths = 0 if time.monotonic() - started > STEADY else deaths + 1
            await asyncio.sleep(BACKOFF[min(deaths, len(BACKOFF) - 1)])

    async def keep_te(self, number: int) -> None:
        deaths = stillborn = 0
        while True:
            te = self.table[number] = TE(number, self.model, self.listener)
            lived = await self.bring_up_and_wait(te)
            te.link.close()
            deaths = 0 if lived > STEADY else deaths + 1
            stillborn = 0 if lived else stillborn + 1
            if stillborn == STILLBORN:
                raise UserError(f"TE {number} died {STILLBORN} times before it was ready; the last time: {te.why()}")
            self.restarts += 1
            await asyncio.sleep(BACKOFF[min(deaths, len(BACKOFF) - 1)])

    async def bring_up_and_wait(self, te: TE) -> float:
        """One life of a TE: how many seconds it served. Raises `UserError` where a new try would end the same."""
        await self.keeper_there.wait()
        assert self.keeper is not None
        try:
            te.pid, pidfd, te.climb = await ladder.fork_te(self.keeper, self.plan, te.id, te.link.rings)
        except KeeperDied as e:
            te.failure = Failed(str(e))
            te.died()
            return 0.0
        te.link.watch(pidfd)
        te.move("forked")
        ready = asyncio.ensure_future(te.announced.wait())
        dead = asyncio.ensure_future(te.dead.wait())
        try:
            await asyncio.wait((ready, dead), return_when=asyncio.FIRST_COMPLETED)
            if not te.announced.is_set():
                if te.failure is not None and te.failure.param is not None:
                    raise UserError(te.failure.why, te.failure.param)
                return 0.0
            self.climbs.append(te.climb)
            del self.climbs[:-256]  # enough to look back on; the histogram in /metrics keeps the rest
            self.first_ready.set()
            self.listener.ready(te)
            began = time.monotonic()
            await dead
            self.listener.lost(te, te.why())
            return time.monotonic() - began
        finally:
            ready.cancel()
            dead.cancel()

    async def watch_beats(self) -> None:
        """Kill a TE that is stuck; its death is then handled like any other."""
        while True:
            await asyncio.sleep(LOOK)
            now = time.monotonic()
            for te in self.table.values():
                if te.stuck(now, self.stall_timeout):
                    te.failure = Failed(f"TE {te.id} (pid {te.pid}) finished no step in {self.stall_timeout:g} s")
                    te.link.kill()

    def te_exited(self, number: int, pid: int, status: int) -> None:
        te = self.table.get(number)
        if te is not None and te.pid == pid and te.failure is None and status != 0:
            te.failure = Failed(f"TE {number} (pid {pid}) ended with status {status}")

    async def stop(self) -> None:
        """Ask every TE to leave, kill what doesn't, end the keeper."""
        leaving = [te for te in self.table.values() if te.state == "ready"]
        for te in leaving:
            te.link.send(Stop())
            te.move("stop")
        end = time.monotonic() + STOP_GRACE
        for te in leaving:
            await te.link.ended(end - time.monotonic())
        for te in self.table.values():
            te.link.close()
        if self.keeper is not None:
            await self.keeper.close()

    # ---- what can be seen -------------------------------------------------------------------------------------------
    def ready_tes(self) -> list[TE]:
        return [te for te in self.table.values() if te.state == "ready"]

    def describe(self) -> list[dict[str, Any]]:
        """Every TE as `GET /v1/admin/te` shows it."""
        now = time.monotonic()
        return [
            {
                "id": te.id,
                "pid": te.pid or None,
                "role": te.role,
                "model": te.model,
                "state": te.state,
                "since": round(te.since, 3),
                "beat_age_s": round(te.link.beat_age(now), 3) if te.state == "ready" else None,
                "load": msgspec.structs.asdict(te.load),
                "kv_blocks": te.blocks,
                "memory_bytes": te.memory,
                "scale_steps_s": {k: round(v, 4) for k, v in te.climb.steps.items()} if te.climb else {},
            }
            for te in self.table.values()
        ]
