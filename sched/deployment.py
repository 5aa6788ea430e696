"""A deployment: one model that this server answers for. It knows how many TEs of which role the model should have, has them
brought up and let go, and looks after what a caller needs of the model before any TE is there: its description and its tokenizer.

How many there should be is decided by `sched.autoscaling`; whether there is room for them by `sched.residency`, which may have
another model put to sleep. The state is a function of what is there:

    off       nothing of it is in memory
    loading   TEs are on their way, and none takes tasks yet
    ready     requests run
    asleep    no TE; its packed weights are in memory
    failed    it can't come up; what asks for it hears why
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from engine import capacity, devices, models, native, weights
from engine.config import Config, Role, Seat, ranks, ranks_for, seats
from engine.tokenizer import Tokenizer
from engine.types import UserError
from scale import autoscale, ladder, pull
from scale.keeper_client import KeeperDied
from scale.memory import Used, used_by
from sched.autoscaling import Autoscaler
from sched.cluster import TE, Cluster, Slot, takes_tasks
from sched.job_executor import JobExecutor
from sched.knowledge import Knowledge
from sched.metrics import Families, Metrics, ModelState
from sched.residency import Residency
from sched.stream import Unavailable, result_of

log = logging.getLogger(__name__)

# Seconds after which a model that could not come up is tried again by the next request.
RETRY = 30.0
# Of its --max-num-seqs, a TE gets 1/AHEAD more sequences than it runs at once, where more TEs may come: what waits in the JE goes
# to the TE that comes next, what waits in a TE stays there.
AHEAD = 4
MOST_TES = 256
READ = (".json", ".safetensors", ".jinja")  # of the files in a model's folder, those that are read


class Deployment:
    """One model."""

    def __init__(
        self,
        asked: Config,
        cluster: Cluster,
        residency: Residency,
        families: Families,
        rng: Random,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.asked = asked
        self.cluster = cluster
        self.residency = residency
        self.families = families
        self.rng = rng
        self.box: capacity.Machine | None = None  # what the server's models may use together; None: this machine
        self.clock = clock
        self.config = asked  # resolved once the model's files are read
        self.why: dict[str, str] = {}
        self.names: list[str] = list(asked.served_model_name)
        self.created = int(time.time())
        self.describing: asyncio.Task[None] | None = None
        self.tokenizing: asyncio.Task[Tokenizer] | None = None
        self.waking: asyncio.Task[None] | None = None
        self.tokenizer: Tokenizer | None = None
        self.metrics: Metrics | None = None
        self.je: JobExecutor | None = None
        self.made: ladder.Plan | None = None
        self.failure: UserError | None = None
        self.failed_at = 0.0
        self.closed = False
        self.news = asyncio.Event()  # set whenever `state` or a TE of it may have changed
        self.stamp = ""  # of the files that `made` was made from
        self.slots: list[Slot] = []  # those that are not leaving
        self.been_up = False  # all TEs that it starts with have been ready, since it last began to come up
        self.lacking = 0  # TEs that it should have, and that can't come up
        self.leaving: set[asyncio.Task[None]] = set()
        self.errands: set[asyncio.Task[Any]] = set()  # that are done to their end, whether the caller waits or not
        self.last_used = clock()
        self.up_since = clock()  # when its tasks could last begin to run
        self.autoscaler = Autoscaler(self, clock)

    # ---- what the cluster asks --------------------------------------------------------------------------------------
    @property
    def id(self) -> str:
        """The model's first name."""
        return self.names[0] if self.names else self.asked.model

    @property
    def plan(self) -> ladder.Plan:
        assert self.made is not None, "the model's files are not read"
        return self.made

    @property
    def listener(self) -> JobExecutor:
        assert self.je is not None
        return self.je

    def te_ready(self, te: TE) -> None:
        assert self.je is not None and self.metrics is not None and te.climb is not None
        if not takes_tasks([other for other in self.takers() if other is not te]):
            self.up_since = self.clock()
        self.metrics.climbed(te.climb)
        self.je.ready(te)
        self.been_up |= all(slot.up.is_set() for slot in self.slots)
        self.changed()

    def te_lost(self, te: TE, why: str) -> None:
        assert self.je is not None
        self.je.lost(te, why)
        self.changed()

    def te_failed(self, slot: Slot, why: UserError) -> None:
        log.error("event=te_failed te=%d model=%s why=%s", slot.te, self.id, why)
        self.slots.remove(slot)
        self.resized()
        self.lacking += slot.missed
        self.autoscaler.hear(slot.seat.role, why)
        # What it starts with must all come up, where a setting is to blame; later the others go on.
        asked_for_too_much = why.param is not None and not self.been_up
        if asked_for_too_much or not takes_tasks([other.seat for other in self.slots]):
            self.give_up(why)
        self.changed()

    def progress(self, line: str) -> None:
        if self.je is not None:
            self.je.progress(line)

    # ---- news -------------------------------------------------------------------------------------------------------
    def changed(self) -> None:
        """After whatever may have changed `state`."""
        self.news.set()
        self.residency.look()

    async def wait_while(self, true: Callable[[], bool]) -> None:
        """Until something is no longer so."""
        while true():
            self.news.clear()
            await self.news.wait()

    def give_up(self, why: UserError) -> None:
        """It can't come up. Who asks for it hears why, until that has been tried again."""
        self.failure, self.failed_at = why, self.clock()
        if self.je is not None:
            self.je.give_up(f"{self.id} can't be served: {why}")
        self.leave()

    # ---- what it is -------------------------------------------------------------------------------------------------
    @property
    def state(self) -> ModelState:
        if self.failure is not None:
            return "failed"
        if takes_tasks(self.takers()):
            return "ready"
        if self.slots or (self.waking is not None and not self.waking.done()):
            return "loading"
        return "asleep" if self.made is not None and self.made.key in self.cluster.packed else "off"

    def tes(self) -> list[TE]:
        """Its TEs, whatever they are doing."""
        return [te for te in self.cluster.table.values() if te.model == self.id]

    def takers(self) -> list[TE]:
        """Its TEs that take tasks."""
        return [te for te in self.tes() if te.state == "ready" and not te.draining]

    def count(self, role: Role) -> int:
        """TEs of a role that it has or is getting."""
        return sum(slot.seat.role == role for slot in self.slots)

    @property
    def wanted(self) -> dict[Role, int]:
        roles = dict.fromkeys([seat.role for seat in seats(self.config)] + [slot.seat.role for slot in self.slots])
        return {role: self.count(role) for role in roles}

    @property
    def decisions(self) -> Counter[tuple[Role, str]]:
        """How often the autoscaler wanted (role, up or down)."""
        return self.autoscaler.decisions

    @property
    def held(self) -> int:
        """Tasks that wait for a TE."""
        return len(self.je.held) if self.je is not None else 0

    @property
    def has_choice(self) -> bool:
        """It has, or may get, more than one TE."""
        return not self.autoscaler.fixed or len(seats(self.config)) > 1

    @property
    def busy(self) -> bool:
        return self.je is not None and self.je.outstanding > 0

    @property
    def footprint(self) -> int:
        """Bytes that it takes, or is about to take: its weights, and what each TE has of its own."""
        if self.made is None or not (self.slots or self.leaving):
            return 0
        return self.made.weight_bytes + self.made.te_bytes * (len(self.slots) + len(self.leaving))

    @property
    def going(self) -> int:
        """Of these, bytes that are on their way out."""
        if self.made is None or not self.leaving:
            return 0
        return self.made.te_bytes * len(self.leaving) + (0 if self.slots else self.made.weight_bytes)

    @property
    def idle_s(self) -> float:
        """Seconds since it last had something to do, or could have had."""
        return 0.0 if self.busy or self.state == "loading" else self.clock() - max(self.last_used, self.up_since)

    # ---- before any TE is there -------------------------------------------------------------------------------------
    async def describe(self) -> None:
        """Read the model's description: after it, everything but its weights is known. Raises `UserError`."""
        if self.closed:
            raise Unavailable("the server is shutting down", 10.0)
        if self.describing is None or (self.describing.done() and self.describing.exception() is not None):
            self.describing = asyncio.create_task(self.read_description(), name=f"deepserve-describe-{self.id}")
        await result_of(self.describing)

    def may_have_changed(self) -> None:
        """Its files may have been replaced: they are looked at when it is described next. Not while it has TEs."""
        if self.describing is not None and self.describing.done():
            self.describing = None

    async def read_description(self) -> None:
        if self.made is not None:
            now = await asyncio.to_thread(stamp, self.plan.path)
            if now in (self.stamp, ""):  # where the files have gone, packed weights will do, or packing says what is missing
                return
            log.warning("event=files_changed model=%s path=%s", self.id, self.plan.path)
        path = await asyncio.to_thread(self.find)
        now = await asyncio.to_thread(stamp, path)
        await asyncio.to_thread(native.load)  # compiles where it is missing
        plan, self.why = await asyncio.to_thread(make_plan, path, now, self.asked, self.box)
        if self.je is not None:
            await self.je.placing.knowledge.close(self.id)
        knowledge = await asyncio.to_thread(Knowledge.load, path, plan.config, self.box or capacity.machine())
        before, self.made, self.config, self.stamp, self.tokenizing = self.made, plan, plan.config, now, None
        if before is not None:
            await self.drop_packed(before.key)
        if self.je is None:
            self.metrics = Metrics(self.families, self.id)
            self.je = JobExecutor(self.config, self.metrics, self.rng, self.clock, self.used, knowledge)
            if not self.autoscaler.fixed:
                self.je.placing.ahead = max(1, self.config.max_num_seqs // AHEAD)
        else:
            self.je.give_up(f"{self.id}: its files were replaced; ask again")
            self.je.follow(self.config, knowledge)
        self.resized()

    def find(self) -> Path:
        """Where the model is; from then on it has a name. Raises `UserError`."""
        asked = self.asked.model
        try:
            path = pull.resolve(asked)
        except UserError:
            self.names = self.names or [pull.model_id(asked, Path(asked))]
            raise
        if self.je is None and not self.asked.served_model_name:
            self.names = [pull.model_id(asked, path)]
        return path

    async def tokens(self) -> Tokenizer:
        """The tokenizer, loaded when it is first asked for. Raises `UserError`."""
        await self.describe()
        if self.tokenizing is None or (self.tokenizing.done() and self.tokenizing.exception() is not None):
            self.tokenizing = asyncio.create_task(asyncio.to_thread(Tokenizer.load, self.plan.path, self.config.chat_template))
        self.tokenizer = await result_of(self.tokenizing)
        assert self.je is not None
        self.je.tokenizer = self.tokenizer
        return self.tokenizer

    # ---- up and down ------------------------------------------------------------------------------------------------
    def used(self) -> None:
        """A request has come, or the last one has ended."""
        self.last_used = self.clock()
        self.autoscaler.activity.set()
        self.residency.changed.set()  # one that is idle makes room
        if self.busy and not self.slots and not self.leaving:  # it was put to sleep while the prompt was made ready
            self.wake("a request has come")

    def wake(self, why: str, *, again: bool = False) -> None:
        """Have it come up, unless it is up or on its way. `again`: also where that has just failed."""
        under_way = self.waking is not None and not self.waking.done()
        failed = self.failure is not None and not again and self.clock() - self.failed_at < RETRY
        if self.closed or self.slots or under_way or failed:
            return
        self.failure = None
        if self.je is not None:
            self.je.newest = ""
        self.may_have_changed()
        self.waking = asyncio.create_task(self.come_up(why), name=f"deepserve-wake-{self.id}")
        self.waking.add_done_callback(lambda task: self.changed())
        self.changed()

    async def come_up(self, why: str) -> None:
        """From nothing to as many TEs as it starts with. Raises nothing: `failure` tells."""
        try:
            await self.describe()
            while self.leaving:  # what is on its way to sleep gets there first
                await asyncio.wait(self.leaving)
            await self.cluster.running.wait()
            start = seats(self.config)
            async with self.residency.room(self, self.plan.weight_bytes + self.plan.te_bytes * len(start)):
                self.autoscaler.begin()
                self.lacking = 0
                self.been_up = False
                for number, seat in enumerate(start):
                    self.add(seat, why, lends=any(other.lender == number for other in start))
        except UserError as e:
            self.give_up(e)
        except Exception as e:  # a bug; whoever waits is told
            log.exception("event=wake_failed model=%s", self.id)
            self.give_up(UserError(f"internal error: {e!r}"))

    def add(self, seat: Seat, why: str, *, lends: bool = False, joins: bool = False) -> None:
        """One more TE, which joins others or is one of those that it starts with; among these `seat.lender` counts."""
        if seat.lender >= 0:
            seat = Seat(seat.role, self.slots[seat.lender].te)
        shared = not devices.kind(self.config.device).own_memory  # then showing it costs nothing
        reachable = seat.lender < 0 and (shared or not self.autoscaler.fixed or len(seats(self.config)) > 1)
        processes = ranks_for(self.config, seat)
        self.slots.append(self.cluster.add(self, seat, processes, reachable=reachable, lends=lends, missed=not joins, why=why))
        self.resized()

    def resized(self) -> None:
        if self.je is not None:
            self.je.seats = len(self.slots) or len(seats(self.config))  # none: as many as will come when it is asked for

    def let_go(self, slot: Slot) -> asyncio.Task[None]:
        """Have a TE take no more tasks, its decodes go on elsewhere or end, and then leave."""
        slot.leaving = True  # should its TE die now, no other one comes
        if self.cluster.slots.get(slot.te) is slot and (te := self.cluster.table.get(slot.te)) is not None:
            te.drain()
        self.slots.remove(slot)
        self.resized()
        task = asyncio.create_task(self.retire(slot), name=f"deepserve-retire-{slot.te}")
        self.leaving.add(task)
        task.add_done_callback(self.has_left)
        self.changed()
        return task

    def leave(self) -> None:
        """Let all its TEs go."""
        self.lacking = 0
        for slot in list(self.slots):
            self.let_go(slot)

    def has_left(self, task: asyncio.Task[None]) -> None:
        self.leaving.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("event=retire_failed model=%s", self.id, exc_info=bug)
        if self.held and not self.slots:  # it was asked for meanwhile
            self.wake("requests wait")
        self.changed()

    async def retire(self, slot: Slot) -> None:
        if self.cluster.slots.get(slot.te) is not slot:
            return
        te = self.cluster.table.get(slot.te)
        if te is not None and te.state == "ready" and self.je is not None:
            self.je.move_away(te)
            self.je.place()
            te.look_whether_drained()
            await te.drained.wait()
        await self.cluster.end(slot)

    async def resize(self, role: Role, target: int, why: str) -> None:
        """Have so many TEs of a role, unless it is put to sleep before there is room for them. Raises `UserError` where the
        memory budget has none."""
        missing = target - self.count(role)
        if missing > 0:
            async with self.residency.room(self, self.plan.te_bytes * missing, grows=True):
                for _ in range(target - self.count(role) if self.slots else 0):
                    self.add(Seat(role), why, joins=True)
            return
        able = [self.resident(slot) for slot in self.slots if slot.seat.role == role]
        going = autoscale.leaving(able, -missing)
        for slot in [slot for slot in self.slots if slot.te in going]:
            self.let_go(slot)

    def resident(self, slot: Slot) -> autoscale.Resident:
        """A TE as one that could go: first those that are not up yet."""
        te = self.cluster.table.get(slot.te)
        lends_to = tuple(other.id for other in self.tes() if other.mapped_from == slot.te)
        return autoscale.Resident(slot.te, te.sequences if te is not None and slot.up.is_set() else -1, lends_to)

    async def told(self, role: Role, target: int) -> None:
        """Have as many TEs of a role as a person has asked for, and wait until they are ready."""
        if "semi" in self.wanted:
            raise UserError(f"{self.id}: a semi pair is made at the start (--pd semi) and isn't scaled", "role")
        if target < 1:
            raise UserError(f"te: {target}; ask for one or more, or put {self.id} to sleep", "te")
        if target > MOST_TES:
            raise UserError(f"te: {target} is more than the {MOST_TES} there may be", "te")
        await self.resize(role, target, "asked for")
        self.autoscaler.told(role, target)
        asked = [slot for slot in self.slots if slot.seat.role == role]
        await self.wait_while(lambda: any(slot in self.slots and not slot.up.is_set() for slot in asked))
        for slot in asked:
            if slot.failure is not None:
                raise slot.failure
        if not self.slots:
            raise self.asleep_again()

    def asleep_again(self) -> Unavailable:
        """What is told to who waited for its TEs."""
        if self.failure is not None:
            return Unavailable(f"{self.id} can't be served: {self.failure}", RETRY)
        return Unavailable(f"{self.id} was put to sleep before it was up; ask again", 1.0)

    def drain(self, slot: Slot) -> asyncio.Task[None]:
        """Let one TE go for good: the autoscaler doesn't take it for one that died. Raises `UserError` where others need it."""
        role, others = slot.seat.role, [other.seat for other in self.slots if other is not slot]
        if role == "semi" or (others and not takes_tasks(others)):
            raise UserError(f"without TE {slot.te} no task could run; POST /v1/admin/sleep lets all TEs of {self.id} go", "te")
        if borrowers := self.resident(slot).lends_to:
            raise UserError(f"TE {borrowers[0]} computes with the weights of TE {slot.te}; drain that one first", "te")
        task = self.let_go(slot)
        self.autoscaler.told(role, self.count(role))
        return task

    def fall_asleep(self, level: int) -> asyncio.Task[tuple[Used, bool]]:
        """`sleep`, to its end."""
        task = asyncio.create_task(self.sleep(level), name=f"deepserve-sleep-{self.id}")
        self.errands.add(task)
        task.add_done_callback(self.errands.discard)
        return task

    async def sleep(self, level: int) -> tuple[Used, bool]:
        """Drop every TE, and with level 2 the packed weights: what that freed, and whether all of it is verified to be gone."""
        if self.waking is not None and not self.waking.done():
            await asyncio.wait((self.waking,))
        pids = [pid for te in self.tes() if te.pid for pid in (te.pid, *te.ranks)]
        used = await asyncio.to_thread(used_by, pids)
        self.leave()
        while self.leaving:
            await asyncio.wait(self.leaving)
        freed = Used(used.private, used.kv, 0)
        if level == 2:
            freed.weights = await self.drop_weights()
        gone = await asyncio.to_thread(used_by, pids)
        return freed, not any((gone.private, gone.kv))

    async def drop_weights(self) -> int:
        """Have the keeper forget the packed weights: bytes."""
        return await self.drop_packed(self.made.key) if self.made is not None else 0

    async def drop_packed(self, key: str) -> int:
        keeper, nbytes = self.cluster.keeper, self.cluster.packed.get(key)
        if keeper is None or nbytes is None:
            return 0
        try:
            return await keeper.drop(key)
        except KeeperDied:  # and its memory has gone with it
            return nbytes

    async def close(self) -> None:
        """Whoever waits hears that. The cluster has ended before."""
        self.closed = True
        self.failure = self.failure or UserError("the server is shutting down")
        if self.je is not None:
            self.je.give_up("the server is shutting down")
            await self.je.placing.knowledge.close(self.id)
        own = (self.describing, self.tokenizing, self.waking, self.autoscaler.task)
        tasks = [*(task for task in own if task is not None), *self.leaving, *self.errands]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.slots.clear()
        self.changed()

    # ---- what can be seen -------------------------------------------------------------------------------------------
    def shown(self) -> dict[str, Any]:
        """As GET /v1/admin/scale shows it."""
        bounds = {role: self.autoscaler.bounds(role) for role in self.wanted}
        return {
            "id": self.id,
            "state": self.state,
            "te_ready": len(self.takers()),
            "te_wanted": self.wanted,
            "te_min": {role: b.min_te for role, b in bounds.items()},
            "te_max": {role: b.max_te for role, b in bounds.items()},
            "keep_alive": self.asked.keep_alive,
            "weights_bytes": self.made.weight_bytes if self.made is not None else None,
            "footprint_bytes": self.footprint,
            "held": self.held,
            "idle_s": round(self.idle_s, 3),
            "reason": str(self.failure) if self.failure is not None else self.autoscaler.reason or None,
        }


def stamp(path: str | Path) -> str:
    """What tells a model's files from others that take their place: names, sizes, times of change. "": there are none."""
    path = Path(path)
    try:
        read = sorted(file for file in path.iterdir() if file.suffix in READ) if path.is_dir() else [path]
        files = [(file.name, file.stat()) for file in read]
    except OSError:
        return ""
    said = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in files)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def make_plan(path: Path, stamp: str, asked: Config, box: capacity.Machine | None = None) -> tuple[ladder.Plan, dict[str, str]]:
    """What a TE of this model is on this machine, with the Config resolved, and why its values are so. Reads no weights."""
    checkpoint = weights.open_checkpoint(path)
    model = models.build(checkpoint.config)
    name, _ = devices.choose(asked.device)
    if box is None:
        box = capacity.machine(kernels=not devices.kind(name).own_memory)
    packing = capacity.packing(asked, box)
    size = weights.packed_size(checkpoint, model.weights(), packing)
    config, why = capacity.resolve(asked, model, size, box)
    key = f"{path}:{stamp}:{packing.dtype}:{packing.format}:{packing.quantization}"
    te_bytes = capacity.process_bytes(packing.format == "panels") * max(ranks(config)) + (config.kv_cache_memory_bytes or 0)
    return ladder.Plan(key, packing, str(path), config, size, te_bytes), why
