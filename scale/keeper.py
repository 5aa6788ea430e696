"""The keeper: the zygote process that task executors come from, and the owner of the packed weights.

It imports the engine once, touches no device, starts no thread, and so can fork at any moment: a TE begins life with its code
loaded. Some processes it forks ahead of need (scale/warm.py); what one becomes is told to it by a message with descriptors.
Weights are packed by a short-lived child into memfds that this process holds, the DRAM store, or are those of a running TE: every
TE maps the same pages. Nothing here waits for a TE. When the keeper dies, live TEs go on with their own mappings, and the next
keeper takes weights from them. It leaves when its socket closes or the control process dies.

Runs as `python -c "from scale.keeper import main; main(socket_fd, control_pidfd, preload)"`; the other end is
`scale/keeper_client.py`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Collection, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Literal

import msgspec

from engine import native
from engine.config import Config, Seat, has_tiers
from engine.types import LoadPath, Memory, Packing, UserError, WeightFormat, WeightSource
from scale import warm
from scale.warm import How, Process, in_child

if TYPE_CHECKING:  # importing it takes time that packing can have
    from engine.worker import Birth
    from scale.tiers import TierHost


class Msg(msgspec.Struct, tag=True, array_like=True):
    pass


class Pack(Msg):
    """Have the checkpoint at `path` packed, under `key`."""

    key: str
    path: str
    packing: Packing
    device: str = "cpu"


class Drop(Msg):
    """Forget the packed weights of `key`, and the KV blocks kept in memory for it. TEs keep what they map."""

    key: str


class Spawn(Msg):
    """Make a TE of the model `key`. Carries the descriptors of both rings: inbox, then outbox, three each."""

    number: int  # of this order, for the answer
    te: int
    key: str  # need not be packed where a source works
    config: Config
    threads: int
    seat: Seat
    ranks: int
    index: int  # of its first rank, among the cores or devices of the box
    reachable: bool  # other TEs may use its KV pool
    lends: bool  # ... and one computes in it
    lender: Memory | None  # whose KV pool it computes in
    sources: list[WeightSource]  # running TEs of the same model, the best first


class Pool(Msg):
    """Keep so many processes ready."""

    size: int


ToKeeper = Pack | Drop | Spawn | Pool


class Warm(Msg):
    """The engine is imported."""

    pid: int
    seconds: float


class PackProgress(Msg):
    """Bytes of tensors written, at most some ten times a second."""

    key: str
    done: int
    total: int


class Packed(Msg):
    key: str
    nbytes: int
    seconds: float


class PackFailed(Msg):
    """`killed`: another try may do it; else it would end the same."""

    key: str
    why: str
    param: str | None
    killed: bool = False


class Dropped(Msg):
    key: str
    nbytes: int  # that were really allocated


class Spawned(Msg):
    """There is a process, told what it is. Carries the TE's pidfd."""

    number: int
    te: int
    pid: int
    seconds: float  # that this took
    how: How
    waited: float  # seconds before, for weights that were packed


class SpawnFailed(Msg):
    """What a TE would need can't be made, and another try would end the same; but with `retry` once the model is packed."""

    number: int
    te: int
    why: str
    param: str | None
    retry: Literal["", "disk"] = ""


class Exited(Msg):
    """A TE's exit status as `os.waitstatus_to_exitcode` gives it (negative: the signal that killed it)."""

    te: int
    pid: int
    status: int


FromKeeper = Warm | PackProgress | Packed | PackFailed | Dropped | Spawned | SpawnFailed | Exited

RING_FDS = 6  # of a Spawn: two rings of three descriptors
MAX_MESSAGE = 128 << 10
# What every TE will need, in pieces that take some tens of milliseconds to import; what packing needs comes first. Nothing here
# may start a thread or touch a device: a TE does, once it is forked.
ENGINE = ("numpy", "engine.weights", "engine.models.llama", "engine.devices", "engine.core", "engine.worker")
REST = 1.0  # seconds without a new warm process after one that died before its time: the next may die as well
LULL = 1.0  # ... and after a TE was asked for: what starts has the cores first


class Model(msgspec.Struct):
    """What is held of a model."""

    order: Pack
    slabs: list[int]
    description: int  # memfd: weights.Description
    state: Literal["packing", "packed", "failed", "forgotten", "dropped"] = "packing"
    failed: PackFailed | None = None
    packer: int = 0  # pid
    waiting: list[tuple[Spawn, list[int], float]] = []  # with their descriptors, and since when

    def close(self) -> int:
        """Let the weights go: how many bytes were allocated."""
        fds = [*self.slabs, self.description]
        nbytes = sum(os.fstat(fd).st_blocks * 512 for fd in fds)
        close_all(fds)
        return nbytes


class Loaded(msgspec.Struct):
    """Where a TE finds its weights."""

    path: LoadPath
    description: int
    slabs: list[int]  # none where only the TE itself can reach them
    source: int = -1
    sources: list[WeightSource] = []  # ... at these
    opened: list[int] = []  # of these descriptors, those that are closed once the TE has them
    fell: list[str] = []


class Keeper:
    def __init__(self, sock: socket.socket, control: int):
        self.sock = sock
        self.control = control
        self.models: dict[str, Model] = {}
        self.tiers: dict[str, TierHost] = {}  # by key, made for a model's first TE that wants one
        self.selector = selectors.DefaultSelector()
        self.selector.register(sock, selectors.EVENT_READ, self.receive)
        self.selector.register(control, selectors.EVENT_READ, self.leave)
        self.decoder = msgspec.msgpack.Decoder(ToKeeper)
        self.encoder = msgspec.msgpack.Encoder()
        self.children: set[int] = set()  # not yet reaped
        self.pool: list[Process] = []  # that wait for their Birth
        self.pool_size = 0
        self.resting = 0.0  # until this time no process is forked ahead
        self.accelerator = ""  # on which processes of the pool open a device each
        self.taken: dict[int, int] = {}  # pid of one of a TE's processes -> its index
        self.devices = 1 << 30  # fewer once one could not be opened
        self.preloaded: set[tuple[str, WeightFormat]] | None = None  # for which the code is loaded; None: the engine isn't yet
        self.leaving = False

    def run(self, preload: Collection[tuple[str, WeightFormat]]) -> None:
        """An order to pack that comes while this process still imports the engine isn't kept waiting: that runs on another
        core."""
        started = time.monotonic()
        for module in ENGINE:
            self.turn(0.0)
            importlib.import_module(module)
        self.turn(0.0)
        self.preloaded = set()
        for device, format in sorted({*preload, *((m.order.device, m.order.packing.format) for m in self.models.values())}):
            self.preload(device, format)
        self.tell(Warm(os.getpid(), time.monotonic() - started))
        while not self.leaving:
            if not self.short():
                self.turn(None)
            elif not self.turn(max(0.0, self.resting - time.monotonic())) and time.monotonic() >= self.resting:
                self.fork_ahead()  # only now, when nothing else waits
        # The control process has closed the socket or is gone: nobody will ever own what still runs.
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)

    def turn(self, timeout: float | None) -> bool:
        """Wait for something to do and do it; False where nothing came."""
        events = self.selector.select(timeout)
        for key, _ in events:
            key.data()
        return bool(events)

    def leave(self) -> None:
        self.leaving = True

    def tell(self, message: FromKeeper, fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self.sock, [self.encoder.encode(message)], fds)
        except (BrokenPipeError, ConnectionResetError):
            self.leaving = True

    def receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE, RING_FDS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self.leaving = True
            return
        message = self.decoder.decode(data)
        if isinstance(message, Pack):
            self.pack(message)
        elif isinstance(message, Drop):
            self.drop(message.key)
        elif isinstance(message, Pool):
            self.resize(message.size)
        else:
            self.spawn(message, fds)

    def preload(self, device: str, format: WeightFormat) -> None:
        from engine import devices

        assert self.preloaded is not None
        if (device, format) not in self.preloaded:
            self.preloaded.add((device, format))
            devices.preload(device, format)
            if devices.kind(device).own_memory:
                self.accelerator = device
            size = self.pool_size
            self.resize(0)  # these don't have it
            self.resize(size)

    # ---- packing ----------------------------------------------------------------------------------------------------
    def pack(self, order: Pack) -> None:
        """Fork a child that packs into memfds of ours, and tells how far it is."""
        assert order.key not in self.models or self.models[order.key].state in ("failed", "forgotten"), order.key
        name = f"deepserve-weights-{os.path.basename(order.path)}"
        slab, description = (os.memfd_create(name, os.MFD_CLOEXEC) for _ in range(2))
        model = self.models[order.key] = Model(order, [slab], description)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        started = time.monotonic()
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            fds = [slab, description, theirs.fileno()]
            in_child("deepserve-pack", self.control, fds, lambda: pack_into(order, slab, description, theirs))
        self.children.add(pid)
        model.packer = pid
        theirs.close()
        self.selector.register(ours, selectors.EVENT_READ, partial(self.hear, model, ours, started))
        if self.preloaded is not None:  # or every TE would import it: better once, while its weights are packed
            self.preload(order.device, order.packing.format)

    def hear(self, model: Model, ours: socket.socket, started: float) -> None:
        """What the packing child says; nothing more: it has ended."""
        try:
            data = ours.recv(MAX_MESSAGE)
        except ConnectionResetError:
            data = b""
        if not data:
            self.selector.unregister(ours)
            ours.close()
            self.packer_ended(model)
            return
        said = msgspec.msgpack.decode(data, type=PackProgress | Packed | PackFailed)
        if model.state == "dropped":
            return
        if isinstance(said, PackFailed):
            model.failed = said  # told when its process has ended
            return
        if isinstance(said, Packed):
            said.seconds = time.monotonic() - started
            model.state = "packed"
        self.tell(said)
        if model.state == "packed":
            self.go_on(model)

    def packer_ended(self, model: Model) -> None:
        _, status = os.waitpid(model.packer, 0)
        self.children.discard(model.packer)
        if model.state == "dropped":
            model.close()
        elif model.state == "packing":
            code = os.waitstatus_to_exitcode(status)
            why = f"the packing process ended with status {code}; `dmesg` tells whether memory was short"
            model.state, model.failed = "failed", model.failed or PackFailed(model.order.key, why, None, killed=code < 0)
            model.close()
            self.tell(model.failed)
            self.go_on(model)

    def go_on(self, model: Model) -> None:
        """With the TEs that have waited for a model."""
        waiting, model.waiting = model.waiting, []
        for order, fds, since in waiting:
            self.spawn(order, fds, since)

    def drop(self, key: str) -> None:
        if (host := self.tiers.pop(key, None)) is not None:
            host.leave()
        model = self.models.pop(key, None)
        nbytes = 0
        if model is not None:
            for order, fds, _ in model.waiting:
                self.refuse(order, fds, f"the weights of {model.order.path} were dropped while they were packed", retry="disk")
            if model.state == "packing":
                model.state = "dropped"
                os.kill(model.packer, signal.SIGKILL)  # once it has ended the memfds are closed
            elif model.state == "packed":
                nbytes = model.close()
        self.tell(Dropped(key, nbytes))

    # ---- TEs --------------------------------------------------------------------------------------------------------
    def spawn(self, order: Spawn, fds: list[int], since: float | None = None) -> None:
        """Make a TE with the best weights that there are, or have it wait until they are packed; `since`: when it began to."""
        loaded, fell = from_running(order)
        model = self.models.get(order.key)
        packed = model is not None and model.state == "packed"
        if loaded is None and model is not None and packed:
            loaded = Loaded("dram" if since is None else "disk", model.description, model.slabs)
        elif loaded is not None and loaded.sources and model is not None and packed:
            loaded.description, loaded.slabs = model.description, model.slabs  # what the TE falls to
        if loaded is not None:
            loaded.fell = fell
            self.give(order, fds, loaded, 0.0 if since is None else time.monotonic() - since)
            close_all(loaded.opened)
            if model is not None and packed and "dram" in order.config.scale_without:
                model.state = "forgotten"
                self.tell(Dropped(order.key, model.close()))
        elif model is None:
            self.refuse(order, fds, "; ".join((*fell, "no packed weights are in memory")), retry="disk")
        elif model.failed is not None:
            self.refuse(order, fds, model.failed.why, model.failed.param, "disk" if model.failed.killed else "")
        else:
            if model.state == "forgotten":
                self.pack(model.order)
            self.models[order.key].waiting.append((order, fds, time.monotonic() if since is None else since))

    def refuse(self, order: Spawn, fds: list[int], why: str, param: str | None = None, retry: Literal["", "disk"] = "") -> None:
        self.tell(SpawnFailed(order.number, order.te, why, param, retry))
        close_all(fds)

    def give(self, order: Spawn, fds: list[int], loaded: Loaded, waited: float) -> None:
        """Make processes a TE: its ranks, then the master, which is told of them and is what the control process knows."""
        from engine import shmq, spmd, worker

        began = time.monotonic()
        try:
            host = self.tiers_of(order, loaded) if order.lender is None else None
        except UserError as e:
            self.refuse(order, fds, str(e), e.param)
            return
        access = host.open(order.te) if host is not None else None
        group = spmd.create(order.ranks) if order.ranks > 1 else None
        inbox, outbox = shmq.RingFds(*fds[:3]), shmq.RingFds(*fds[3:])
        team: list[Process] = []
        how: How = "fork"
        failed = ""
        try:
            for rank in reversed(range(order.ranks)):
                birth = worker.Birth(
                    te=order.te,
                    config=order.config,
                    threads=order.threads,
                    seat=order.seat,
                    ranks=order.ranks,
                    rank=rank,
                    index=order.index + rank,
                    reachable=order.reachable,
                    lends=order.lends,
                    lender=order.lender,
                    began=began,
                    slabs=len(loaded.slabs),
                    path=loaded.path,
                    source=loaded.source,
                    sources=loaded.sources,
                    fell=loaded.fell,
                    tiers=None if rank else access,
                )
                handles = worker.Handles(
                    inbox=group.down[rank - 1] if group is not None and rank else inbox,
                    outbox=group.up[rank - 1] if group is not None and rank else outbox,
                    description=loaded.description,
                    slabs=loaded.slabs,
                    group=group.numbers(rank) if group is not None else [],
                    ranks=[] if rank else [process.pidfd for process in team],
                    tiers=[] if rank or access is None else [fd for fd in (access.socket, access.pool) if fd >= 0],
                )
                process, how = self.born(birth, handles.numbers())
                team.append(process)
        except OSError as e:
            failed = f"TE {order.te}: no process can be made for it: {e.strerror}; `ulimit -u` and free memory bound their number"
        if access is not None:
            os.close(access.socket)
        if group is not None:
            group.close()
        pids = [process.pid for process in team]
        if failed:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.refuse(order, fds, failed)
            return
        close_all(fds)
        for process in team:
            self.selector.modify(process.pidfd, selectors.EVENT_READ, partial(self.exited, process, order.te, pids))
        self.resting = max(self.resting, began + LULL)
        self.tell(Spawned(order.number, order.te, pids[-1], time.monotonic() - began, how, waited), [team[-1].pidfd])

    def tiers_of(self, order: Spawn, loaded: Loaded) -> TierHost | None:
        """What holds a model's DRAM and SSD tiers, made for its first TE. Raises `UserError`."""
        from engine import weights
        from scale import tiers

        if order.key not in self.tiers and has_tiers(order.config):
            description = weights.read_description(loaded.description)
            self.tiers[order.key] = tiers.TierHost(self.selector, description.config, description.manifest, order.config)
        return self.tiers.get(order.key)

    def born(self, birth: Birth, fds: list[int]) -> tuple[Process, How]:
        """A process that is what `birth` says from now on: a warm one, else one forked now, else a fresh interpreter."""
        from engine import devices

        without = birth.config.scale_without
        index = birth.index if devices.kind(birth.config.device).own_memory else -1
        if not {"keeper", "warm"}.intersection(without):
            for process in [one for one in self.pool if one.index == index]:
                self.pool.remove(process)
                if process.give(birth, fds):
                    self.taken[process.pid] = birth.index
                    return process, "warm"
        how: How = "exec" if "keeper" in without else "fork"
        process = self.started(warm.execute(self.control) if how == "exec" else warm.fork(self.control))
        self.taken[process.pid] = birth.index
        process.give(birth, fds)  # one that has died already is told of like any other that dies
        return process, how

    def started(self, process: Process) -> Process:
        self.children.add(process.pid)
        self.selector.register(process.pidfd, selectors.EVENT_READ, partial(self.exited, process))
        return process

    def exited(self, process: Process, te: int = -1, pids: Sequence[int] = ()) -> None:
        """A process has ended that was one of TE `te`, with others, or nobody. The others of a TE end by themselves, but one that
        is stopped can't."""
        self.selector.unregister(process.pidfd)
        os.close(process.pidfd)
        _, status = os.waitpid(process.pid, 0)
        self.children.discard(process.pid)
        self.taken.pop(process.pid, None)
        if process in self.pool:
            self.pool.remove(process)
            process.sock.close()
            self.resting = time.monotonic() + REST
            if process.index >= 0 and os.waitstatus_to_exitcode(status) > 0:
                self.devices = min(self.devices, process.index)
        others = self.children.intersection(pids)
        for other in others:
            os.kill(other, signal.SIGKILL)
        if pids and len(others) == len(pids) - 1:  # the first, on whose account the others end
            self.tell(Exited(te, pids[-1], os.waitstatus_to_exitcode(status)))

    # ---- processes ahead of need ------------------------------------------------------------------------------------
    def resize(self, size: int) -> None:
        """Keep so many from now on; those that are too many leave when their socket closes."""
        self.pool_size = size
        while len(self.pool) > size:
            self.pool.pop().sock.close()

    def free_device(self) -> int:
        """The device that the next process of the pool opens: the lowest that nobody has; -1: none is needed, or left."""
        if not self.accelerator:
            return -1
        used = {*self.taken.values(), *(process.index for process in self.pool)}
        lowest = next(index for index in count() if index not in used)
        return lowest if lowest < self.devices else -1

    def short(self) -> bool:
        return len(self.pool) < self.pool_size and (not self.accelerator or self.free_device() >= 0)

    def fork_ahead(self) -> None:
        try:
            self.pool.append(self.started(warm.fork(self.control, self.accelerator, self.free_device())))
        except OSError:  # no room for it; whoever asks for a TE hears of that
            self.resting = time.monotonic() + REST


def from_running(order: Spawn) -> tuple[Loaded | None, list[str]]:
    """The weights of the first source that lives, opened; and why earlier ones could not be. Those on an accelerator are for the
    TE to reach: it gets them all."""
    from engine.devices.kv_pool import open_memory

    fell: list[str] = []
    found: Loaded | None = None
    for source in order.sources if "fork" not in order.config.scale_without else []:
        slabs = [slab for slab in source.slabs if isinstance(slab, Memory)]
        fds: list[int] = []
        try:
            for memory in (source.description, *slabs):
                fds.append(open_memory(memory, writable=False))
        except UserError as e:
            close_all(fds)
            fell.append(f"the weights of TE {source.te} can't be had: {e}")
            continue
        if found is not None:
            close_all(fds)
            found.sources.append(source)
        elif len(slabs) == len(source.slabs):
            return Loaded("fork", fds[0], fds[1:], source.te, opened=fds), fell
        else:
            found = Loaded("fork", fds[0], [], source.te, [source], fds)
    return found, fell


def pack_into(order: Pack, slab: int, description: int, to: socket.socket) -> int:
    """In the packing child: write the memfds and say how it goes."""
    from engine import models, weights

    def tell(message: PackProgress | Packed | PackFailed) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the keeper died; what is packed dies too
            to.send(msgspec.msgpack.encode(message))

    try:
        checkpoint = weights.open_checkpoint(order.path)
        specs = models.build(checkpoint.config).weights()
        manifest = weights.pack(
            checkpoint, specs, order.packing, slab, lambda done, total: tell(PackProgress(order.key, done, total))
        )
        weights.describe(description, weights.Description(checkpoint.config, manifest))
    except UserError as e:
        tell(PackFailed(order.key, str(e), e.param))
        return 1
    except OSError as e:
        tell(PackFailed(order.key, f"packing {order.path}: {e}", "model"))
        return 1
    tell(Packed(order.key, manifest.nbytes, 0.0))
    return 0


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def main(sock_fd: int, control: int, preload: Collection[tuple[str, WeightFormat]]) -> None:
    """The keeper's whole life. `preload`: the devices and formats of weights whose code is loaded at the start; that of others is
    when they are first packed for. It is torch only where weights are for its operators: that takes longer than the rest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    native.set_process_name("deepserve-keeper")
    for fd in (sock_fd, control):
        os.set_inheritable(fd, False)
    with socket.socket(fileno=sock_fd) as sock:
        Keeper(sock, control).run(preload)
