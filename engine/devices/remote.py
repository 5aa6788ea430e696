"""DistFlow's line to a TE on another host: bytes by torch.distributed's point-to-point calls, control messages over TCP.

`Line.transfer` is `DistFlow.transfer` between this TE's memory and that of the one at the other end. Who has the source sends it
in pieces through a staging buffer; who has the target confirms when all of it lies where it should. A group of two for each line,
so that lines come and go as TEs do, and the process's own groups are not touched. Whoever can reach the port can read and write
the memory that the line was given: it belongs in a network of the cluster's own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from engine.distflow import Completion, Reach, Runs, Spans, check_inside, copy_runs, pair
from engine.native.ipc import DeviceRange

log = logging.getLogger(__name__)

PIECE = 4 << 20  # bytes sent at once: how late a cancel is noticed, and enough to fill a fast network
PATIENCE = 30  # seconds without a sign of the other end until the line is given up
NEVER = np.zeros(1, np.int32)  # a copy that nothing stops: of one piece
LENGTH = struct.Struct("<I")  # before each message


class Hello(msgspec.Struct, tag=True, array_like=True):
    te: int
    nbytes: int  # of the memory
    store: int  # port of the listening end's rendezvous; 0 from the other


class Push(msgspec.Struct, tag=True, array_like=True):
    """Pieces for these spans of yours follow."""

    number: int
    offsets: bytes  # int64
    lengths: bytes


class Pull(msgspec.Struct, tag=True, array_like=True):
    """Send me pieces of these spans of yours."""

    number: int
    offsets: bytes
    lengths: bytes
    timeout: float | None


class Piece(msgspec.Struct, tag=True, array_like=True):
    """The next so many bytes come by the group. `pull`: they answer one, whose number it is."""

    number: int
    pull: bool
    nbytes: int


class End(msgspec.Struct, tag=True, array_like=True):
    """No more pieces."""

    number: int
    pull: bool
    error: str | None


class Confirm(msgspec.Struct, tag=True, array_like=True):
    """A push has ended; what came of it lies where it should."""

    number: int
    nbytes: int
    error: str | None


class Cancel(msgspec.Struct, tag=True, array_like=True):
    """Stop answering a pull."""

    number: int


Message = Hello | Push | Pull | Piece | End | Confirm | Cancel
DECODER = msgspec.msgpack.Decoder(Message)


@dataclass(eq=False, slots=True)
class _Job:
    """A transfer of this end's, the answer to a pull of the other's, or what arrives of its push."""

    number: int
    pieces: list[Runs]  # between own memory (source) and the staging buffer (target), whichever way they go
    request: Push | Pull | None = None  # what makes the other end take part in it; None: it began it
    completion: Completion | None = None  # None: it is the other end's
    deadline: int = 0  # CLOCK_MONOTONIC ns; 0: none
    after: Callable[[], None] | None = None
    stop: Any = field(default_factory=lambda: np.zeros(1, np.int32))
    error: str | None = None
    arrived: int = 0  # pieces
    nbytes: int = 0  # that lie where they should
    began: float = 0.0


def cut(spans: Spans, room: int) -> list[Runs]:
    """The bytes of `spans` in pieces that fill a buffer of `room` bytes, but for the last."""
    count = -(-spans.nbytes // room)
    lengths = np.minimum(room, spans.nbytes - room * np.arange(count))
    runs = pair(spans, Spans(-1, np.zeros(count, np.int64), lengths))
    stops = np.searchsorted(np.cumsum(runs.lengths), np.cumsum(lengths)) + 1
    starts = np.concatenate(([0], stops))[:-1]
    return [
        Runs(runs.source[a:b], runs.target[a:b], runs.lengths[a:b], int(n))
        for a, b, n in zip(starts, stops, lengths, strict=True)
    ]


def gloo(store: dist.Store, rank: int, address: str) -> Any:
    """A group of two over the network interface of `address`."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=PATIENCE)
    return dist.ProcessGroupGloo(store, rank, 2, options)


class Line:
    """One end of a line between two TEs. `transfer` and `close` may be called from any thread."""

    def __init__(self, own: memoryview | DeviceRange, te: int, sock: socket.socket, listening: bool):
        self._own = Reach(te, own)
        self._socket = sock
        self._sending, self._lock = threading.Lock(), threading.Lock()
        sock.settimeout(PATIENCE)
        address = sock.getsockname()[0]
        if listening:
            store = dist.TCPStore(address, 0, None, True, timedelta(seconds=PATIENCE), wait_for_workers=False)
            self._send(Hello(te, self._own.nbytes, store.port))
            hello = self._hello()
        else:
            hello = self._hello()
            store = dist.TCPStore(sock.getpeername()[0], hello.store, None, False, timedelta(seconds=PATIENCE))
            self._send(Hello(te, self._own.nbytes, 0))
        self.te, self.nbytes = hello.te, hello.nbytes  # of the other end
        self._other = int(listening)  # its rank
        self._group = gloo(store, 1 - self._other, address)
        self._live(sock)
        self._out, self._in = (torch.empty(PIECE, dtype=torch.uint8) for _ in range(2))
        self._numbers = 0
        self._open: dict[int, _Job] = {}  # own transfers that are not done
        self._answers: dict[int, _Job] = {}  # pulls of the other end's that are being answered
        self._pushes: dict[int, _Job] = {}  # what arrives for the other end
        self._lost: str | None = None
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="distflow-write")
        self._reader = threading.Thread(target=self._read, name="distflow-read")
        self._writer.start()
        self._reader.start()

    @staticmethod
    def listen(own: memoryview | DeviceRange, te: int, server: socket.socket) -> Line:
        """The line to whoever connects next. Raises `OSError`."""
        return Line._over(server.accept()[0], own, te, listening=True)

    @staticmethod
    def connect(own: memoryview | DeviceRange, te: int, host: str, port: int) -> Line:
        """Raises `OSError` where nobody listens."""
        return Line._over(socket.create_connection((host, port), PATIENCE), own, te, listening=False)

    @staticmethod
    def _over(sock: socket.socket, own: memoryview | DeviceRange, te: int, listening: bool) -> Line:
        try:
            return Line(own, te, sock, listening)
        except BaseException as e:
            sock.close()
            if isinstance(e, RuntimeError):  # torch's
                raise ConnectionError(f"the group of the line: {e}") from None
            raise

    def transfer(
        self,
        src: Spans,
        dst: Spans,
        *,
        timeout: float | None = None,
        on_done: Callable[[Completion], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> Completion:
        """As `DistFlow.transfer`, between this TE and the other end's. A cancel and the timeout are noticed between two pieces.
        Once a line is lost every transfer is done at once, with an error."""
        push = (src.te, dst.te) == (self._own.te, self.te)
        if not push and (dst.te, src.te) != (self._own.te, self.te):
            raise ValueError(f"a line between TE {self._own.te} and TE {self.te} can't copy from TE {src.te} to TE {dst.te}")
        runs = pair(src, dst)
        here, there = (src, dst) if push else (dst, src)
        check_inside(src.te, self._own.nbytes if push else self.nbytes, runs.source, runs.lengths)
        check_inside(dst.te, self.nbytes if push else self._own.nbytes, runs.target, runs.lengths)
        if not push and self._own.readonly:
            raise ValueError(f"the memory of TE {self._own.te} is read-only")
        completion = Completion(on_done)
        with self._lock:
            lost = self._lost
            if lost is None:
                number = self._numbers = self._numbers + 1
                columns = _packed(there)
                request = Push(number, *columns) if push else Pull(number, *columns, timeout)
                deadline = 0 if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
                job = _Job(number, cut(here, PIECE), request, completion, deadline, after, completion.stop)
                self._open[number] = job
                self._jobs.put(job)
        if lost is not None:
            completion.end(lost)
        return completion

    def close(self) -> None:
        """End every transfer, with an error where it isn't through, and the line. Waits for a gate to return."""
        with self._lock:
            self._closed = True
            for job in (*self._open.values(), *self._answers.values()):
                job.stop[0] = 1
        self._jobs.put(None)
        if threading.current_thread() is not self._writer:
            self._writer.join()
        self._hang_up()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    # ---- the side that sends bytes ------------------------------------------------------------------------------------------

    def _write(self) -> None:
        staging = Reach(-1, memoryview(self._out.numpy()))
        try:
            while (job := self._jobs.get()) is not None:
                self._begin(job, staging)
        except (OSError, RuntimeError) as e:  # RuntimeError is what torch raises
            log.warning("the line to TE %d: %s", self.te, e)
            self._hang_up()  # the reader ends what is open: after it nothing is written to memory

    def _begin(self, job: _Job, staging: Reach) -> None:
        error = self._obstacle(job)
        if error is None and job.after is not None:
            try:
                job.after()
            except Exception as e:
                error = f"waiting for the source: {type(e).__name__}: {e}"
            else:
                error = self._obstacle(job)
        job.began = time.monotonic()
        if job.request is not None:
            if error is not None:
                self._end(job, error)
                return
            if isinstance(job.request, Pull) and job.deadline:
                job.request.timeout = (job.deadline - time.monotonic_ns()) / 1e9
            self._send(job.request)
            if isinstance(job.request, Pull):
                return
        answer = job.request is None
        for piece in job.pieces if error is None else ():
            try:
                copied = copy_runs(self._own, staging, piece, job.stop, job.deadline)
            except OSError as e:  # a device's
                error = str(e)
                break
            if copied < piece.nbytes:
                error = self._obstacle(job) or "cancelled"
                break
            self._send(Piece(job.number, answer, piece.nbytes))
            self._group.send([self._out[: piece.nbytes]], self._other, 0).wait()
        if answer:
            del self._answers[job.number]
        self._send(End(job.number, answer, error))

    def _obstacle(self, job: _Job) -> str | None:
        if job.completion is not None and job.completion.cancelling:
            return "cancelled"
        if self._closed:
            return "DistFlow was closed"
        if job.deadline and time.monotonic_ns() >= job.deadline:
            return "timed out"
        return None

    # ---- the side that receives ---------------------------------------------------------------------------------------------

    def _read(self) -> None:
        staging, why = Reach(-1, memoryview(self._in.numpy())), "the line was closed"
        try:
            while (message := self._receive()) is not None:
                self._take(message, staging)
        except (OSError, RuntimeError, msgspec.MsgspecError, KeyError, IndexError) as e:
            why = f"{type(e).__name__}: {e}"
        self._hang_up()
        with self._lock:
            self._lost = "DistFlow was closed" if self._closed else f"TE {self.te} can't be reached: {why}"
            jobs = list(self._open.values())
        self._jobs.put(None)
        for job in jobs:
            job.stop[0] = 1
            self._end(job, self._lost)
        self._socket.close()

    def _take(self, message: Message, staging: Reach) -> None:
        match message:
            case Piece():
                self._piece(message, staging)
            case Push():
                self._pushes[message.number] = self._asked(message)
            case Pull():
                job = self._asked(message)
                if message.timeout is not None:
                    job.deadline = time.monotonic_ns() + int(message.timeout * 1e9)
                self._answers[message.number] = job
                self._jobs.put(job)
            case Cancel():
                if message.number in self._answers:  # else it has been sent
                    self._answers[message.number].stop[0] = 1
            case End(pull=True):
                job = self._open[message.number]
                self._end(job, job.error or message.error)
            case End():
                job = self._pushes.pop(message.number)
                self._send(Confirm(message.number, job.nbytes, job.error or message.error))
            case Confirm():
                job = self._open[message.number]
                job.nbytes = message.nbytes
                self._end(job, message.error)
            case Hello():
                raise ConnectionError("a second greeting")

    def _asked(self, message: Push | Pull) -> _Job:
        """What the other end wants written or read. It has checked its spans: wrong ones are another kind of other end."""
        offsets, lengths = (np.frombuffer(column, np.int64) for column in (message.offsets, message.lengths))
        try:
            spans = Spans(self._own.te, offsets, lengths)
            runs = pair(spans, spans)
            check_inside(self._own.te, self._own.nbytes, runs.source, runs.lengths)
        except ValueError as e:
            raise ConnectionError(str(e)) from None
        if isinstance(message, Push) and self._own.readonly:
            raise ConnectionError(f"the memory of TE {self._own.te} is read-only")
        return _Job(message.number, cut(spans, PIECE))

    def _piece(self, message: Piece, staging: Reach) -> None:
        job = (self._open if message.pull else self._pushes)[message.number]
        piece = job.pieces[job.arrived]
        if message.nbytes != piece.nbytes:
            raise ConnectionError(f"a piece of {message.nbytes} bytes where {piece.nbytes} were asked")
        self._group.recv([self._in[: piece.nbytes]], self._other, 0).wait()
        job.arrived += 1
        if job.completion is not None and job.completion.cancelling:
            job.error = "cancelled"  # this piece and those that are on their way are dropped
            self._send(Cancel(job.number))
        if job.error is None:
            landing = Runs(piece.target, piece.source, piece.lengths, piece.nbytes)
            try:
                job.nbytes += copy_runs(staging, self._own, landing, NEVER, 0)
            except OSError as e:  # a device's
                job.error = str(e)

    # ---- both ---------------------------------------------------------------------------------------------------------------

    def _end(self, job: _Job, error: str | None) -> None:
        with self._lock:
            if self._open.pop(job.number, None) is None:
                return
        assert job.completion is not None
        job.completion.nbytes = job.nbytes
        job.completion.seconds = time.monotonic() - job.began if job.began else 0.0
        job.completion.end(error)

    def _send(self, message: Message) -> None:
        data = msgspec.msgpack.encode(message)
        with self._sending:
            self._socket.sendall(LENGTH.pack(len(data)) + data)

    def _receive(self) -> Message | None:
        """None: the other end has closed the line."""
        head = self._bytes(LENGTH.size)
        return None if head is None else DECODER.decode(self._bytes(LENGTH.unpack(head)[0]) or b"")

    def _bytes(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            more = self._socket.recv(min(count - len(data), 1 << 20))
            if not more:
                if data:
                    raise ConnectionError("the line ended within a message")
                return None
            data += more
        return bytes(data)

    def _hello(self) -> Hello:
        with contextlib.suppress(msgspec.MsgspecError):
            hello = self._receive()
            if isinstance(hello, Hello):
                return hello
        raise ConnectionError("who is at the other end of the line speaks something else")

    @staticmethod
    def _live(sock: socket.socket) -> None:
        """Have the system find out about an end that is gone without a word, also while nothing is sent."""
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tcp = {"NODELAY": 1, "KEEPIDLE": PATIENCE // 3, "KEEPINTVL": PATIENCE // 6, "KEEPCNT": 4, "USER_TIMEOUT": PATIENCE * 1000}
        for name, value in tcp.items():
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)


def _packed(spans: Spans) -> tuple[bytes, bytes]:
    return np.ascontiguousarray(spans.offsets, np.int64).tobytes(), np.ascontiguousarray(spans.lengths, np.int64).tobytes()
