"""The cluster manager: the table of TEs, their life from fork to death, and the keeper they come from.

Each TE id has one coroutine that brings it up, waits for its end and brings it up again; the keeper has another. Who
listens hears `ready`, `lost` and each message. Nothing here knows of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from engine.config import Role, Seat, seats
from engine.types import Failed, FromWorker, Link, Load, Memory, Peer, Ready, Stop, Unlink, UserError
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

    def __init__(self, te: int, model: str, listener: Listener, seat: Seat):
        self.id = te
        self.model = model
        self.role = seat.role
        self.lender = seat.lender  # the TE in whose KV pool it computes, or -1
        self.pool: Peer | None = None  # what other TEs can map
        self.share = 100  # percent of the compute, for the workers of a semi pair
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
        self.expecting = 0  # tasks of its own whose prompts are computed elsewhere; counted there too
        self.computing = 0  # tasks of other TEs whose prompts it computes
        self.listener = listener
        self.announced: asyncio.Event = asyncio.Event()
        self.dead: asyncio.Event = asyncio.Event()
        self.link = LocalLink(self.receive, self.died)

    def move(self, event: str) -> None:
        self.state = NEXT[self.state, event]
        self.since = time.time()

    def receive(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.blocks, self.memory, self.pool = message.blocks, message.memory, message.pool
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
        busy = self.sequences or self.prompt_tokens
        return self.state == "ready" and not self.stuck(now, limit if busy else min(limit, IDLE_LIMIT))


def takes_tasks(tes: Sequence[TE]) -> bool:
    """Whether there is a whole way from prompt to text among some TEs."""
    roles = {te.role for te in tes}
    return "colocated" in roles or {"prefill", "decode"} <= roles or any(te.lender >= 0 for te in tes)


class Cluster:
    def __init__(self, plan: ladder.Plan, model: str, listener: Listener, stall_timeout: float):
        self.plan = plan
        self.model = model
        self.seats = seats(plan.config)
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
        self.up = [asyncio.Event() for _ in self.seats]  # by TE: it is ready

    # ---- life -------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Keep the keeper and every TE alive until cancelled; then end them all."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.keep_keeper())
                group.create_task(self.watch_beats())
                for te in range(len(self.seats)):
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
            te = self.table[number] = TE(number, self.model, self.listener, self.seats[number])
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
        owner, lender = None, None
        if te.lender >= 0:
            while not (self.up[te.lender].is_set() and self.keeper_there.is_set()):
                await self.up[te.lender].wait()
                await self.keeper_there.wait()
            owner = self.table[te.lender]
            assert owner.pool is not None and isinstance(owner.pool.memory, Memory), "only such a TE lends"
            lender = owner.pool.memory
        assert self.keeper is not None
        try:
            te.pid, pidfd, te.climb = await ladder.fork_te(self.keeper, self.plan, te.id, te.link.rings, lender)
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
            if owner is not None and (self.table[owner.id] is not owner or not self.up[owner.id].is_set()):
                self.orphan(te)
                await dead
                return 0.0
            self.climbs.append(te.climb)
            del self.climbs[:-256]  # enough to look back on; the histogram in /metrics keeps the rest
            self.introduce(te)
            self.up[te.id].set()
            self.listener.ready(te)
            if takes_tasks(self.ready_tes()):
                self.first_ready.set()
            began = time.monotonic()
            await dead
            self.up[te.id].clear()
            self.part(te)
            self.listener.lost(te, te.why())
            return time.monotonic() - began
        finally:
            ready.cancel()
            dead.cancel()

    def introduce(self, te: TE) -> None:
        """Let a new TE and the others reach each other's KV pools."""
        others = [other for other in self.ready_tes() if other is not te and other.pool is not None]
        if te.pool is None:
            return
        te.link.send(Link([other.pool for other in others if other.pool is not None]))
        for other in others:
            other.link.send(Link([te.pool]))

    def part(self, te: TE) -> None:
        """A TE has died. What computed in its pool goes with it, and its numbers pass to the next one."""
        for other in self.ready_tes():
            if other.lender == te.id:
                self.orphan(other)
            elif other.pool is not None and te.pool is not None:
                other.link.send(Unlink(te.id))

    def orphan(self, te: TE) -> None:
        """What a TE computes in has gone with its lender: what it wrote from now on would be nowhere."""
        te.failure = Failed(f"the KV pool that TE {te.id} computes in is gone with TE {te.lender}")
        te.link.kill()

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

    # ---- roles ------------------------------------------------------------------------------------------------------
    def give_role(self, number: int, role: Role) -> TE:
        """What a TE, and who comes after it under its number, does from now on. Raises `UserError`."""
        te = self.table.get(number)
        if te is None or te.state != "ready":
            raise UserError(f"there is no TE {number} that is ready; GET /v1/admin/te lists them", "id")
        if "semi" in (te.role, role) and te.role != role:
            raise UserError(f"TE {number} is {te.role}: a semi pair is made at the start (--pd semi) and stays one", "role")
        if te.pool is None and te.role != role:
            raise UserError(f"TE {number} stays {te.role}: no other TE can reach its KV cache", "role")
        before, te.role = te.role, role
        if not takes_tasks(self.ready_tes()):
            te.role = before
            raise UserError(
                f"with TE {number} as {role} no task could run: a colocated TE, or one for prefill and one for decode, is needed",
                "role",
            )
        self.seats[number] = Seat(role, te.lender)
        return te

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
                "lender": te.lender if te.lender >= 0 else None,
                "share": te.share,
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
