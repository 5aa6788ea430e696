"""The control process's end of the keeper: starts it, orders packing and TEs, hears of exits. Never blocks the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from engine import shmq
from engine.config import Config, Seat
from engine.types import Memory, Packing, UserError, WeightFormat, WeightSource
from scale.keeper import (
    Drop,
    Dropped,
    Exited,
    FromKeeper,
    Pack,
    Packed,
    PackFailed,
    PackProgress,
    Pool,
    Spawn,
    Spawned,
    SpawnFailed,
    ToKeeper,
    Warm,
    close_all,
)
from scale.warm import ROOT

ENVIRONMENT = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # an installed torch-npu breaks `import torch` where there is no CANN
    "OPENBLAS_NUM_THREADS": "1",  # numpy's library would start threads on import, and the keeper must be able to fork
}


class KeeperDied(Exception):
    """What the keeper was at is lost, since it or the process that packs for it has died: another try may do it."""


class NothingPacked(Exception):
    """No running TE could give its weights, and no packed ones are in memory: order them packed, then try again. Says why."""


class KeeperClient:
    """One keeper process. `gone` is set when it has died."""

    def __init__(self, on_exit: Callable[[int, int, int], None], preload: Collection[tuple[str, WeightFormat]] = ()):
        """`on_exit(te, pid, status)` is called when a TE has been reaped. `preload`: devices that TEs will have, with their
        weights' formats: the keeper loads the code for them at once, and not only when it first packs for them."""
        self.on_exit = on_exit
        self.gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.warm: asyncio.Future[Warm] = loop.create_future()
        self.packs: dict[str, asyncio.Future[Packed]] = {}
        self.packed_keys: dict[str, int] = {}  # what the keeper holds: bytes
        self.progress: dict[str, list[Callable[[int, int], None]]] = {}
        self.drops: dict[str, asyncio.Future[int]] = {}
        self.spawns: dict[int, asyncio.Future[tuple[Spawned, int]]] = {}  # by the number of the order
        self.orders = 0
        self.sending = asyncio.Lock()
        self.room: asyncio.Future[None] = loop.create_future()  # in the socket, where somebody waits for it
        self.decoder = msgspec.msgpack.Decoder(FromKeeper)
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        control = os.pidfd_open(os.getpid())
        arguments = f"{theirs.fileno()}, {control}, {sorted(preload)}"
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scale.keeper import main; main({arguments})"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=(theirs.fileno(), control),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C reaches the control process alone
                env=os.environ | ENVIRONMENT,
            )
        finally:
            theirs.close()
            os.close(control)
        self.pid = self.process.pid
        self.loop = loop
        loop.add_reader(self.sock, self.receive)

    async def order_pack(
        self, key: str, path: str, packing: Packing, device: str = "cpu", on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Have a model packed for a device, unless that is done or under way. `on_progress` is told of bytes done and in all."""
        known = self.packs.get(key)
        if known is not None and known.done() and known.exception() is not None:
            known = None  # it failed: a new try
        if on_progress is not None and (known is None or not known.done()):
            self.progress.setdefault(key, []).append(on_progress)
        if known is None:
            self.packs[key] = self.loop.create_future()
            await self.send(Pack(key, path, packing, device))

    async def packed(self, key: str) -> Packed:
        """Wait for an ordered pack. Raises `UserError` or `KeeperDied`."""
        return await asyncio.shield(self.packs[key])

    async def drop(self, key: str) -> int:
        """Have packed weights forgotten: how many bytes were allocated for them. Raises `KeeperDied`."""
        if key not in self.drops:
            self.drops[key] = self.loop.create_future()
            await self.send(Drop(key))
        return await asyncio.shield(self.drops[key])

    async def pool(self, size: int) -> None:
        """Have so many processes kept ready to become TEs. Raises `KeeperDied`."""
        await self.send(Pool(size))

    async def spawn(
        self,
        te: int,
        key: str,
        config: Config,
        threads: int,
        rings: tuple[shmq.RingFds, shmq.RingFds],
        seat: Seat,
        ranks: int,
        index: int,
        reachable: bool,
        lends: bool,
        lender: Memory | None = None,
        sources: Sequence[WeightSource] = (),
    ) -> tuple[Spawned, int]:
        """Make a TE (`keeper.Spawn` tells the meanings): its pid and a pidfd that the caller owns. Raises `UserError`,
        `NothingPacked` or `KeeperDied`."""
        self.orders += 1
        future = self.spawns[self.orders] = self.loop.create_future()
        config = msgspec.structs.replace(config, chat_template="", api_key=[])  # no TE's business, and long
        order = Spawn(self.orders, te, key, config, threads, seat, ranks, index, reachable, lends, lender, list(sources))
        await self.send(order, [*rings[0].numbers(), *rings[1].numbers()])
        return await future

    async def send(self, message: ToKeeper, fds: Sequence[int] = ()) -> None:
        data = msgspec.msgpack.encode(message)
        async with self.sending:  # one waits for room at a time
            while True:
                try:
                    socket.send_fds(self.sock, [data], fds)
                    return
                except BlockingIOError:
                    await self.writable()
                except OSError as e:
                    raise KeeperDied(str(e)) from None

    async def writable(self) -> None:
        """Wait for room in the socket, or for its end."""
        self.room = self.loop.create_future()
        self.loop.add_writer(self.sock, settle, self.room)
        try:
            await self.room
        finally:
            if not self.gone.is_set():
                self.loop.remove_writer(self.sock)

    def receive(self) -> None:
        """Everything the keeper has sent."""
        while not self.gone.is_set():
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self.lost()
                return
            self.hear(self.decoder.decode(data), fds)

    def hear(self, message: FromKeeper, fds: list[int]) -> None:
        if isinstance(message, Warm):
            self.warm.set_result(message)
        elif isinstance(message, PackProgress):
            for tell in self.progress.get(message.key, ()):
                tell(message.done, message.total)
        elif isinstance(message, Packed):
            self.packed_keys[message.key] = message.nbytes
            if (pack := self.waited_for(message.key)) is not None:
                pack.set_result(message)
        elif isinstance(message, PackFailed):
            if (pack := self.waited_for(message.key)) is not None:
                fail(pack, KeeperDied(message.why) if message.killed else UserError(message.why, message.param))
        elif isinstance(message, Dropped):
            self.packed_keys.pop(message.key, None)
            if (drop := self.drops.pop(message.key, None)) is not None:
                drop.set_result(message.nbytes)
            if (pack := self.waited_for(message.key)) is not None:
                fail(pack, KeeperDied("the weights were dropped while they were packed"))
            self.packs.pop(message.key, None)
        elif isinstance(message, Spawned):
            spawn = self.spawns.pop(message.number)
            if spawn.done():  # whoever asked was cancelled: nobody will own this TE
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fds[0], signal.SIGKILL)
                close_all(fds)
            else:
                spawn.set_result((message, fds[0]))
        elif isinstance(message, SpawnFailed):
            spawn = self.spawns.pop(message.number)
            if not spawn.done():
                spawn.set_exception(NothingPacked(message.why) if message.retry else UserError(message.why, message.param))
        elif isinstance(message, Exited):
            self.on_exit(message.te, message.pid, message.status)

    def waited_for(self, key: str) -> asyncio.Future[Packed] | None:
        """A pack has come to an end: what tells it to those who wait, if they don't know yet."""
        self.progress.pop(key, None)
        pack = self.packs.get(key)
        return pack if pack is not None and not pack.done() else None

    def lost(self) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        self.loop.remove_reader(self.sock)
        self.loop.remove_writer(self.sock)
        settle(self.room)
        self.sock.close()
        self.packed_keys.clear()
        futures: list[asyncio.Future[Any]] = [self.warm, *self.packs.values(), *self.drops.values(), *self.spawns.values()]
        for future in futures:
            if not future.done():
                fail(future, KeeperDied("the keeper process died"))

    async def close(self) -> None:
        """End the keeper: it leaves when its socket closes. Live TEs are not its to end."""
        self.lost()
        pidfd = None
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
        if pidfd is not None:
            try:
                # Importing torch or forking may hold it for a moment; then it is killed, since nothing in it needs saving.
                if not await readable(self.loop, pidfd, 0.2):
                    self.process.kill()
                    await readable(self.loop, pidfd, 10.0)
            except asyncio.CancelledError:
                self.process.kill()
                raise
            finally:
                os.close(pidfd)
                self.process.wait()
        self.process.wait()


def fail(future: asyncio.Future[Any], why: Exception) -> None:
    """Whoever waits gets it; with nobody waiting it is no unretrieved error."""
    future.set_exception(why)
    future.exception()


def settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def readable(loop: asyncio.AbstractEventLoop, fd: int, timeout: float) -> bool:
    """Wait until `fd` is readable; False after `timeout` seconds."""
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, settle, ready)
    try:
        await asyncio.wait_for(ready, timeout)
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
