"""The control process's end of the keeper: starts it, orders packing and forks, hears of exits. Never blocks the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from engine import shmq
from engine.config import Config
from engine.types import Memory, Packing, UserError
from scale.keeper import Exited, FromKeeper, Pack, Packed, PackFailed, Spawn, Spawned, SpawnFailed, ToKeeper, Warm, close_all

ROOT = Path(__file__).resolve().parent.parent


ENVIRONMENT = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # an installed torch-npu breaks `import torch` where there is no CANN
    "OPENBLAS_NUM_THREADS": "1",  # numpy's library would start threads on import, and the keeper must be able to fork
}


class KeeperDied(Exception):
    """The keeper is gone; a new one must be started."""


class KeeperClient:
    """One keeper process. `gone` is set when it has died."""

    def __init__(self, on_exit: Callable[[int, int, int], None]):
        """`on_exit(te, pid, status)` is called when a TE has been reaped."""
        self.on_exit = on_exit
        self.gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.warm: asyncio.Future[Warm] = loop.create_future()
        self.packs: dict[str, asyncio.Future[Packed]] = {}
        self.spawns: dict[int, asyncio.Future[tuple[Spawned, int]]] = {}
        self.decoder = msgspec.msgpack.Decoder(FromKeeper)
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        control = os.pidfd_open(os.getpid())
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scale.keeper import main; main({theirs.fileno()}, {control})"
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

    async def order_pack(self, key: str, path: str, packing: Packing, device: str = "cpu") -> None:
        """Have a model packed for a device, unless it was ordered before."""
        if key not in self.packs:
            self.packs[key] = self.loop.create_future()
            await self.send(Pack(key, path, packing, device))

    async def packed(self, key: str) -> Packed:
        """Wait for an ordered pack. Raises `UserError` or `KeeperDied`."""
        return await asyncio.shield(self.packs[key])

    async def spawn(
        self,
        te: int,
        key: str,
        config: Config,
        threads: int,
        rings: tuple[shmq.RingFds, shmq.RingFds],
        lender: Memory | None = None,
    ) -> tuple[Spawned, int]:
        """Fork a TE: its pid and a pidfd that the caller owns. Raises `UserError` or `KeeperDied`."""
        future = self.spawns[te] = self.loop.create_future()
        await self.send(Spawn(te, key, config, threads, lender), [*rings[0].numbers(), *rings[1].numbers()])
        return await future

    async def send(self, message: ToKeeper, fds: list[int] | None = None) -> None:
        data = msgspec.msgpack.encode(message)
        while True:
            try:
                socket.send_fds(self.sock, [data], fds or [])
                return
            except BlockingIOError:
                await self.writable()
            except OSError as e:
                raise KeeperDied(str(e)) from None

    async def writable(self) -> None:
        ready: asyncio.Future[None] = self.loop.create_future()
        self.loop.add_writer(self.sock, settle, ready)
        try:
            await ready
        finally:
            self.loop.remove_writer(self.sock)

    def receive(self) -> None:
        """Everything the keeper has sent."""
        while not self.gone.is_set():
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 1)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self.lost()
                return
            message = self.decoder.decode(data)
            if isinstance(message, Warm):
                self.warm.set_result(message)
            elif isinstance(message, Packed):
                self.packs[message.key].set_result(message)
            elif isinstance(message, PackFailed):
                if not self.packs[message.key].done():
                    self.packs[message.key].set_exception(UserError(message.why, message.param))
                    self.packs[message.key].exception()  # a TE that waits gets it; with none it is no unretrieved error
            elif isinstance(message, Spawned):
                future = self.spawns.pop(message.te)
                if future.done():  # whoever asked was cancelled: nobody will own this TE
                    os.kill(message.pid, 9)
                    close_all(list(fds))
                else:
                    future.set_result((message, fds[0]))
            elif isinstance(message, SpawnFailed):
                future = self.spawns.pop(message.te)
                if not future.done():
                    future.set_exception(UserError(message.why, message.param))
            elif isinstance(message, Exited):
                self.on_exit(message.te, message.pid, message.status)

    def lost(self) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        self.loop.remove_reader(self.sock)
        self.sock.close()
        futures: list[asyncio.Future[Any]] = [self.warm, *self.packs.values(), *self.spawns.values()]
        for future in futures:
            if not future.done():
                future.set_exception(KeeperDied("the keeper process died"))
                future.exception()  # nobody may be waiting: not an unretrieved error

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
