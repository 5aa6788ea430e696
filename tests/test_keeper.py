"""The keeper and the processes that come from it: real ones, of tiny models."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import capacity, models, weights
from engine.config import Config, Seat
from engine.types import (
    BlockNews,
    Failed,
    FromWorker,
    Memory,
    Packing,
    Ready,
    Sample,
    SamplingParams,
    Start,
    Stop,
    Tokens,
    UserError,
    WeightSource,
    pack_ids,
)
from scale.keeper import Keeper
from scale.keeper_client import KeeperClient, KeeperDied, NothingPacked
from scale.warm import Process
from sched.link import LocalLink
from tests import tiny
from tests.server import ROOT, alive, wait_until

PATIENCE = 20.0
PROMPT = list(range(40, 70))


class TE:
    """A TE, from the control process's side."""

    def __init__(self, te: int):
        self.te = te
        self.ended = asyncio.Event()
        self.messages: asyncio.Queue[FromWorker] = asyncio.Queue()
        self.link = LocalLink(self.messages.put_nowait, self.died)
        self.pid = 0
        self.how = ""

    def died(self) -> None:
        self.ended.set()
        self.messages.put_nowait(Failed("died"))

    async def hear(self) -> FromWorker:
        while isinstance(said := await asyncio.wait_for(self.messages.get(), PATIENCE), BlockNews):
            pass  # of its cache
        return said

    async def ready(self) -> Ready:
        said = await self.hear()
        assert isinstance(said, Ready), said
        return said

    async def text(self, count: int = 12) -> array[int]:
        """What it goes on with, greedily."""
        greedy = SamplingParams(temperature=0.0, max_tokens=count)
        self.link.send(Start(1, pack_ids(PROMPT), [Sample(0, b"", 0)], greedy, max_tokens=count, stop_ids=[]))
        ids = array("i")
        while len(ids) < count:
            said = await self.hear()
            assert isinstance(said, Tokens), said
            ids.extend(said.ids)
        return ids

    async def end(self) -> None:
        self.link.send(Stop())
        await asyncio.wait_for(self.ended.wait(), PATIENCE)
        self.link.close()


class Rig:
    """A keeper and its client, on a loop of their own."""

    def __init__(self, model: Path, runner: asyncio.Runner, preload: Sequence[tuple[str, Any]] = ()):
        self.path = str(model)
        self.runner = runner
        self.exits: dict[int, int] = {}  # pid -> status
        self.exited = asyncio.Event()
        asked = Config(model=self.path, kv_cache_memory_bytes=1 << 20)
        checkpoint = weights.open_checkpoint(model)
        built, box = models.build(checkpoint.config), capacity.machine()
        self.packing: Packing = capacity.packing(asked, box)
        self.config, _ = capacity.resolve(asked, built, weights.packed_size(checkpoint, built.weights(), self.packing), box)
        self.client = self.run(self.start(preload))

    async def start(self, preload: Sequence[tuple[str, Any]]) -> KeeperClient:
        return KeeperClient(self.hear_exit, preload)

    def run(self, work: Any) -> Any:
        return self.runner.run(asyncio.wait_for(work, PATIENCE))

    async def pack(self, key: str = "tiny", on_progress: Callable[[int, int], None] | None = None) -> int:
        await self.client.order_pack(key, self.path, self.packing, "cpu", on_progress)
        await self.client.warm
        return (await self.client.packed(key)).nbytes

    async def spawn(
        self, te: int, *, key: str = "tiny", ranks: int = 1, sources: Sequence[WeightSource] = (), without: Sequence[str] = ()
    ) -> TE:
        made = TE(te)
        config = msgspec.structs.replace(self.config, scale_without=list(without))
        try:
            spawned, pidfd = await self.client.spawn(
                te, key, config, 1, made.link.rings, Seat("colocated"), ranks, te, False, False, None, sources
            )
        except BaseException:
            made.link.close()
            raise
        assert spawned.te == te
        made.link.watch(pidfd)
        made.pid, made.how = spawned.pid, spawned.how
        return made

    async def exit_of(self, pid: int) -> int:
        while pid not in self.exits:
            self.exited.clear()
            await self.exited.wait()
        return self.exits[pid]

    def hear_exit(self, te: int, pid: int, status: int) -> None:
        self.exits[pid] = status
        self.exited.set()

    async def pool(self, size: int) -> None:
        """Have so many warm processes, and wait until there are."""
        await self.client.pool(size)
        await until(f"{size} warm processes", lambda: len(waiting(self.client.pid)) == size)

    def close(self) -> None:
        self.run(self.client.close())


async def until(what: str, condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, what, condition, PATIENCE)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def waiting(keeper: int) -> list[int]:
    """Its warm processes."""
    found = []
    for pid in children(keeper):
        with contextlib.suppress(FileNotFoundError):
            if name_of(pid) == "deepserve-warm":
                found.append(pid)
    return found


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by kind."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
        if int(fd) > 2:
            kinds[re.sub(r"\[\d+\]", "", target.split(" ")[0])] += 1
    return kinds


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def rig(model, runner) -> Iterator[Rig]:
    """A keeper with a packed model, for tests that leave it as it was."""
    made = Rig(model, runner)
    assert made.run(made.pack()) == made.client.packed_keys["tiny"]
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(rig) -> array[int]:
    """The text of a TE by the plain way."""

    async def one() -> array[int]:
        te = await rig.spawn(0, without=["warm", "fork"])
        ready = await te.ready()
        assert (ready.path, ready.source, ready.fell, ready.mapped) == ("dram", -1, [], False)
        text = await te.text()
        await te.end()
        return text

    return rig.run(one())


# ---- ways to a process and to weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "without", "how"),
    [(0, [], "fork"), (3, [], "warm"), (3, ["warm"], "fork"), (3, ["keeper"], "exec"), (0, ["lazy-kv", "fork"], "fork")],
    ids=["forked at demand", "warm", "without warm ones", "without keeper", "nothing shared or lazy"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_way_to_a_process_gives_the_same_text(rig, expected, pool, without, how, ranks):
    async def one() -> None:
        await rig.pool(pool)
        te = await rig.spawn(5, ranks=ranks, without=without)
        assert te.how == how
        assert (await te.ready()).path == "dram"
        assert await te.text() == expected
        assert name_of(te.pid) == "deepserve-te5"
        await te.end()
        assert await rig.exit_of(te.pid) == 0

    rig.run(one())
    rig.run(rig.pool(0))


def mappings(pid: int) -> int:
    """Of packed weights."""
    return Path(f"/proc/{pid}/maps").read_text().count("deepserve-weights")


def test_weights_are_shared_but_without_fork(rig):
    async def one() -> None:
        shared, copied = await rig.spawn(1), await rig.spawn(2, without=["fork"])
        await shared.ready()
        await copied.ready()
        assert [mappings(te.pid) for te in (shared, copied)] == [1, 0]
        for te in (shared, copied):
            await te.end()

    rig.run(one())


def test_weights_from_a_running_te_and_what_comes_after_it(model, runner, rig, expected):
    """A source that lives, one that died, one whose descriptor is another file; then the DRAM store; then nothing."""

    async def source() -> tuple[TE, WeightSource]:
        te = await rig.spawn(3)
        found = (await te.ready()).weights
        assert found is not None and found.te == 3
        return te, found

    te, live = rig.run(source())
    dead = WeightSource(7, Memory(1 << 22, 3, 1, 1), live.slabs)
    (slab,) = live.slabs
    other = WeightSource(8, live.description, [msgspec.structs.replace(slab, inode=slab.inode + 1)])

    async def forked(on: Rig, sources: list[WeightSource], path: str, number: int, fell: int) -> None:
        new = await on.spawn(9, sources=sources)
        ready = await new.ready()
        assert (ready.path, ready.source, len(ready.fell)) == (path, number, fell), ready
        if fell:
            assert "TE 7" in ready.fell[0] and "gone" in ready.fell[0]
        assert await new.text() == expected
        assert ready.weights is not None and ready.weights.te == 9
        await new.end()

    rig.run(forked(rig, [live], "fork", 3, 0))
    rig.run(forked(rig, [dead, other, live], "fork", 3, 2))
    rig.run(forked(rig, [dead, other], "dram", -1, 2))

    # A keeper that has packed nothing, as after a keeper's death.
    new = Rig(model, runner, [("cpu", "panels")])
    new.run(new.client.warm)
    new.run(forked(new, [dead, live], "fork", 3, 1))
    assert new.client.packed_keys == {}
    with pytest.raises(NothingPacked, match=r"TE 7.*gone.*; no packed weights are in memory"):
        new.run(new.spawn(1, sources=[dead]))

    async def child_outlives_source() -> None:
        last = await new.spawn(4, sources=[live])
        await last.ready()
        os.kill(te.pid, signal.SIGKILL)
        await te.ended.wait()
        assert await last.text() == expected, "what it has mapped stays"
        with pytest.raises(NothingPacked, match="TE 3"):
            await new.spawn(5, sources=[live])
        await last.end()

    new.run(child_outlives_source())
    te.link.close()
    new.close()


# ---- the DRAM store ---------------------------------------------------------------------------------------------------


def test_packing_tells_how_far_it_is_and_dropping_what_it_frees(model, runner):
    told: list[tuple[int, int]] = []
    rig = Rig(model, runner)

    async def run() -> None:
        nbytes = await rig.pack(on_progress=lambda done, total: told.append((done, total)))
        assert told and told[-1][0] == told[-1][1] > 0 and told == sorted(told)
        assert rig.client.packed_keys == {"tiny": nbytes}
        te = await rig.spawn(0)
        await te.ready()
        await until("the packing process's end", lambda: len(children(rig.client.pid)) == 1)
        before = sum(descriptors(rig.client.pid).values())
        freed = await rig.client.drop("tiny")
        assert nbytes <= freed < nbytes + (64 << 10), "the slab, and its description"
        assert rig.client.packed_keys == {} and sum(descriptors(rig.client.pid).values()) == before - 2
        assert len(await te.text()) == 12, "who has mapped them keeps them"
        assert await rig.client.drop("tiny") == 0 == await rig.client.drop("never")
        with pytest.raises(NothingPacked):
            await rig.spawn(1)
        assert await rig.pack() == nbytes, "packed anew"
        await te.end()

    rig.run(run())
    rig.close()


def test_dropping_lets_kv_blocks_in_memory_go_with_the_last_te(model, runner):
    rig = Rig(model, runner)
    rig.config = msgspec.structs.replace(rig.config, kv_dram_bytes=1 << 20)

    async def run() -> None:
        await rig.pack()
        await until("the packing process's end", lambda: not children(rig.client.pid))
        before = descriptors(rig.client.pid)
        te = await rig.spawn(0)
        await te.ready()
        assert descriptors(rig.client.pid)["/memfd:deepserve-kv-pool"] == 2, "one of them is its mapping's"
        await rig.client.drop("tiny")
        assert descriptors(rig.client.pid)["/memfd:deepserve-kv-pool"] == 2
        await te.end()
        await until("the pool's end", lambda: descriptors(rig.client.pid).total() == before.total() - 2)

    rig.run(run())
    rig.close()


def test_a_te_waits_for_weights_that_are_being_packed(model, runner):
    rig = Rig(model, runner)

    async def run() -> None:
        await rig.client.order_pack("tiny", rig.path, rig.packing)
        te = await rig.spawn(0)
        assert (await te.ready()).path == "disk"
        await te.end()

    rig.run(run())
    rig.close()


def test_without_dram_every_te_packs_for_itself(rig, expected):
    async def run() -> None:
        await rig.pack("own")
        tes = await asyncio.gather(*(rig.spawn(te, key="own", without=["dram", "fork"]) for te in range(3)))
        assert sorted([(await te.ready()).path for te in tes]) == ["disk", "disk", "dram"]
        assert "own" not in rig.client.packed_keys
        assert [await te.text() for te in tes] == [expected] * 3
        for te in tes:
            await te.end()
        await rig.client.drop("own")

    rig.run(run())


def test_a_packing_process_that_dies_and_one_that_can_not(model, runner, tmp_path):
    # Large enough to be caught at it.
    large = tiny.make(tmp_path / "large", num_hidden_layers=8, hidden_size=512, head_dim=64, intermediate_size=2048)
    rig = Rig(model, runner)

    async def run() -> None:
        await rig.client.warm
        rig.path = str(large)
        packs = [asyncio.ensure_future(rig.pack("large")), asyncio.ensure_future(rig.spawn(1, key="large"))]
        await until("it packs", lambda: children(rig.client.pid))
        os.kill(children(rig.client.pid)[0], signal.SIGKILL)
        with pytest.raises(KeeperDied, match="status -9"):
            await packs[0]
        with pytest.raises(NothingPacked, match="status -9"):
            await packs[1]
        with pytest.raises(NothingPacked, match="status -9"):
            await rig.spawn(2, key="large")
        assert await rig.pack("large") > 16 << 20, "another try does it"
        rig.path = str(tmp_path / "none")
        with pytest.raises(UserError, match="none") as e:
            await rig.pack("none")
        assert e.value.param == "model"
        with pytest.raises(UserError, match="none"):
            await rig.spawn(2, key="none")
        # Dropped in the middle: nobody hears of what the child would say.
        rig.path = str(large)
        again = asyncio.ensure_future(rig.pack("again"))
        await until("it packs", lambda: children(rig.client.pid))
        assert await rig.client.drop("again") == 0
        with pytest.raises(KeeperDied, match="dropped"):
            await again
        assert await rig.pack("again") > 16 << 20

    rig.run(run())
    rig.close()


# ---- processes that die ------------------------------------------------------------------------------------------------


def test_a_warm_process_that_dies_is_missed_by_nobody(rig, expected):
    async def run() -> None:
        await rig.pool(2)
        first, second = waiting(rig.client.pid)
        os.kill(rig.client.pid, signal.SIGSTOP)  # so that it is told of their death and asked for a TE at once
        for pid in (first, second):
            os.kill(pid, signal.SIGKILL)
        await until("their end, with their watch threads", lambda: not any(alive(p) or threads(p) > 1 for p in (first, second)))
        asking = asyncio.ensure_future(rig.spawn(0))
        await asyncio.sleep(0)
        os.kill(rig.client.pid, signal.SIGCONT)
        te = await asking
        await te.ready()
        assert await te.text() == expected and te.pid not in (first, second)
        assert not rig.exits.keys() & {first, second}, "they were no TEs"
        await te.end()
        await rig.pool(2)
        assert not {first, second}.intersection(waiting(rig.client.pid))
        await rig.pool(1)
        await rig.pool(0)

    rig.run(run())


def test_a_te_killed_at_birth_is_told_of(rig):
    async def run() -> None:
        await rig.pool(1)
        (pid,) = waiting(rig.client.pid)
        os.kill(pid, signal.SIGSTOP)  # it never takes in what it is told to be
        te = await rig.spawn(6, ranks=2)
        assert te.how == "fork" and te.pid != pid, "the warm one is the rank"
        os.kill(te.pid, signal.SIGKILL)
        assert await rig.exit_of(te.pid) == -signal.SIGKILL
        await until("the rank's end", lambda: not alive(pid))
        te.link.close()
        await rig.pool(0)

    rig.run(run())


@pytest.mark.parametrize("victim", ["master", "rank"])
def test_no_rank_outlives_another(rig, victim):
    async def run() -> None:
        te = await rig.spawn(6, ranks=2)
        await te.ready()
        (rank,) = [pid for pid in children(rig.client.pid) if pid != te.pid]
        assert name_of(rank) == "deepserve-te6.1"
        os.kill(te.pid if victim == "master" else rank, signal.SIGKILL)
        await asyncio.wait_for(te.ended.wait(), PATIENCE)
        await until("the end of both", lambda: not alive(rank) and not alive(te.pid))
        te.link.close()

    rig.run(run())


def test_whoever_asks_no_more_gets_no_te(rig):
    async def run() -> None:
        before = set(children(rig.client.pid))
        asking = asyncio.ensure_future(rig.spawn(1))
        await asyncio.sleep(0)
        asking.cancel()
        te = await rig.spawn(1)  # of the same number
        await te.ready()
        await te.end()
        await until("the end of both", lambda: not set(children(rig.client.pid)) - before)

    rig.run(run())


def test_fifty_tes_leave_nothing_behind(rig):
    """Killed in any state, some as a master with a rank: the keeper has open afterwards what it had before."""

    async def run() -> None:
        await rig.pool(2)
        before = descriptors(rig.client.pid)
        for turn in range(5):
            tes = await asyncio.gather(*(rig.spawn(te, ranks=1 + (te % 5 == 4)) for te in range(10)))
            for te in tes[: 2 * turn]:
                await te.ready()
            for te in tes:
                te.link.close()  # which kills it
            for te in tes:
                await rig.exit_of(te.pid)
        await until("no child but the warm ones", lambda: len(children(rig.client.pid)) == 2)
        await until("as many descriptors as before", lambda: descriptors(rig.client.pid) == before)
        await rig.pool(0)

    rig.run(run())


def test_warm_processes_on_an_accelerator_open_the_devices_that_nobody_has():
    """On this machine it is fake: which devices the pool would open."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control = os.pidfd_open(os.getpid())
    keeper = Keeper(ours, control)
    keeper.resize(3)
    assert keeper.short() and keeper.free_device() == -1, "on the host there are none to open"
    keeper.accelerator = "npu"
    keeper.taken = {100: 0, 101: 2}
    opened = []
    while keeper.short():
        opened.append(keeper.free_device())
        keeper.pool.append(Process(-1, -1, theirs, opened[-1]))
    assert opened == [1, 3, 4]
    keeper.resize(1)
    assert [process.index for process in keeper.pool] == [1]
    keeper.devices = 3  # the fourth could not be opened
    keeper.resize(3)
    assert not keeper.short(), "there is none left"
    del keeper.taken[101]
    assert keeper.short() and keeper.free_device() == 2
    keeper.selector.close()
    for end in (ours, theirs):
        end.close()
    os.close(control)


# ---- what a child inherits ----------------------------------------------------------------------------------------------


def test_the_keeper_has_one_thread_and_a_te_its_own_descriptors(rig):
    async def run() -> None:
        te, other = await rig.spawn(0), await rig.spawn(1)
        await te.ready()
        await other.ready()
        assert threads(rig.client.pid) == 1
        found = descriptors(te.pid)
        assert found.pop("anon_inode:[pidfd]") == 1, "of the control process, which it ends with"
        assert found.pop("anon_inode:[eventfd]") == 4, "its queues' bells"
        memfds = {name: found.pop(name) for name in list(found) if name.startswith("/memfd:deepserve-")}
        assert sum(memfds.values()) == 3, "KV cache, weights, and what they are"
        assert not found, "no socket or pipe, and nothing of the keeper's"
        for one in (te, other):
            await one.end()

    rig.run(run())


def test_random_numbers_of_two_children_differ():
    code = """
import os, random, sys
import numpy.random
from scale import warm

control = os.pidfd_open(os.getpid())
reading, writing = os.pipe()

def work():
    os.write(writing, f"{random.random()} {numpy.random.random()}\\n".encode())
    return 0

for _ in range(2):
    pid = os.fork()
    if pid == 0:
        warm.in_child("child", control, [writing], work)
    os.waitpid(pid, 0)
os.close(writing)
sys.stdout.write(os.fdopen(reading).read())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    values = done.stdout.split()
    assert len(set(values)) == 4, values


# ---- ends ----------------------------------------------------------------------------------------------------------------


def test_a_torn_socket_ends_the_keeper_and_all_that_came_of_it(model, runner):
    rig = Rig(model, runner)

    async def run() -> list[int]:
        await rig.pack()
        await rig.pool(2)
        te = await rig.spawn(0)
        await te.ready()
        await rig.pool(2)
        return [rig.client.pid, te.pid, *waiting(rig.client.pid)]

    pids = rig.run(run())
    assert len(set(pids)) == 4
    rig.close()
    wait_until("all have ended", lambda: not any(map(alive, pids)), 5.0)


def test_a_killed_keeper_leaves_tes_but_no_warm_process(model, runner, expected):
    rig = Rig(model, runner)

    async def run() -> None:
        await rig.pack()
        await rig.pool(2)
        te = await rig.spawn(0)
        await te.ready()
        warm = waiting(rig.client.pid)
        asking = asyncio.ensure_future(rig.spawn(1, key="never packed"))
        os.kill(rig.client.pid, signal.SIGKILL)
        with pytest.raises((KeeperDied, NothingPacked)):
            await asking
        await rig.client.gone.wait()
        with pytest.raises(KeeperDied):
            await rig.client.pool(1)
        await until("the end of warm ones", lambda: not any(map(alive, warm)))
        assert await te.text() == expected
        await te.end()

    rig.run(run())
    rig.close()
