"""The shared-memory queue: one sender, one receiver, whole messages in order, a doorbell for whoever sleeps.

Owns the descriptors and the Python side of the ring in native/ring.c (its layout and memory order are told there). Knows
bytes, not what they mean. Nothing polls: an end with nothing to do sleeps, in its event loop or in `wait`, and the other
end makes a system call to wake it only then.

An end belongs to one thread of the process that opened it. It may be used from an asyncio loop (`attach`) or blocking.
While both ends live nothing is lost and nothing comes twice; an end that dies leaves whole messages behind, and whoever
learns of the death calls `Receiver.receive` once more. Messages to a receiver that has closed go nowhere.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import native

if TYPE_CHECKING:  # a TE has no loop, and the import takes 3 MB
    import asyncio

MIN_CAPACITY, MAX_CAPACITY = 64, 1 << 30

# Results of the C calls; the same numbers stand in native/ring.c.
FULL, CORRUPT, GONE, CLOSED, FOREIGN, INTERRUPTED = -1, -2, -3, -4, -5, -6
LEFT, FRAGMENTS, COUNT = 1 << 16, 1 << 17, (1 << 16) - 1

POP_RECORDS = 1024  # records a C call hands over at most
BATCH_RECORDS = 64  # ... and, with BATCH_BYTES, what one callback gets: the loop must not be held for a millisecond
BATCH_BYTES = 128 << 10


@dataclass(slots=True)
class RingFds:
    """The three descriptors of a queue, to be sent to the processes that open its ends (SCM_RIGHTS, fork).

    An end keeps what it needs: close these once both ends are open or on their way.
    """

    memory: int
    data_bell: int
    space_bell: int

    def numbers(self) -> list[int]:
        return [self.memory, self.data_bell, self.space_bell]

    def close(self) -> None:
        for fd in self.numbers():
            if fd >= 0:
                os.close(fd)
        self.memory = self.data_bell = self.space_bell = -1


def create(capacity: int = 1 << 20) -> RingFds:
    """An empty queue; `capacity` is in bytes, a power of two. Messages may be larger."""
    if not MIN_CAPACITY <= capacity <= MAX_CAPACITY or capacity & (capacity - 1):
        raise ValueError(f"capacity={capacity}: must be a power of two between {MIN_CAPACITY} and {MAX_CAPACITY}")
    lib = native.load()
    fds = RingFds(os.memfd_create("deepserve-queue", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), -1, -1)
    try:
        os.ftruncate(fds.memory, lib.ring_size(capacity))
        # Neither side can shrink the memory under the other, which would kill it with SIGBUS.
        fcntl.fcntl(fds.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        if code := lib.ring_format(fds.memory, capacity):
            raise OSError(-code, os.strerror(-code), "mapping a new queue")
        fds.data_bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        fds.space_bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except BaseException:
        fds.close()
        raise
    return fds


class _End:
    """What both ends share: the mapping, the doorbells, the heartbeat and blocking waits."""

    def __init__(self, fds: RingFds, sends: bool):
        self._lib = native.load()
        self._ring: ctypes.c_void_p | None = None
        self._bells: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next: asyncio.Handle | None = None  # own continuation, already queued in the loop
        ring = ctypes.c_void_p()
        try:
            for bell in (fds.data_bell, fds.space_bell):
                self._bells.append(fcntl.fcntl(bell, fcntl.F_DUPFD_CLOEXEC, 3))
            code = self._lib.ring_open(fds.memory, *self._bells, sends, ctypes.byref(ring))
            if code == FOREIGN:
                raise ValueError(f"descriptor {fds.memory} is not a queue of this version of DeepServe")
            if code:
                raise OSError(-code - 1000, os.strerror(-code - 1000), "mapping a queue")
        except BaseException:
            self._close_bells()
            raise
        self._ring = ring
        self._bell = self._bells[1 if sends else 0]  # the one this end sleeps on

    def _close_bells(self) -> None:
        for bell in self._bells:
            os.close(bell)
        self._bells.clear()

    @property
    def _open_ring(self) -> ctypes.c_void_p:
        if self._ring is None:
            raise ValueError("this end of the queue is closed")
        return self._ring

    def _failed(self, code: int) -> Exception:
        if code == CLOSED:
            return ValueError("this end of the queue is closed")
        assert code == CORRUPT, code
        return RuntimeError("the queue's shared memory is corrupt: somebody else has written to it")

    @property
    def capacity(self) -> int:
        return self._lib.ring_capacity(self._open_ring)

    @property
    def peer_closed(self) -> bool:
        """Whether the other end has closed; one that was killed has not."""
        return bool(self._lib.ring_peer_closed(self._open_ring))

    def beat(self) -> None:
        """Stamp the queue's heartbeat. One end stamps, the other looks."""
        self._lib.ring_beat(self._open_ring)

    def last_beat(self) -> float:
        """CLOCK_MONOTONIC seconds (`time.monotonic`) of the last `beat`; 0.0 before the first."""
        return self._lib.ring_last_beat(self._open_ring) / 1e9

    def _block(self, deadline: float | None) -> bool:
        """Sleep without the interpreter lock until there is something to do. False: the deadline passed first."""
        assert self._loop is None, "attached to a loop: detach before blocking"
        while True:
            left = -1 if deadline is None else max(0, int((deadline - time.monotonic()) * 1e9))
            code = self._lib.ring_wait(self._ring, left)
            if code == 1:
                return True
            if code == GONE:
                raise EOFError("the other end of the queue has closed")
            if code == CLOSED:
                raise self._failed(code)
            if left == 0 and code != INTERRUPTED:  # a signal's Python handler runs before the next turn
                return False

    def _stop_watching(self) -> None:
        """Forget the loop: no callback comes after this."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._bell)
        if self._next is not None:
            self._next.cancel()
        self._loop = self._next = None
        self._lib.ring_wake(self._open_ring)

    def _close_ring(self) -> None:
        assert self._ring is not None
        self._lib.ring_close(self._ring)
        self._ring = None
        self._close_bells()


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


class Sender(_End):
    """The sending end. `send` never blocks: what doesn't fit waits here, in order, until there is room.

    With a loop attached the rest follows by itself; without one it goes with the next `send`, `flush` or
    `flush_blocking`.
    """

    def __init__(self, fds: RingFds):
        super().__init__(fds, sends=True)
        self._outbox: deque[bytes] = deque()
        self._offset = 0  # bytes of the first waiting message that are already in the ring
        self._watching = False
        self._push = self._lib.ring_push
        self._one_record = self.capacity // 2 - 4  # the longest message that travels in one piece

    @property
    def backlog(self) -> int:
        """Messages that are not wholly in the ring yet."""
        return len(self._outbox)

    def send(self, payload: bytes) -> None:
        """Queue one message. Without effect once the receiver has closed."""
        if type(payload) is not bytes:  # the quick call below checks nothing
            raise TypeError(f"a message is bytes, not {type(payload).__name__}")
        length = len(payload)
        if not self._outbox and length <= self._one_record:
            done = self._push(self._ring, payload, length)
            if done == length:
                return
            if done == GONE:
                return
            if done != FULL:
                raise self._failed(done)
        self._outbox.append(payload)
        if self._loop is None:
            self.flush()
        elif len(self._outbox) == 1 and not self.flush():
            self._await_room()

    def flush(self) -> bool:
        """Push what fits now; whether nothing waits any more."""
        while self._outbox:
            payload = self._outbox[0]
            done = self._lib.ring_push_from(self._ring, payload, len(payload), self._offset)
            if done == GONE:
                self._outbox.clear()
                self._offset = 0
            elif done == len(payload):
                self._outbox.popleft()
                self._offset = 0
            elif done < FULL:
                raise self._failed(done)
            else:
                self._offset = max(done, self._offset)
                return False
        return True

    def flush_blocking(self, timeout: float | None = None) -> bool:
        """Wait until everything is in the ring (True) or `timeout` seconds have passed. Not while attached to a loop."""
        deadline = _deadline(timeout)
        while not self.flush():
            if not self._block(deadline):
                return self.flush()
        return True

    # ---- in an event loop --------------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on `loop` pushes what waits."""
        assert self._loop is None, "already attached"
        self._loop = loop
        if self._outbox:
            self._await_room()

    def detach(self) -> None:
        """Leave the loop; what waits stays. Safe to call twice."""
        if self._loop is not None:
            self._stop_watching()
            self._watching = False

    def _await_room(self) -> None:
        assert self._loop is not None
        if not self._watching:
            self._loop.add_reader(self._bell, self._on_bell)
            self._watching = True
        if self._next is None and not self._lib.ring_sleep(self._open_ring):
            self._next = self._loop.call_soon(self._on_room)

    def _on_bell(self) -> None:
        self._lib.ring_wake(self._open_ring)
        if self._next is None:
            self._on_room()

    def _on_room(self) -> None:
        self._next = None
        assert self._loop is not None
        if not self.flush():
            self._await_room()
        elif self._watching:
            self._loop.remove_reader(self._bell)
            self._watching = False

    def close(self) -> None:
        """Push what still fits, drop the rest, and tell the receiver. Safe to call twice."""
        if self._ring is None:
            return
        try:
            self.flush()
        finally:
            self.detach()
            self._outbox.clear()
            self._close_ring()


class Receiver(_End):
    """The receiving end."""

    def __init__(self, fds: RingFds):
        super().__init__(fds, sends=False)
        self._pop = self._lib.ring_pop
        # No record is longer. Memory comes as far as records have reached, which is a page or two of most queues.
        self._buffer = mmap.mmap(-1, self.capacity // 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._buffer)
        self._ends = array("i", bytes(4 * POP_RECORDS))
        buffer_at = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        ends_at, most = self._ends.buffer_info()
        self._lib.ring_scratch(self._open_ring, buffer_at, len(self._buffer), ends_at, most)
        self._parts: list[bytes] = []  # of a message whose end has not come yet
        self._left = False  # the last pop stopped at a limit, with records still there
        self._on_messages: Callable[[list[bytes]], None] | None = None

    def _take(self, most: int, enough: int, fresh: bool) -> list[bytes]:
        """The whole messages among the next records; sets `_left`."""
        code = self._pop(self._ring, most, enough, fresh)
        if code <= 0:
            self._left = False
            if code:
                raise self._failed(code)
            return []
        self._left = bool(code & LEFT)
        view, start, messages = self._view, 0, []
        if not code & FRAGMENTS and not self._parts:
            for end in self._ends[: code & COUNT]:
                messages.append(view[start:end].tobytes())
                start = end
            return messages
        for end in self._ends[: code & COUNT]:
            more = end < 0
            end = ~end if more else end
            self._parts.append(view[start:end].tobytes())
            start = end
            if not more:
                messages.append(b"".join(self._parts))
                self._parts.clear()
        return messages

    def receive(self) -> list[bytes]:
        """Every whole message that is there, in order; never blocks."""
        size = len(self._buffer)
        messages = self._take(POP_RECORDS, size, True)
        while self._left:  # of what was there at the first look, so a busy sender can't keep us here
            messages += self._take(POP_RECORDS, size, False)
        return messages

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until a message may be there (True) or `timeout` seconds have passed (False). Not while attached to a loop.

        Raises `EOFError` once the sender has closed and everything it sent was received.
        """
        return self._block(_deadline(timeout))

    def rouse(self) -> None:
        """From another thread: have the owner's `wait`, or its next one, return True."""
        self._lib.ring_rouse(self._open_ring)

    # ---- in an event loop --------------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop, on_messages: Callable[[list[bytes]], None]) -> None:
        """From now on `loop` calls `on_messages` with what arrives, in batches bounded in number and bytes."""
        assert self._loop is None, "already attached"
        self._loop, self._on_messages = loop, on_messages
        loop.add_reader(self._bell, self._on_bell)
        self._sleep_or_go_on()

    def detach(self) -> None:
        """Leave the loop; what is in the ring stays. Safe to call twice, also from the callback."""
        if self._loop is not None:
            self._stop_watching()
            self._on_messages = None

    def _sleep_or_go_on(self) -> None:
        if self._loop is not None and not self._lib.ring_sleep(self._open_ring):
            self._next = self._loop.call_soon(self._deliver)

    def _on_bell(self) -> None:
        self._lib.ring_wake(self._open_ring)
        if self._next is None:
            self._deliver()

    def _deliver(self) -> None:
        self._next = None
        assert self._on_messages is not None
        try:
            messages = self._take(BATCH_RECORDS, BATCH_BYTES, True)
        except RuntimeError:
            self.detach()  # corrupt memory would fail again at once, for ever
            raise
        try:
            if messages:
                self._on_messages(messages)
        finally:
            self._sleep_or_go_on()

    def close(self) -> None:
        """Drop what was not received and tell the sender. Safe to call twice."""
        if self._ring is None:
            return
        self.detach()
        self._close_ring()
