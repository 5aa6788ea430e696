"""DistFlow: copies between memories, a TE's own and those of the TEs it is linked with. `link_cluster`, `transfer`.

Knows addresses, not sequences: who may read or write which bytes when is the caller's to know. A transfer runs on DistFlow's own
thread, in order of submission, as one native call off the interpreter lock; its `Completion` tells how it ended. Once that is
done nothing of the transfer touches memory any more, however it ended.

    own TE                           other TE on the same box
    kv.pool.view <-- transfer() --> its pool: a memfd mapped here through /proc/<pid>/fd/<fd> (`types.Memory`),
                                    or an accelerator's memory, opened by the name it was exported under (`types.DeviceMemory`)

TEs on other boxes are reached by `engine/devices/remote.py`, which has the same `transfer`. The lower part of this file turns
blocks of a KV pool into spans of bytes, also between pools that hold other shares of the heads.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import queue
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from engine import native
from engine.devices.kv_pool import open_memory
from engine.native import ipc
from engine.native.ipc import DeviceRange
from engine.types import KVLayout, Memory, Peer, UserError

log = logging.getLogger(__name__)

Int64s = npt.NDArray[np.int64]


class Spans(NamedTuple):
    """Runs of bytes in one TE's memory, read or written one after another."""

    te: int
    offsets: Int64s  # bytes from the start of the memory
    lengths: Int64s  # bytes

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum())


# ---- how a transfer ends ---------------------------------------------------------------------------------------------------


class Completion:
    """The end of a transfer, whichever it is. `error`, `nbytes` and `seconds` say something once it is done."""

    def __init__(self, on_done: Callable[[Completion], None] | None = None):
        self.error: str | None = None  # None: every byte has been copied
        self.nbytes = 0  # copied
        self.seconds = 0.0  # that the copy took, without waiting for its turn and its gate
        self.stop = np.zeros(1, np.int32)  # read by the native copy
        self.cancelling = False
        self._ended = threading.Event()
        self._on_done = on_done

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is done, after at most `timeout` seconds."""
        return self._ended.wait(timeout)

    def cancel(self) -> None:
        """Have it end soon: a copy stops within a few hundred KiB, one that hasn't begun won't. Done comes as ever, and with no
        error where the copy was through already."""
        self.cancelling = True
        self.stop[0] = 1

    @property
    def cancelled(self) -> bool:
        """It ended unfinished because of `cancel`."""
        return self.error == "cancelled"

    def end(self, error: str | None) -> None:
        """Called once, by the backend that ran it."""
        self.error = error
        self._ended.set()
        if self._on_done is not None:
            try:
                self._on_done(self)
            except Exception:  # the transfers behind this one are other callers'
                log.exception("on_done of a transfer")


# ---- links -----------------------------------------------------------------------------------------------------------------


class Reach:
    """A TE's memory, in reach of this process for as long as somebody holds this object."""

    def __init__(self, te: int, memory: memoryview | DeviceRange, pidfd: int = -1):
        """`pidfd`: of the process whose memory it is, if not of this one; closed with this object."""
        self.te = te
        self.memory = memory
        self.nbytes = memory.nbytes
        if isinstance(memory, DeviceRange):
            self.address, self.readonly = memory.address, False
        else:
            self.address, self.readonly = int(np.frombuffer(memory, np.uint8).ctypes.data), memory.readonly
        self.unlinked = False
        self._process = select.poll()
        if pidfd >= 0:
            self._process.register(pidfd, select.POLLIN)
            weakref.finalize(self, os.close, pidfd).atexit = False

    @staticmethod
    def open(peer: Peer, device: int | None) -> Reach:
        """`device`: which of this process's devices is to reach a device's memory; None: the one of the same number.
        Raises `UserError` where the memory is gone or could shrink below a copy."""
        memory = peer.memory
        with contextlib.ExitStack() as undo:
            try:
                pidfd = os.pidfd_open(memory.pid)  # first: once the memory proves to be the right one, so was the process
                undo.callback(os.close, pidfd)
                if isinstance(memory, Memory):
                    fd = open_memory(memory)
                    undo.callback(os.close, fd)
                    return Reach(peer.te, _map(fd, memory), os.dup(pidfd))
                opened = ipc.open_range(memory.kind, memory.device if device is None else device, memory.name, memory.nbytes)
            except (OSError, UserError) as e:
                raise UserError(f"TE {peer.te} (process {memory.pid}) can't be linked: {e}") from None
            link = Reach(peer.te, opened, os.dup(pidfd))
            weakref.finalize(link, _close, opened, memory.name).atexit = False
            return link

    def obstacle(self) -> str | None:
        if self.unlinked:
            return f"TE {self.te} was unlinked"
        if self._process.poll(0):
            return f"TE {self.te} has ended"
        return None


def _close(memory: DeviceRange, name: bytes) -> None:
    try:
        ipc.close_range(memory, name)
    except OSError as e:  # whose memory it was may be gone, and nobody waits for this
        log.warning("closing memory of another process: %s", e)


def _map(fd: int, memory: Memory) -> memoryview:
    # A mapping of pages that a memfd no longer has kills its reader with SIGBUS.
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise UserError("its memory could shrink under its readers; seal it with F_SEAL_SHRINK")
    return native.map_slab(fd, memory.nbytes, writable=True)


def copy_runs(source: Reach, target: Reach, runs: Runs, stop: npt.NDArray[np.int32], deadline: int) -> int:
    """The bytes copied. Raises `OSError` where a device fails."""
    arguments = (
        target.address,
        source.address,
        *(column.ctypes.data for column in (runs.target, runs.source, runs.lengths)),
        len(runs.lengths),
        stop.ctypes.data,
        deadline,
    )
    devices = [link.memory for link in (source, target) if isinstance(link.memory, DeviceRange)]
    if not devices:
        return native.load().copy(*arguments)
    if len(devices) == 2:
        direction = ipc.Direction.WITHIN
    else:
        direction = ipc.Direction.TO_DEVICE if devices[0] is target.memory else ipc.Direction.TO_HOST
    copied = native.load().ipc_copy(devices[-1].kind.encode(), devices[-1].device, direction, *arguments)
    if copied < 0:
        raise OSError(ipc.error())
    return copied


@dataclass(eq=False, slots=True)
class _Transfer:
    completion: Completion
    source: Reach | str  # or why there is none
    target: Reach | str
    runs: Runs
    deadline: int  # CLOCK_MONOTONIC ns; 0: none
    after: Callable[[], None] | None


class DistFlow:
    """One TE's end of its links. All methods may be called from any thread."""

    def __init__(self, own: memoryview | DeviceRange | None, te: int):
        """`own`: the memory that spans of `te` lie in; None where there is none to copy from or to. A device's memory is copied
        on a stream of DistFlow's own: a transfer's gate waits for the kernels that write what is read."""
        self.te = te
        self._device = own.device if isinstance(own, DeviceRange) else None
        self._links: dict[int, Reach] = {} if own is None else {te: Reach(te, own)}
        self._peers: dict[int, Peer] = {}
        self._queue: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._running: _Transfer | None = None
        self._closed = False

    # ---- control ---------------------------------------------------------------------------------------------------------

    def link_cluster(self, peers: Sequence[Peer]) -> None:
        """Map each peer's memory, for reading and writing; a TE linked before with other memory gets the new one. All or none.
        Raises `UserError` naming the TE that can't be reached."""
        fresh = [peer for peer in peers if self._peers.get(peer.te) != peer]
        if any(peer.te == self.te for peer in fresh):
            raise ValueError(f"TE {self.te} can't be linked with itself")
        links = [Reach.open(peer, self._device) for peer in fresh]
        for peer, link in zip(fresh, links, strict=True):
            self.unlink(peer.te)
            with self._lock:
                self._links[peer.te], self._peers[peer.te] = link, peer

    def unlink(self, te: int) -> None:
        """Forget a peer. Transfers with it that are not done end with an error; an unknown one is ignored."""
        with self._lock:
            if self._peers.pop(te, None) is None:
                return
            link = self._links.pop(te)
            link.unlinked = True
            running = self._running
        if running is not None and link in (running.source, running.target):
            running.completion.stop[0] = 1

    def peer(self, te: int) -> Peer:
        """What a linked TE said of itself. Raises `KeyError`."""
        return self._peers[te]

    # ---- data ------------------------------------------------------------------------------------------------------------

    def transfer(
        self,
        src: Spans,
        dst: Spans,
        *,
        timeout: float | None = None,
        on_done: Callable[[Completion], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> Completion:
        """Copy the bytes of `src`, in order, to those of `dst`; the two may be cut differently. Returns at once.

        `timeout`: seconds from now on, in which it is to be done. `after` is called before the copy, on DistFlow's thread, and
        returns when the bytes are there to be read; all later transfers wait behind it, so it must end, and what it raises ends
        the transfer. `on_done` is called on that thread too. A TE that isn't linked or has ended is an error of the transfer.
        Raises `ValueError`, with nothing copied, for spans that do not fit each other or their memory.
        """
        runs = pair(src, dst)
        completion = Completion(on_done)
        deadline = 0 if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
        with self._lock:
            if self._closed:
                raise RuntimeError("DistFlow is closed")
            source, target = (self._links.get(spans.te, f"TE {spans.te} is not linked") for spans in (src, dst))
            for link, offsets in ((source, runs.source), (target, runs.target)):
                if isinstance(link, Reach):
                    check_inside(link.te, link.nbytes, offsets, runs.lengths)
            if isinstance(target, Reach) and target.readonly:
                raise ValueError(f"the memory of TE {target.te} is read-only")
            self._queue.put(_Transfer(completion, source, target, runs, deadline, after))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="distflow")
                self._thread.start()
        return completion

    def close(self) -> None:
        """End every transfer, with an error where it isn't through, and the thread; unlink all. Waits for a gate to return."""
        with self._lock:
            self._closed = True
            running, thread = self._running, self._thread
            self._queue.put(None)
        if running is not None:
            running.completion.stop[0] = 1
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for te in list(self._peers):
            self.unlink(te)
        self._links.clear()

    def _work(self) -> None:
        while (transfer := self._queue.get()) is not None:
            self._running = transfer  # before it is looked at: unlink and close mark first, then stop the running one
            error = self._run(transfer)
            self._running = None
            transfer.completion.end(error)
            del transfer  # what it holds must not live until the next one comes

    def _run(self, transfer: _Transfer) -> str | None:
        obstacle = self._obstacle(transfer)
        if obstacle is None and transfer.after is not None:
            try:
                transfer.after()
            except Exception as e:
                return f"waiting for the source: {type(e).__name__}: {e}"
            obstacle = self._obstacle(transfer)
        if obstacle is not None:
            return obstacle
        source, target, runs, completion = transfer.source, transfer.target, transfer.runs, transfer.completion
        assert isinstance(source, Reach) and isinstance(target, Reach)
        began = time.monotonic()
        try:
            completion.nbytes = copy_runs(source, target, runs, completion.stop, transfer.deadline)
        except OSError as e:
            return str(e)
        completion.seconds = time.monotonic() - began
        if completion.nbytes < runs.nbytes:
            return self._obstacle(transfer)
        return target.obstacle() or source.obstacle()  # with nobody there to use it, or half of it written, it is no copy

    def _obstacle(self, transfer: _Transfer) -> str | None:
        """Why the transfer should end where it is."""
        if transfer.completion.cancelling:
            return "cancelled"
        if self._closed:
            return "DistFlow was closed"
        for link in (transfer.source, transfer.target):
            why = link if isinstance(link, str) else link.obstacle()
            if why is not None:
                return why
        if transfer.deadline and time.monotonic_ns() >= transfer.deadline:
            return "timed out"
        return None


# ---- spans -----------------------------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    """What one native copy moves: equal runs on both sides."""

    source: Int64s
    target: Int64s
    lengths: Int64s
    nbytes: int


def pair(src: Spans, dst: Spans) -> Runs:
    """Both sides cut wherever one of them is. Raises `ValueError`."""
    arrays = [np.ascontiguousarray(a, np.int64) for a in (src.offsets, src.lengths, dst.offsets, dst.lengths)]
    source, source_lengths, target, target_lengths = arrays
    for te, offsets, lengths in ((src.te, source, source_lengths), (dst.te, target, target_lengths)):
        if offsets.ndim != 1 or offsets.shape != lengths.shape:
            raise ValueError(f"spans of TE {te}: {offsets.shape} offsets and {lengths.shape} lengths")
        if (lengths < 0).any() or (offsets < 0).any():
            raise ValueError(f"spans of TE {te}: a negative offset or length")
    if np.array_equal(source_lengths, target_lengths):
        return Runs(source, target, source_lengths, int(source_lengths.sum()))
    source_ends, target_ends = np.cumsum(source_lengths), np.cumsum(target_lengths)
    if source_ends[-1:].sum() != target_ends[-1:].sum():
        raise ValueError(f"spans of {src.nbytes} bytes can't be copied to spans of {dst.nbytes} bytes")
    ends = np.union1d(source_ends, target_ends)
    ends = ends[ends > 0]
    starts = np.concatenate((np.zeros(1, np.int64), ends))[:-1]

    def at(offsets: Int64s, lengths: Int64s, span_ends: Int64s) -> Int64s:
        span = np.searchsorted(span_ends, starts, side="right")  # to the right: an empty span holds nothing
        return offsets[span] + starts - (span_ends - lengths)[span]

    runs = at(source, source_lengths, source_ends), at(target, target_lengths, target_ends)
    return Runs(*runs, ends - starts, int(ends[-1]) if len(ends) else 0)


def check_inside(te: int, nbytes: int, offsets: Int64s, lengths: Int64s) -> None:
    """Raises `ValueError` for runs that reach beyond the end of a TE's memory of `nbytes`."""
    bad = np.flatnonzero((lengths > nbytes) | (offsets > nbytes - lengths))
    if len(bad):
        raise ValueError(f"spans of TE {te}: {lengths[bad[0]]} bytes at {offsets[bad[0]]} are outside its {nbytes}")


def block_spans(
    layout: KVLayout,
    block_size: int,
    blocks: Sequence[int] | Int64s,
    *,
    layers: range | None = None,
    heads: range | None = None,
    rank: int = 0,
) -> tuple[Int64s, Int64s]:
    """(offsets, lengths) of KV blocks in a rank's pool, in bytes: of all layers or a range of them, of all its
    heads or a range of them.

    What lies apart furthest comes first, blocks in the order given, so that neighbours are one span; two pools between which
    `check_exchange` allows copies have their bytes in the same order. Raises `ValueError` for what the pool doesn't have.
    """
    units_each, rest = divmod(block_size, layout.unit_tokens)
    held = layout.units // units_each if units_each and not rest else 0
    wanted = np.asarray(blocks, np.int64)
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < held:
        raise ValueError(f"blocks {wanted.min()} to {wanted.max()} of {block_size} tokens, of a pool that has {held}")
    layers = range(layout.layers) if layers is None else layers
    if layers.step != 1 or not 0 <= layers.start <= layers.stop <= layout.layers:
        raise ValueError(f"layers {layers} of a pool of {layout.layers}")
    heads = range(layout.heads) if heads is None else heads
    if heads.step != 1 or not 0 <= heads.start <= heads.stop <= layout.heads:
        raise ValueError(f"heads {heads} of a pool of {layout.heads}")
    if not 0 <= rank < layout.ranks:
        raise ValueError(f"rank {rank} of a TE of {layout.ranks}")
    units = wanted if units_each == 1 else (wanted[:, None] * units_each + np.arange(units_each)).reshape(-1)
    outside, inside, length = _around_units(layout, layers, heads)
    places = rank * layout.rank_stride + units * layout.unit_stride
    return _merged((outside + places[:, None] + inside).reshape(-1), length)


@functools.lru_cache(maxsize=1024)  # a layer's copy is prepared for every step
def _around_units(layout: KVLayout, layers: range, heads: range) -> tuple[Int64s, Int64s, int]:
    """What is added to a unit's place: by the axes outside of units [n, 1, 1], by those inside [n]; and the bytes of each run."""
    axes = {"layer": np.array(layers, np.int64) * layout.layer_stride, "part": np.arange(layout.parts) * layout.part_stride}
    outside, inside = np.zeros(1, np.int64), np.array([heads.start * layout.head_bytes])
    order = nesting(layout)
    for axis in order[: order.index("unit")]:
        outside = (outside[:, None] + axes[axis]).reshape(-1)
    for axis in order[order.index("unit") + 1 :]:
        inside = (inside[:, None] + axes[axis]).reshape(-1)
    length = len(heads) * layout.head_bytes
    starts, lengths = _merged(inside, length)
    if len(set(lengths.tolist())) == 1:
        inside, length = starts, int(lengths[0])
    return outside[:, None, None], inside, length


def _merged(offsets: Int64s, length: int) -> tuple[Int64s, Int64s]:
    """Runs of `length` bytes each, with those that follow each other in memory made one."""
    if not length or not len(offsets):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate(([True], offsets[1:] != offsets[:-1] + length)))
    return offsets[starts], np.diff(starts, append=len(offsets)) * length


def nesting(layout: KVLayout) -> list[str]:
    """The axes of a pool, from the one whose steps are the longest inwards."""
    strides = {"layer": layout.layer_stride, "part": layout.part_stride, "unit": layout.unit_stride}
    return sorted(strides, key=lambda axis: -strides[axis])


def check_exchange(a: KVLayout, b: KVLayout) -> None:
    """Raises `UserError` unless bytes copied between two such pools mean the same in both."""
    for field in ("format", "layers", "parts", "unit_tokens", "head_bytes"):
        if getattr(a, field) != getattr(b, field):
            raise UserError(f"KV pools with {field} {getattr(a, field)} and {getattr(b, field)} can't exchange blocks")
    if nesting(a) != nesting(b):
        raise UserError(f"KV pools nested by {nesting(a)} and {nesting(b)} can't exchange blocks")


def spans_between(
    source: Peer, target: Peer, source_blocks: Sequence[int], target_blocks: Sequence[int], *, layers: range | None = None
) -> tuple[Spans, Spans]:
    """Blocks of one TE and as many of another, of all layers or some, as spans whose bytes come in the same order, whatever the
    ranks that each TE has. Raises `ValueError`."""
    here, there = source.layout, target.layout
    parts: list[tuple[tuple[Int64s, Int64s], tuple[Int64s, Int64s]]] = []
    for part in slices(here.heads * here.ranks, here.ranks, there.ranks):
        parts.append(
            (
                block_spans(here, source.block_size, source_blocks, layers=layers, heads=part.source, rank=part.source_rank),
                block_spans(there, target.block_size, target_blocks, layers=layers, heads=part.target, rank=part.target_rank),
            )
        )
    ours, theirs = ([np.concatenate(column) for column in zip(*side, strict=True)] for side in zip(*parts, strict=True))
    return Spans(source.te, *ours), Spans(target.te, *theirs)


def packed_block(peer: Peer) -> Peer:
    """A block of a TE with the heads of all its ranks and nothing between: as one rank has it that has no other block."""
    layout = peer.layout
    counts = {"layer": layout.layers, "part": layout.parts, "unit": peer.block_size // layout.unit_tokens}
    heads = layout.heads * layout.ranks
    strides, nbytes = {}, heads * layout.head_bytes
    for axis in reversed(nesting(layout)):
        strides[axis] = nbytes
        nbytes *= counts[axis]
    packed = msgspec.structs.replace(
        layout,
        layer_stride=strides["layer"],
        part_stride=strides["part"],
        units=counts["unit"],
        unit_stride=strides["unit"],
        heads=heads,
        ranks=1,
        rank_stride=0,
    )
    return msgspec.structs.replace(peer, layout=packed)


class Slice(NamedTuple):
    """Heads that one rank of the source and one of the target both hold, counted in each."""

    source_rank: int
    source: range
    target_rank: int
    target: range


def slices(heads: int, source_ranks: int, target_ranks: int) -> Iterator[Slice]:
    """How the KV of `heads` heads, split evenly among some ranks, gets to another number of ranks."""
    each, other = heads // source_ranks, heads // target_ranks
    if each * source_ranks != heads or other * target_ranks != heads:
        raise ValueError(f"{heads} heads can't be split among {source_ranks} and {target_ranks} ranks")
    for i in range(source_ranks):
        for j in range(i * each // other, ((i + 1) * each - 1) // other + 1):
            first, last = max(i * each, j * other), min((i + 1) * each, (j + 1) * other)
            yield Slice(i, range(first - i * each, last - i * each), j, range(first - j * other, last - j * other))
