"""The cluster manager: the table of all TEs of this server, their life from fork to death, and the keeper they come from.

Each TE has one coroutine, in a slot of its own, that brings it up, waits for its end and brings it up again until the slot is
given back; the keeper has another. Whoever a slot belongs to hears when its TE is ready and when it is lost, and the TE's
listener hears each message. Nothing here knows of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from engine import capacity
from engine.config import Role, Seat
from engine.devices import kind
from engine.types import Failed, FromWorker, Link, Load, Memory, Peer, Ready, Stop, Unlink, UserError, WeightFormat, WeightSource
from scale import fork, ladder
from scale.keeper_client import KeeperClient, KeeperDied
from sched.link import LocalLink

log = logging.getLogger(__name__)

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
KEPT_CLIMBS = 256  # enough to look back on; the histogram in /metrics keeps the rest


class Listener(Protocol):
    """Whoever hears of TEs: the job executor."""

    def ready(self, te: TE) -> None: ...
    def changed(self, te: TE) -> None:
        """Its role, or whether it takes tasks."""
        ...

    def lost(self, te: TE, why: str) -> None: ...
    def message(self, te: TE, message: FromWorker) -> None: ...


class Hosted(Protocol):
    """Whose a TE is: a deployment."""

    @property
    def id(self) -> str: ...
    @property
    def plan(self) -> ladder.Plan: ...
    @property
    def listener(self) -> Listener: ...
    def te_ready(self, te: TE) -> None: ...
    def te_lost(self, te: TE, why: str) -> None: ...
    def progress(self, line: str) -> None:
        """What a person who waits for its first TE would want to read."""
        ...

    def te_failed(self, slot: Slot, why: UserError) -> None:
        """A TE can't come up, and another try would end the same. Its slot is given back."""
        ...


class TE:
    """One task executor, from this side."""

    def __init__(self, te: int, model: str, listener: Listener, seat: Seat):
        self.id = te
        self.model = model
        self.role = seat.role
        self.lender = seat.lender  # the TE in whose KV pool it computes, or -1
        self.pool: Peer | None = None  # what other TEs can map
        self.met: set[int] = set()  # TEs whose pools it was told of
        self.weights: WeightSource | None = None  # what new TEs can take their weights from
        self.mapped_from = -1  # the TE whose weights it uses where they lie, on an accelerator: it can't outlive that one
        self.share = 100  # percent of the compute
        self.state: TEState = "starting"
        self.draining = False  # it takes no more tasks
        self.drained = asyncio.Event()  # ... and has none
        self.pid = 0
        self.ranks: list[int] = []  # process ids of its other ranks
        self.load = Load()
        self.blocks = 0
        self.memory: dict[str, int] = {}
        self.climb: ladder.Climb | None = None
        self.since = time.time()
        self.failure: Failed | None = None
        self.early: Ready | None = None
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
        self.listener.changed(self)

    def drain(self) -> None:
        """Give it no more tasks."""
        self.draining = True
        self.listener.changed(self)

    def receive(self, message: FromWorker) -> None:
        if isinstance(message, Ready) and self.state == "starting":
            self.early = message  # it was quicker than the keeper's word that it is there
        elif isinstance(message, Ready):
            self.blocks, self.memory, self.pool = message.blocks, message.memory, message.pool
            self.ranks = message.ranks
            self.weights, self.mapped_from = message.weights, message.source if message.mapped else -1
            assert self.climb is not None
            self.climb.finish(message, time.monotonic())
            self.move("announced")
            self.announced.set()
        elif isinstance(message, Failed):
            self.failure = message
        else:
            self.listener.message(self, message)
            self.look_whether_drained()

    def meet(self, other: TE) -> None:
        """It is about to write to another TE's pool: let it map that one. Only then, since each mapping costs each of many TEs a
        little."""
        if other.id not in self.met and other.pool is not None:
            self.met.add(other.id)
            self.link.send(Link([other.pool]))

    def forked(self, pidfd: int) -> None:
        """Its process is there. Takes the pidfd over."""
        self.link.watch(pidfd)
        self.move("forked")
        assert self.climb is not None
        self.climb.now = "te_load"
        if self.early is not None:
            self.receive(self.early)

    def look_whether_drained(self) -> None:
        """After what may have been its last task."""
        if self.draining and not (self.sequences or self.expecting or self.computing):
            self.drained.set()

    def died(self) -> None:
        self.move("died")
        self.drained.set()
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


def takes_tasks(tes: Sequence[TE] | Sequence[Seat]) -> bool:
    """Whether there is a whole way from prompt to text among some TEs, or those that have these seats."""
    roles = {te.role for te in tes}
    return "colocated" in roles or {"prefill", "decode"} <= roles or any(te.lender >= 0 for te in tes)


@dataclass(eq=False, slots=True)
class Slot:
    """A TE's place in the table, from one life to the next."""

    te: int
    hosted: Hosted
    seat: Seat
    ranks: int
    index: int  # of its first rank, among the cores or devices of the box
    reachable: bool
    lends: bool
    why: str  # it is there
    missed: bool  # while its TE isn't ready, something is wrong: not so of one that is yet to join others
    up: asyncio.Event = field(default_factory=asyncio.Event)  # its TE is ready
    leaving: bool = False
    failure: UserError | None = None  # no TE will ever be ready here
    task: asyncio.Task[None] | None = None


class Cluster:
    def __init__(self, stall_timeout: float, on_climb: Callable[[ladder.Climb], None] | None = None):
        """`on_climb` is told of each TE that is up."""
        self.stall_timeout = stall_timeout
        self.cores = 1  # that this process may use
        self.formats: set[tuple[str, WeightFormat]] = set()  # devices that TEs will have, and how weights are packed for them
        self.on_climb = on_climb
        self.slots: dict[int, Slot] = {}
        self.table: dict[int, TE] = {}
        self.group: asyncio.TaskGroup | None = None
        self.running = asyncio.Event()  # slots can be added
        self.stopping = False
        self.keeper: KeeperClient | None = None
        self.keeper_starts = 0
        self.restarts = 0  # TEs brought up again after a death
        self.climbs: list[ladder.Climb] = []
        self.starts: list[float] = []  # when processes were asked for
        self.pool_size = 0  # warm processes that are wanted
        self.keeper_there = asyncio.Event()
        self.taking: dict[int, ladder.Climb] = {}  # TEs that wait for weights of a running one, on accelerators
        self.sending: dict[int, int] = {}  # TE -> the TE that it sends its weights to
        self.send_over = asyncio.Event()  # set and replaced when a TE has its weights, or won't get them

    # ---- life -------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Keep the keeper and every TE alive until cancelled; then end them all."""
        try:
            async with asyncio.TaskGroup() as group:
                self.group = group
                group.create_task(self.keep_keeper())
                group.create_task(self.watch_beats())
                self.running.set()
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    self.stopping = True
                    self.running.clear()
        finally:
            await self.stop()

    async def keep_keeper(self) -> None:
        deaths = 0
        while True:
            started = time.monotonic()
            try:
                await self.one_keeper()
            except OSError as e:  # TEs that run need none
                log.error("event=no_keeper why=%s", e)
            deaths = 0 if time.monotonic() - started > STEADY else deaths + 1
            await asyncio.sleep(BACKOFF[min(deaths, len(BACKOFF) - 1)])

    async def one_keeper(self) -> None:
        """A keeper's life. Raises `OSError` where no process can be made for it."""
        self.keeper = KeeperClient(self.te_exited, self.formats)
        self.keeper_starts += 1
        self.keeper_there.set()
        if self.pool_size:
            with contextlib.suppress(KeeperDied):
                await self.keeper.pool(self.pool_size)
        await self.keeper.gone.wait()
        self.keeper_there.clear()
        await self.keeper.close()

    def take_starts(self) -> list[float]:
        """When processes were asked for since the last time, in CLOCK_MONOTONIC seconds."""
        taken, self.starts = self.starts, []
        return taken

    async def keep_warm(self, size: int) -> None:
        """Have so many processes ready to become TEs."""
        if size != self.pool_size:
            self.pool_size = size
            if self.keeper is not None and self.keeper_there.is_set():
                await self.keeper.pool(size)

    def add(self, hosted: Hosted, seat: Seat, ranks: int, *, reachable: bool, lends: bool, missed: bool, why: str) -> Slot:
        """Bring one more TE up, under the lowest free number. Raises `UserError` while the server ends."""
        if self.group is None or self.stopping:
            raise UserError("the server is shutting down")
        number = lowest_free(self.slots)
        index = free_run(ranks, ((slot.index, slot.ranks) for slot in self.slots.values()))
        slot = self.slots[number] = Slot(number, hosted, seat, ranks, index, reachable, lends, why, missed)
        slot.task = self.group.create_task(self.keep_te(slot))
        return slot

    async def end(self, slot: Slot) -> None:
        """Have a slot's TE leave, killing it where it doesn't, and give the slot back."""
        slot.leaving = True
        te = self.table.get(slot.te) if self.slots.get(slot.te) is slot else None  # its number may be another's by now
        if te is not None and te.state == "ready":
            te.move("stop")
            te.link.send(Stop())
            try:
                await asyncio.wait_for(te.dead.wait(), STOP_GRACE)
            except TimeoutError:
                te.link.kill()
        elif te is not None and te.state == "loading":
            te.link.kill()
        elif slot.task is not None and not slot.up.is_set():
            slot.task.cancel()
        if slot.task is not None:
            await asyncio.wait((slot.task,))

    async def keep_te(self, slot: Slot) -> None:
        """A slot's life."""
        deaths = stillborn = 0
        try:
            while not slot.leaving:
                te = self.table[slot.te] = TE(slot.te, slot.hosted.id, slot.hosted.listener, slot.seat)
                try:
                    lived = await self.bring_up_and_wait(slot, te)
                finally:
                    if not self.stopping:  # that asks each TE to leave first
                        te.link.close()
                if slot.leaving:
                    return
                deaths = 0 if lived > STEADY else deaths + 1
                stillborn = 0 if lived else stillborn + 1
                if stillborn == STILLBORN:
                    why = f"TE {slot.te} died {STILLBORN} times before it was ready; the last time: {te.why()}"
                    raise UserError(why)
                self.restarts += 1
                slot.why = f"again after: {te.why()}"
                await asyncio.sleep(BACKOFF[min(deaths, len(BACKOFF) - 1)])
        except UserError as e:
            slot.failure = e
        except OSError as e:
            why = f"TE {slot.te}: {e.strerror or e}; `ulimit -n`, `ulimit -u` and free memory bound how many there can be"
            slot.failure = UserError(why)
        except Exception as e:  # a bug; it takes no other TE with it
            log.exception("event=te_failed te=%d model=%s", slot.te, slot.hosted.id)
            slot.failure = UserError(f"TE {slot.te}: internal error: {e!r}")
        finally:
            if slot.failure is not None and not slot.leaving:
                slot.hosted.te_failed(slot, slot.failure)
            if not self.stopping:  # the table is how `stop` knows who is to be ended
                del self.slots[slot.te]
                self.table.pop(slot.te, None)

    async def bring_up_and_wait(self, slot: Slot, te: TE) -> float:
        """One life of a TE: how many seconds it served. Raises `UserError` where a new try would end the same."""
        plan = slot.hosted.plan
        te.climb = ladder.Climb(te.id, time.monotonic(), model=te.model, role=te.role, why=slot.why, at=time.time())
        await self.keeper_there.wait()
        owner, lender = None, None
        if te.lender >= 0:
            lending = self.slots[te.lender]
            while not (lending.up.is_set() and self.keeper_there.is_set()):
                await lending.up.wait()
                await self.keeper_there.wait()
            owner = self.table[te.lender]
            assert owner.pool is not None and isinstance(owner.pool.memory, Memory), "only such a TE lends"
            lender = owner.pool.memory
        try:
            sources = await self.sources_for(slot, te.climb)
            await self.keeper_there.wait()
            assert self.keeper is not None
            self.starts += [time.monotonic()] * slot.ranks
            place = ladder.Place(slot.seat, slot.ranks, slot.index, self.threads_of(slot), slot.reachable, slot.lends)
            te.pid, pidfd = await ladder.fork_te(
                self.keeper,
                plan,
                place,
                te.climb,
                te.link.rings,
                lender=lender,
                sources=sources,
                progress=slot.hosted.progress,
            )
        except KeeperDied as e:
            self.has_weights(te)
            te.failure = Failed(str(e))
            te.died()
            return 0.0
        except BaseException:
            self.has_weights(te)
            raise
        te.forked(pidfd)
        ready = asyncio.ensure_future(te.announced.wait())
        dead = asyncio.ensure_future(te.dead.wait())
        try:
            await asyncio.wait((ready, dead), return_when=asyncio.FIRST_COMPLETED)
            self.has_weights(te)
            if not te.announced.is_set():
                if te.failure is not None and te.failure.param is not None:
                    raise UserError(te.failure.why, te.failure.param)
                return 0.0
            if owner is not None and (self.table.get(owner.id) is not owner or owner.state != "ready"):
                self.orphan(te, owner.id, "KV pool")
                await dead
                return 0.0
            if te.mapped_from >= 0 and te.mapped_from not in (other.id for other in self.ready_tes(te.model)):
                self.orphan(te, te.mapped_from, "weights")
                await dead
                return 0.0
            self.tell(te.climb)
            slot.up.set()
            slot.missed = True
            slot.hosted.te_ready(te)
            began = time.monotonic()
            await dead
            slot.up.clear()
            self.part(te)
            slot.hosted.te_lost(te, te.why())
            return time.monotonic() - began
        finally:
            self.has_weights(te)
            ready.cancel()
            dead.cancel()

    def tell(self, climb: ladder.Climb) -> None:
        """A TE is up."""
        self.climbs.append(climb)
        del self.climbs[:-KEPT_CLIMBS]
        if self.on_climb is not None:
            try:
                self.on_climb(climb)
            except Exception:  # of whoever listens: the TE is none the worse for it
                log.exception("event=on_climb_failed te=%d", climb.te)

    def threads_of(self, slot: Slot) -> int:
        """Compute threads of each process of a TE that starts now: the cores, divided among all that there are. The two workers
        of a semi pair share theirs."""
        if slot.hosted.plan.config.te_share < 100:  # of all cores' time, as many TEs as there may be
            return capacity.threads_for(self.cores, slot.ranks)
        return capacity.threads_for(self.cores, sum(other.ranks for other in self.slots.values() if other.seat.lender < 0))

    async def sources_for(self, slot: Slot, climb: ladder.Climb) -> list[WeightSource]:
        """Running TEs that a new one can take its weights from, the best first. On an accelerator that waits until one of them
        sends to no other."""
        config = slot.hosted.plan.config

        def able() -> list[TE]:
            tes = [te for te in self.ready_tes(slot.hosted.id) if te.weights is not None and not te.draining]
            return [te for te in tes if self.slots[te.id].ranks == slot.ranks]

        if "fork" in config.scale_without or not kind(config.device).own_memory:
            return [te.weights for te in able() if te.weights is not None]
        self.taking[slot.te] = climb
        try:
            while tes := able():
                holders = [fork.Holder(te.id, config.device, self.slots[te.id].index, te.id not in self.sending) for te in tes]
                takers = [fork.Taker(number, config.device, self.slots[number].index) for number in self.taking]
                coming = [fork.Taker(te, config.device, self.slots[te].index) for te in self.sending.values() if te in self.slots]
                for taker, holder, how in fork.assign(holders, takers, coming):
                    if taker.te == slot.te:
                        if how == "copy":
                            self.sending[holder.te] = slot.te
                        tes.sort(key=lambda te: (te.id != holder.te, te.id in self.sending, te.id))
                        return [te.weights for te in tes if te.weights is not None]
                await self.send_over.wait()
            return []
        finally:
            del self.taking[slot.te]

    def has_weights(self, te: TE) -> None:
        """A TE has its weights, or won't get them: who sent them is free."""
        for source, taker in list(self.sending.items()):
            if taker == te.id:
                del self.sending[source]
                self.send_over.set()
                self.send_over = asyncio.Event()

    def part(self, te: TE) -> None:
        """A TE has gone. What computed in its pool, or with its weights, goes with it, and its number passes to another one."""
        for other in self.ready_tes(te.model):
            if other.lender == te.id:
                self.orphan(other, te.id, "KV pool")
            elif other.mapped_from == te.id:
                self.orphan(other, te.id, "weights")
            elif te.id in other.met:
                other.met.discard(te.id)
                other.link.send(Unlink(te.id))

    def orphan(self, te: TE, lender: int, what: str) -> None:
        """What a TE computes with has gone with another one: what it wrote from now on would be nowhere."""
        te.failure = Failed(f"the {what} that TE {te.id} computes with is gone with TE {lender}")
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
        """Ask every TE to leave, kill what doesn't, end the keeper. The TEs' coroutines have been cancelled."""
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
        if te is None or te.state != "ready" or te.draining:
            raise UserError(f"there is no TE {number} that is ready; GET /v1/admin/te lists them", "id")
        if "semi" in (te.role, role) and te.role != role:
            raise UserError(f"TE {number} is {te.role}: a semi pair is made at the start (--pd semi) and stays one", "role")
        if te.pool is None and te.role != role:
            raise UserError(f"TE {number} stays {te.role}: no other TE can reach its KV cache", "role")
        before, te.role = te.role, role
        if not takes_tasks(self.ready_tes(te.model)):
            te.role = before
            raise UserError(
                f"with TE {number} as {role} no task could run: a colocated TE, or one for prefill and one for decode, is needed",
                "role",
            )
        self.slots[number].seat = Seat(role, te.lender)
        te.listener.changed(te)
        return te

    # ---- what can be seen -------------------------------------------------------------------------------------------
    def ready_tes(self, model: str | None = None) -> list[TE]:
        """Of a model, or of all."""
        return [te for te in self.table.values() if te.state == "ready" and model in (None, te.model)]

    @property
    def packed(self) -> dict[str, int]:
        """What the keeper holds: bytes by key."""
        return self.keeper.packed_keys if self.keeper is not None and self.keeper_there.is_set() else {}

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
                "step": te.climb.now if te.climb is not None and te.state in ("starting", "loading") else None,
                "path": te.climb.path if te.climb is not None else None,
                "draining": te.draining,
                "since": round(te.since, 3),
                "beat_age_s": round(te.link.beat_age(now), 3) if te.state == "ready" else None,
                "load": msgspec.structs.asdict(te.load),
                "kv_blocks": te.blocks,
                "memory_bytes": te.memory,
                "scale_steps_s": {k: round(v, 4) for k, v in te.climb.steps.items()} if te.climb else {},
            }
            for te in self.table.values()
        ]


def lowest_free(taken: Iterable[int]) -> int:
    used = set(taken)
    return next(number for number in range(len(used) + 1) if number not in used)


def free_run(count: int, taken: Iterable[tuple[int, int]]) -> int:
    """Where `count` numbers in a row are free, beside runs of (first, how many) that are taken: the lowest."""
    used = {first + i for first, length in taken for i in range(length)}
    return next(first for first in range(max(used, default=-1) + 2) if used.isdisjoint(range(first, first + count)))
