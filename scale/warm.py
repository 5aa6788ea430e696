"""Processes that are nobody yet: each waits on a socket for a Birth, which makes it the master or a rank of any TE of any model.

A warm one was forked from the keeper ahead of need, with its code loaded, its watch thread started and, on an accelerator, its
device open. One that is forked at demand, or is a fresh interpreter, goes the same way: its Birth lies in the socket already. It
leaves when the socket closes (the keeper is gone, or wants fewer) or the control process dies.

The keeper has no thread, lock or device for a child to inherit. What is left of it is dropped here: descriptors, and the state of
random generators, which would be the same in every child.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import msgspec

from engine import native
from engine.types import UserError

if TYPE_CHECKING:  # importing it takes time, and the packing of the first model comes before
    from engine.worker import Birth

ROOT = Path(__file__).resolve().parent.parent
How = Literal["warm", "fork", "exec"]
MAX_FDS = 253  # the kernel's bound for one message
MAX_MESSAGE = 128 << 10  # a Birth is a few KiB, most of it the Config


@dataclass(slots=True)
class Process:
    """A process that waits for its Birth, seen from the keeper."""

    pid: int
    pidfd: int
    sock: socket.socket
    index: int  # of the accelerator's device that it has open; -1: none

    def give(self, birth: Birth, fds: list[int]) -> bool:
        """Make it what `birth` says; False where it has died. Never waits: the socket has room for this one message."""
        try:
            socket.send_fds(self.sock, [msgspec.msgpack.encode(birth)], fds)
            return True
        except (BrokenPipeError, ConnectionResetError):
            return False
        finally:
            self.sock.close()


def fork(control: int, device: str = "", index: int = -1) -> Process:
    """A process with all that this one has imported. With `index` it opens that device of the accelerator `device` meanwhile."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.freeze()  # what exists now stays out of the child's collections: its pages stay shared, and no descriptor is closed late
    with theirs:
        pid = os.fork()
        if pid == 0:
            in_child("deepserve-warm", control, [theirs.fileno()], lambda: wait(theirs.fileno(), device, index))
    return Process(pid, os.pidfd_open(pid), ours, index)


def execute(control: int) -> Process:
    """A fresh interpreter, which imports everything anew."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = theirs.fileno(), control
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scale.warm import main; main{fds}"
    for fd in fds:
        os.set_inheritable(fd, True)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    os.set_inheritable(control, False)
    theirs.close()
    return Process(pid, os.pidfd_open(pid), ours, -1)


def main(sock: int, control: int) -> None:
    """The whole life of a fresh interpreter."""
    in_child("deepserve-warm", control, [sock], lambda: wait(sock, "", -1))


def wait(sock: int, device: str, index: int) -> int:
    """Wait for the Birth and live it: the exit status."""
    from engine import worker

    if index >= 0 and not touched(device, index):
        return 1
    with socket.socket(fileno=sock) as end:
        data, fds, _, _ = socket.recv_fds(end, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return 0
    birth = worker.BIRTH.decode(data)
    return worker.main(birth, worker.received(birth, fds))


def touched(device: str, index: int) -> bool:
    """Open an accelerator's device and close it again: the first touch takes the time, and the TE opens it as its model wants it.
    False where it can't be opened: a box has so many."""
    import logging

    from engine.devices import auto_dtype, open_device

    try:
        open_device(device, auto_dtype(device, True)[0], 1, index=index).close()
    except UserError as e:
        logging.getLogger(__name__).warning("event=no_warm_device device=%s index=%d why=%s", device, index, e)
        return False
    return True


def in_child(name: str, control: int, fds: Collection[int], work: Callable[[], int]) -> NoReturn:
    """Run `work` in a fresh child and never return: no `finally` or `atexit` of the parent's runs here, and none of its objects
    is freed, which would close descriptors that have other owners by now. Only `fds` stay open, and the standard three."""
    status = 70  # EX_SOFTWARE
    try:
        keep_only([control, *fds])
        native.watch_process(control)
        os.close(control)
        native.set_process_name(name)
        reseed()
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def keep_only(fds: Collection[int]) -> None:
    """Close every other descriptor but the standard three."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in fds:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(fd)


def reseed() -> None:
    """Random generators that a fork copies; the standard library sees to its own."""
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
