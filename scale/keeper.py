"""The keeper: the zygote process that task executors are forked from, and the owner of the packed weights.

It imports the engine once, touches no device, starts no thread, and so can fork at any moment: a TE begins life with
its code loaded. Weights are packed by a short-lived child into memfds that this process holds; every TE maps the same
pages. When the keeper dies, live TEs go on (they hold their own mappings); a new keeper packs again. It leaves when its
socket closes or the control process dies.

Runs as `python -c "from scale.keeper import main; main(socket_fd, control_pidfd)"`; the other end is `scale/keeper_client.py`.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from engine import native
from engine.config import Config, has_tiers
from engine.config import ranks as ranks_of
from engine.types import Memory, Packing, UserError, WeightFormat

if TYPE_CHECKING:  # importing it takes time that packing can have
    from engine.rtc.tiers import Access
    from engine.spmd import Group
    from scale.tiers import TierHost


class Msg(msgspec.Struct, tag=True, array_like=True):
    pass


class Pack(Msg):
    """Have the checkpoint at `path` packed, under `key`."""

    key: str
    path: str
    packing: Packing
    device: str = "cpu"


class Spawn(Msg):
    """Fork a TE on packed model `key`. Carries the descriptors of both rings: inbox, then outbox, three each."""

    te: int
    key: str
    config: Config
    threads: int
    lender: Memory | None = None  # whose KV pool it computes in


ToKeeper = Pack | Spawn


class Warm(Msg):
    """The engine is imported."""

    pid: int
    seconds: float


class Packed(Msg):
    key: str
    nbytes: int
    seconds: float


class PackFailed(Msg):
    key: str
    why: str
    param: str | None


class Spawned(Msg):
    """Carries the TE's pidfd."""

    te: int
    pid: int
    seconds: float  # of the fork itself


class SpawnFailed(Msg):
    """What a TE would need can't be made; another try would end the same."""

    te: int
    why: str
    param: str | None


class Exited(Msg):
    """A TE's exit status as `os.waitstatus_to_exitcode` gives it (negative: the signal that killed it)."""

    te: int
    pid: int
    status: int


FromKeeper = Warm | Packed | PackFailed | Spawned | SpawnFailed | Exited

RING_FDS = 6  # of a Spawn: two rings of three descriptors
MAX_MESSAGE = 64 << 10


class Model(msgspec.Struct):
    """A packed model: what a TE needs to map it."""

    slabs: list[int]
    manifest: Any = None  # engine.weights.Manifest once packed
    config: dict[str, Any] = {}
    tiers: Any = None  # scale.tiers.TierHost once a TE was forked that wants one
    failed: PackFailed | None = None
    waiting: list[tuple[Spawn, list[int]]] = []


class Keeper:
    def __init__(self, sock: socket.socket, control: int):
        self.sock = sock
        self.control = control
        self.models: dict[str, Model] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(sock, selectors.EVENT_READ, self.receive)
        self.selector.register(control, selectors.EVENT_READ, self.leave)
        self.decoder = msgspec.msgpack.Decoder(ToKeeper)
        self.encoder = msgspec.msgpack.Encoder()
        self.orders: list[Pack] = []
        self.children: set[int] = set()  # not yet reaped
        self.leaving = False

    def run(self) -> None:
        """The first order is to pack, so that this runs on one core while this process imports the engine on another."""
        self.turn(None)
        started = time.monotonic()
        warm_up({(order.device, order.packing.format) for order in self.orders})
        self.tell(Warm(os.getpid(), time.monotonic() - started))
        while not self.leaving:
            self.turn(None)
        # The control process has closed the socket or is gone: nobody will ever own what still runs.
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)

    def turn(self, timeout: float | None) -> None:
        for key, _ in self.selector.select(timeout):
            key.data()

    def leave(self) -> None:
        self.leaving = True

    def tell(self, message: FromKeeper, fds: list[int] | None = None) -> None:
        try:
            socket.send_fds(self.sock, [self.encoder.encode(message)], fds or [])
        except (BrokenPipeError, ConnectionResetError):
            self.leaving = True

    def receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE, RING_FDS)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self.leaving = True
            return
        message = self.decoder.decode(data)
        if isinstance(message, Pack):
            self.pack(message)
        else:
            model = self.models[message.key]
            if model.failed is not None:
                self.tell(model.failed)
            elif model.manifest is None:
                model.waiting.append((message, fds))
            else:
                self.spawn(message, fds, model)

    # ---- packing ----------------------------------------------------------------------------------------------------
    def pack(self, order: Pack) -> None:
        """Fork a child that packs into a memfd of ours and sends the manifest through a pipe."""
        self.orders.append(order)
        slab = os.memfd_create(f"deepserve-weights-{os.path.basename(order.path)}", os.MFD_CLOEXEC)
        model = self.models[order.key] = Model(slabs=[slab], waiting=[])
        reading, writing = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            in_child(lambda: pack_into(order, slab, writing), self.control, "deepserve-pack")
        self.children.add(pid)
        os.close(writing)
        chunks: list[bytes] = []

        def more() -> None:
            chunk = os.read(reading, 1 << 20)
            if chunk:
                chunks.append(chunk)
                return
            self.selector.unregister(reading)
            os.close(reading)
            _, status = os.waitpid(pid, 0)
            self.children.discard(pid)
            self.packed(order, model, b"".join(chunks), os.waitstatus_to_exitcode(status), time.monotonic() - started)

        self.selector.register(reading, selectors.EVENT_READ, more)

    def packed(self, order: Pack, model: Model, report: bytes, status: int, seconds: float) -> None:
        from engine import weights

        if status == 0:
            config, packed = msgspec.msgpack.decode(report, type=tuple[dict[str, Any], weights.Manifest])
            model.manifest, model.config = packed, config
            self.tell(Packed(order.key, packed.nbytes, seconds))
            for message, fds in model.waiting:
                self.spawn(message, fds, model)
        else:
            why, param = (f"the packing process ended with status {status}", None)
            if report:
                why, param = msgspec.msgpack.decode(report, type=tuple[str, str | None])
            model.failed = PackFailed(order.key, why, param)
            self.tell(model.failed)
            for _, fds in model.waiting:
                close_all(fds)
        model.waiting = []

    # ---- forking ----------------------------------------------------------------------------------------------------
    def spawn(self, order: Spawn, fds: list[int], model: Model) -> None:
        """Fork a TE: its ranks, then the master, which is told of them and is what the control process knows."""
        from engine import devices, spmd

        started = time.monotonic()
        if kind := devices.touched():
            raise RuntimeError(f"the keeper has used a device ({kind}) and can't be forked any more")
        try:
            host = self.tiers_of(order.config, model)
        except UserError as e:
            self.tell(SpawnFailed(order.te, str(e), e.param))
            close_all(fds)
            return
        gc.freeze()  # what exists now stays out of the child's collections, so its pages stay shared
        ranks = ranks_of(order.config)[order.te]
        group = spmd.create(ranks) if ranks > 1 else None
        pids: list[int] = []
        for rank in range(ranks - 1, 0, -1):
            assert group is not None
            pids.append(self.fork(order, fds, model, started, group, rank))
            group.pidfds.append(os.pidfd_open(pids[-1]))
        access = host.open(order.te) if host is not None and order.lender is None else None
        pids.append(self.fork(order, fds, model, started, group, 0, access))
        close_all(fds)
        if access is not None:
            os.close(access.socket)
        if group is not None:
            group.close()
        pidfds = [os.pidfd_open(pid) for pid in pids]
        for pid, pidfd in zip(pids, pidfds, strict=True):
            self.selector.register(pidfd, selectors.EVENT_READ, partial(self.exited, order.te, pids, pid, pidfd))
        self.tell(Spawned(order.te, pids[-1], time.monotonic() - started), [pidfds[-1]])

    def tiers_of(self, config: Config, model: Model) -> TierHost | None:
        """What holds a model's DRAM and SSD tiers, made for its first TE. Raises `UserError`."""
        from scale import tiers

        if model.tiers is None and has_tiers(config):
            model.tiers = tiers.TierHost(self.selector, model.config, model.manifest, config)
        return model.tiers

    def fork(
        self,
        order: Spawn,
        fds: list[int],
        model: Model,
        started: float,
        group: Group | None,
        rank: int,
        access: Access | None = None,
    ) -> int:
        """Fork one process of a TE: its pid."""
        from engine import shmq, worker

        pid = os.fork()
        if pid:
            self.children.add(pid)
            return pid

        def live() -> int:
            inbox, outbox = shmq.RingFds(*fds[:3]), shmq.RingFds(*fds[3:])
            if group is not None and rank:
                close_all(fds)
                inbox, outbox = group.down[rank - 1], group.up[rank - 1]
            birth = worker.Birth(
                te=order.te,
                config=order.config,
                model_config=model.config,
                manifest=model.manifest,
                slabs=model.slabs,
                inbox=inbox,
                outbox=outbox,
                control=self.control,
                threads=order.threads,
                forked_at=started,
                group=group,
                rank=rank,
                tiers=access,
                lender=order.lender,
            )
            return worker.main(birth)

        self.sock.close()
        for one in self.models.values():
            if one.tiers is not None:
                one.tiers.in_child()
        in_child(live, self.control, f"deepserve-te{order.te}")

    def exited(self, te: int, pids: list[int], pid: int, pidfd: int) -> None:
        """One process of a TE has ended. The others end by themselves, but one that is stopped can't."""
        self.selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self.children.discard(pid)
        others = self.children.intersection(pids)
        for other in others:
            os.kill(other, signal.SIGKILL)
        if len(others) == len(pids) - 1:  # the first, on whose account the others end
            self.tell(Exited(te, pids[-1], os.waitstatus_to_exitcode(status)))


def in_child(work: Callable[[], int], control: int, name: str) -> NoReturn:
    """Run `work` in a fresh child and never return: no `finally` or `atexit` of the keeper's runs here."""
    status = 70  # EX_SOFTWARE
    try:
        native.watch_process(control)
        native.set_process_name(name)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pack_into(order: Pack, slab: int, writing: int) -> int:
    """In the packing child: write the slab, then report (model config, manifest), or (why, flag) with status 1."""
    from engine import models, weights

    status = 0
    try:
        checkpoint = weights.open_checkpoint(order.path)
        specs = models.build(checkpoint.config).weights()
        report = msgspec.msgpack.encode((checkpoint.config, weights.pack(checkpoint, specs, order.packing, slab)))
    except UserError as e:
        status, report = 1, msgspec.msgpack.encode((str(e), e.param))
    except OSError as e:
        status, report = 1, msgspec.msgpack.encode((f"packing {order.path}: {e}", "model"))
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(report)
    return status


def warm_up(wanted: set[tuple[str, WeightFormat]]) -> None:
    """Import what every TE will need: torch only where weights are packed for its operators, since that takes longer than all the
    rest together. Nothing here may start a thread or touch a device: a TE does, once it is forked."""
    import engine.models.llama
    import engine.worker  # noqa: F401
    from engine.devices import preload

    for device, format in sorted(wanted):
        preload(device, format)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def main(sock_fd: int, control: int) -> None:
    """The keeper's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    native.set_process_name("deepserve-keeper")
    with socket.socket(fileno=sock_fd) as sock:
        Keeper(sock, control).run()
