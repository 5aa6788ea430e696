"""The memory of a TE's KV cache, so that other TEs on the box can reach it: in this machine's memory a memfd, committed piece by
piece (`KVPool`), on an accelerator what its runtime exports (`DevicePool`).

Knows bytes, not blocks. Huge pages are asked for whatever the system's setting for shared memory is (`native.collapse_slab`):
they spare most page faults and most misses of address translation.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from typing import NamedTuple

from engine import native
from engine.native import ipc
from engine.native.ipc import DeviceRange
from engine.types import DeviceMemory, Memory, OutOfMemory, UserError

PAGE = 2 << 20  # bytes of a huge page; on Ascend exports begin and end at multiples of it


def create() -> int:
    """A memfd for a pool."""
    return os.memfd_create("deepserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


class Part(NamedTuple):
    """Which of the pools in one memfd a rank of a TE has: all are of one size and lie one behind the other."""

    fd: int
    rank: int
    ranks: int


class KVPool:
    """`nbytes` of shared memory, or the memory of another TE's pool."""

    def __init__(self, nbytes: int, lender: Memory | None = None, part: Part | None = None):
        """Raises `OutOfMemory`; `UserError` where the lender is gone."""
        self.nbytes = nbytes
        self.stride = -(-nbytes // PAGE) * PAGE  # bytes from one rank's pool to the next
        index, count = (part.rank, part.ranks) if part is not None else (0, 1)
        size = self.stride * count
        lent = None if lender is None else open_memory(lender)
        try:
            if lent is None:
                fd = os.dup(part.fd) if part is not None else create()
                os.ftruncate(fd, size)
                # Whoever maps it must never find it shorter: that would kill it with SIGBUS.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            else:
                fd = lent
            view = native.map_slab(fd, size, writable=True)
        except (OSError, ValueError, OverflowError) as e:
            raise OutOfMemory(
                f"--kv-cache-memory-bytes {nbytes}: the KV cache can't be mapped ({e}); use less", "kv_cache_memory_bytes"
            ) from None
        self.whole = view  # every rank's
        self.first = index * self.stride  # byte of it, where this one's begins
        self.view = view[self.first : self.first + nbytes]
        self.fd = fd  # kept for those who open it through /proc
        # In bytes; a lent pool is committed by its owner.
        self.committed = 0 if lender is None else nbytes
        self.memory = lender or Memory(os.getpid(), fd, os.fstat(fd).st_ino, size)
        weakref.finalize(self, os.close, fd).atexit = False

    def commit(self, nbytes: int) -> None:
        """Have the first `nbytes` in memory, in huge pages where the system has them. Elsewhere pages come when touched."""
        if nbytes > self.committed:
            upto = min(-(-nbytes // PAGE) * PAGE, self.stride)
            native.collapse_slab(self.whole, self.first + self.committed, self.first + upto)
            self.committed = upto


class DevicePool:
    """Memory of one of this process's accelerators. It is exported when it is first asked for, and until the process ends: who
    has opened it may be reading."""

    def __init__(self, whole: DeviceRange):
        self.whole = whole
        self.exported: DeviceMemory | None = None

    @property
    def memory(self) -> DeviceMemory:
        """Raises `UserError` where the runtime refuses."""
        if self.exported is None:
            kind, device, _, nbytes = self.whole
            try:
                name = ipc.export(self.whole)
            except OSError as e:
                raise UserError(f"the {kind}'s runtime doesn't let other processes reach the KV cache: {e}") from None
            self.exported = DeviceMemory(os.getpid(), kind, device, name, nbytes)
        return self.exported


def shown(fd: int) -> Memory:
    """A memfd of this process, as others open it."""
    found = os.fstat(fd)
    return Memory(os.getpid(), fd, found.st_ino, found.st_size)


def open_memory(memory: Memory, writable: bool = True) -> int:
    """A descriptor of another process's memfd. Raises `UserError` where that process is gone."""
    gone = f"the memory of process {memory.pid} is gone"
    try:
        fd = os.open(f"/proc/{memory.pid}/fd/{memory.fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as e:
        raise UserError(f"{gone}: {e.strerror}") from None
    found = os.fstat(fd)
    if (found.st_ino, found.st_size) != (memory.inode, memory.nbytes):
        os.close(fd)
        raise UserError(f"{gone}: its descriptor {memory.fd} is something else now")
    return fd
