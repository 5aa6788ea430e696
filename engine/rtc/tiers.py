"""The TE's side of the DRAM and SSD tiers: background swap-out, lookup and prefetch, on a thread of its own.

The step loop asks (`look_up`, `fetch`, `swap_out`, `release`) and goes on; what came of it is in `take`, after `wake` was called.
Lookups and fetches, which a prompt waits for, go before swap-outs, block by block. A copy is one native call off the interpreter
lock. Everything here is soft: when the keeper is gone its pool is not used any more, every lookup finds nothing, and the prompts
are computed.

With several ranks this is the master's: it reaches the pools of all, and a block leaves with the heads of all in order. So what
is in a slot or a file says nothing of how many ranks wrote it.

Blocks given to `swap_out` and `fetch` belong to this thread until their event: the step loop must keep its references.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from engine import native
from engine.distflow import packed_block, pair, spans_between
from engine.rtc.cost import Costs, Tier
from engine.rtc.pool import geometry
from engine.rtc.ssd import Store, Torn, read_speed
from engine.rtc.wire import (
    FILE,
    KNOWN,
    MOST_KEYS,
    Demoted,
    Event,
    Fetched,
    Filed,
    Fill,
    Found,
    FromPool,
    Gone,
    Lost,
    Match,
    Matched,
    Offer,
    Placed,
    Put,
    Release,
    Saved,
    Stored,
    ToPool,
    Unlink,
)
from engine.types import Peer, UserError

log = logging.getLogger(__name__)

LARGEST_ANSWER = 1 << 18  # bytes: MOST_KEYS slots and generations are a tenth of it
# Blocks that are offered to the pool with one message: their slots are nobody's until they are all written.
PUT_AT_ONCE = 16
Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]
ZERO = np.zeros(1, np.int64)
PROBE_BYTES = 4 << 20  # what bandwidths are measured with: about a millisecond in memory, some on a disk
PROBES = 5  # the best of so many copies: what else the machine does while a TE starts is no part of its bandwidth
NO_STOP = np.zeros(1, np.int32)  # of ds_copy: a block is copied whole


@dataclass(slots=True)
class Access:
    """What a TE is given at its birth to reach the tiers. Descriptors are owned by the TE."""

    socket: int  # to the keeper
    model: bytes  # `ssd.fingerprint`
    pool: int  # memfd; -1: no DRAM tier
    slots: int
    slot_bytes: int
    folder: str  # of the SSD tier; "": none


class PoolGone(Exception):
    """The keeper has died, and its pool with it."""


class Tiers:
    """One TE's way to the slower tiers. Methods are called by the step loop; those that begin with `_` run on the thread."""

    def __init__(self, access: Access, kv: memoryview, here: Peer, wake: Callable[[], None]):
        """`kv`: the TE's own memory, all ranks' pools, which `here` describes. `wake` is called on the thread."""
        self.wake = wake
        self.sock = socket.socket(fileno=access.socket)
        self.block_bytes = access.slot_bytes
        packed = packed_block(here)
        self.runs = pair(*spans_between(here, packed, [0], [0]))  # of block 0, from the pool to a slot
        self.stride = here.block_size // here.layout.unit_tokens * here.layout.unit_stride  # bytes from one block to the next
        self.kv = np.frombuffer(kv, np.uint8)
        self.store = (
            Store(Path(access.folder), access.model, packed.layout, here.block_size, access.slot_bytes) if access.folder else None
        )
        self.generations, self.slots = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        if access.pool >= 0:
            first, nbytes = geometry(access.slots, access.slot_bytes)
            memory = np.frombuffer(native.map_slab(access.pool, nbytes, writable=True), np.uint8)
            os.close(access.pool)
            self.generations = memory[: access.slots * 8].view(np.uint64)
            self.slots = memory[first : first + access.slots * access.slot_bytes]
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder = msgspec.msgpack.Decoder(FromPool)
        self.fill = Fill()
        # Where blocks were stored or found, or that they are nowhere, in the order in which that was heard; None: nobody asks.
        self.news: deque[tuple[bytes, Tier | None]] | None = None
        self.gone = False  # the keeper, and the pool with it
        self.torn = 0  # blocks whose file or slot was not what it should have been
        self.failed_writes = 0
        self.events: deque[Event] = deque()
        self.urgent: deque[Callable[[], Event | None]] = deque()
        self.background: deque[Iterator[None]] = deque()
        self.due = threading.Condition()
        self.leaving = False
        self.deadline = 0.0  # once `leaving`; CLOCK_MONOTONIC seconds
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._work, name="deepserve-tiers", daemon=True)
        self.thread.start()

    # ---- the step loop's side ---------------------------------------------------------------------------------------
    def look_up(self, name: int, keys: list[bytes]) -> None:
        """Which of these blocks, that follow each other, there are. Answered by `Found`."""
        self._hurry(lambda: Found(name, keys, self._match(keys)))

    def fetch(self, name: int, found: Found, first: int, blocks: list[int]) -> None:
        """Copy what was found, from its offer `first` on, into `blocks`, and release all of it. Answered by `Fetched`."""
        self._hurry(lambda: self._fetch(name, found, first, blocks))

    def release(self, found: Found) -> None:
        """What was found is not wanted."""
        if any(offer.slot != FILE for offer in found.offers):
            self._hurry(lambda: self._release(found))

    def swap_out(self, blocks: list[int], keys: list[bytes], until: list[float]) -> None:
        """Keep these blocks in a slower tier, in this order, when there is nothing more urgent. Answered by `Saved`, in parts."""
        with self.due:
            self.background.append(self._swap_out(blocks, keys, until))
            self.due.notify()

    def take(self) -> list[Event]:
        """What has come about since the last call."""
        if self.failure is not None:
            raise self.failure
        events = []
        while self.events:
            events.append(self.events.popleft())
        return events

    def close(self, blocks: list[int], keys: list[bytes], until: list[float], seconds: float) -> None:
        """The TE leaves: put these blocks, and what is in DRAM alone, into files as far as the time goes, and end the thread."""
        if self.store is not None:
            with self.due:
                self.background.append(self._swap_out(blocks, keys, until, leaving=True))
        with self.due:
            self.leaving = True
            self.deadline = time.monotonic() + seconds
            self.due.notify()
        self.thread.join()
        self.sock.close()

    def _hurry(self, job: Callable[[], Event | None]) -> None:
        with self.due:
            self.urgent.append(job)
            self.due.notify()

    # ---- the thread -------------------------------------------------------------------------------------------------
    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as e:  # a bug: the step loop dies of it, since whoever waits for an answer would wait for ever
            self.failure = e
            self.wake()

    def _turn(self) -> bool:
        """Do the next thing, waiting for it; False where the TE leaves and all that there is time for is done."""
        with self.due:
            while not (self.urgent or self.background or self.leaving):
                self.due.wait()
            job = self.urgent.popleft() if self.urgent else None
        if job is not None:
            if (event := job()) is not None:
                self._tell(event)
        elif self.background and not (self.leaving and time.monotonic() > self.deadline):
            if next(self.background[0], self) is self:
                self.background.popleft()
        else:
            return False
        return True

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        self.wake()

    def _say(self, message: ToPool) -> None:
        """Raises `PoolGone`."""
        if self.gone:
            raise PoolGone
        try:
            self.sock.sendall(self.encoder.encode(message))
        except OSError:
            self._lose()

    def _ask(self, message: ToPool) -> FromPool:
        """Raises `PoolGone`."""
        self._say(message)
        try:
            data = self.sock.recv(LARGEST_ANSWER)
        except OSError:
            data = b""
        if not data:
            self._lose()
        answer = self.decoder.decode(data)
        self.fill = answer.fill
        self._note(answer.fill.on_ssd, "ssd")
        self._note(answer.fill.gone, None)
        return answer

    def _note(self, keys: list[bytes], tier: Tier | None) -> None:
        if self.news is not None:
            self.news.extend((key, tier) for key in keys)

    def _lose(self) -> NoReturn:
        self.gone = True
        self.fill = Fill()
        self.slots, self.generations = np.zeros(0, np.uint8), np.zeros(0, np.uint64)
        log.warning("event=kv_pool_lost the keeper is gone: this TE goes on without the DRAM and SSD tiers")
        self._tell(Gone())
        raise PoolGone

    # ---- lookups and fetches ----------------------------------------------------------------------------------------
    def _match(self, keys: list[bytes]) -> list[Offer]:
        offers: list[Offer] = []
        try:
            for at in range(0, len(keys), MOST_KEYS):
                part = keys[at : at + MOST_KEYS]
                answer = self._ask(Match(part))
                assert isinstance(answer, Matched)
                offers += map(Offer, answer.slots, answer.generations)
                there = list(zip(part, answer.slots, strict=False))
                self._note([key for key, slot in there if slot != FILE], "dram")
                self._note([key for key, slot in there if slot == FILE], "ssd")
                self._note(part[len(there) :][:1], None)
                if len(answer.slots) < len(part):
                    break
        except PoolGone:
            return []
        return offers

    def _fetch(self, name: int, found: Found, first: int, blocks: list[int]) -> Fetched:
        counts: dict[Tier, int] = {"dram": 0, "ssd": 0}
        seconds: dict[Tier, float] = {"dram": 0.0, "ssd": 0.0}
        for block, key, offer in zip(blocks, found.keys[first:], found.offers[first:], strict=False):
            began = time.perf_counter()
            try:
                whole = self._read_file(key, block) if offer.slot == FILE else self._read_slot(offer, block)
            except PoolGone:
                whole = False
            if not whole:
                break
            counts[offer.tier] += 1
            seconds[offer.tier] += time.perf_counter() - began
        self._release(found)
        return Fetched(name, counts, seconds)

    def _release(self, found: Found) -> None:
        keys = [key for key, offer in zip(found.keys, found.offers, strict=False) if offer.slot != FILE]
        with contextlib.suppress(PoolGone):
            for at in range(0, len(keys), MOST_KEYS):
                self._say(Release(keys[at : at + MOST_KEYS]))

    def _read_slot(self, offer: Offer, block: int) -> bool:
        """Copy a slot into a block; False where the slot has passed to another block meanwhile."""
        self._copy_in(block, self._slot(offer.slot))
        if int(self.generations[offer.slot]) == offer.generation:
            return True
        self.torn += 1
        return False

    def _read_file(self, key: bytes, block: int) -> bool:
        """Copy a file into a block; False where there is none, or none of ours: that one is deleted."""
        assert self.store is not None
        try:
            self.store.read(key)
        except FileNotFoundError:  # made room for another between the answer and now
            self._say(Lost(key))
            self._note([key], None)
            return False
        except Torn as e:
            self.torn += 1
            log.warning("event=torn_kv_file file=%s why=%s", self.store.path(key).name, e)
            self.store.delete(key)
            self._say(Lost(key))
            self._note([key], None)
            return False
        self._copy_in(block, np.frombuffer(self.store.payload, np.uint8))
        return True

    # ---- swap-out ---------------------------------------------------------------------------------------------------
    def _swap_out(self, blocks: list[int], keys: list[bytes], until: list[float], leaving: bool = False) -> Iterator[None]:
        for at in range(0, max(1, len(blocks)), PUT_AT_ONCE):
            part = slice(at, at + PUT_AT_ONCE)
            kept = [False] * len(blocks[part])
            try:
                answer = self._ask(Put(keys[part], until[part], leaving))
                assert isinstance(answer, Placed)
                stored = []
                for i, (block, key, slot) in enumerate(zip(blocks[part], keys[part], answer.slots, strict=True)):
                    if slot >= 0:
                        self._copy_out(block, self._slot(slot))
                        stored.append(key)
                    kept[i] = slot >= 0 or slot == KNOWN or (slot == FILE and self._file_block(block, key, until[at + i]))
                    yield
                if stored:
                    self._say(Stored(stored))
                    self._note(stored, "dram")
                while answer.demote:
                    yield from self._demote(answer.demote)
                    if not leaving or at + PUT_AT_ONCE < len(blocks):
                        break
                    answer = self._ask(Put([], [], leaving))
                    assert isinstance(answer, Placed)
            except PoolGone:
                pass
            self._tell(Saved(blocks[part], kept))

    def _demote(self, demoted: list[Demoted]) -> Iterator[None]:
        """Write files of blocks that are in DRAM."""
        assert self.store is not None
        for one in demoted:
            self.store.payload[:] = self._slot(one.slot).data
            if int(self.generations[one.slot]) == one.generation:
                self._write_file(one.key, one.until)
            self._say(Release([one.key]))
            yield

    def _file_block(self, block: int, key: bytes, until: float) -> bool:
        assert self.store is not None
        self._copy_out(block, np.frombuffer(self.store.payload, np.uint8))
        if not self._write_file(key, until):
            return False
        self._note([key], "ssd")
        return True

    def _write_file(self, key: bytes, until: float) -> bool:
        """Write what is in the store's payload; whether the disk took it."""
        assert self.store is not None
        try:
            nbytes = self.store.write(key)
        except OSError as e:
            self.failed_writes += 1
            if self.failed_writes == 1:
                log.warning("event=kv_file_not_written folder=%s why=%s (told once; counted in metrics)", self.store.folder, e)
            return False
        answer = self._ask(Filed(key, nbytes, until))
        assert isinstance(answer, Unlink)
        for name in answer.names:
            self.store.unlink(name)
        return True

    def _slot(self, slot: int) -> Bytes:
        """A slot's memory. Raises `PoolGone`: between two blocks of a swap-out other questions are asked, and one of them may
        have found that out."""
        if self.gone:
            raise PoolGone
        return self.slots[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    # ---- copies -----------------------------------------------------------------------------------------------------
    def _copy_in(self, block: int, source: Bytes) -> None:
        copy(self.kv, self.runs.source + block * self.stride, source, self.runs.target, self.runs.lengths)

    def _copy_out(self, block: int, target: Bytes) -> None:
        copy(target, self.runs.target, self.kv, self.runs.source + block * self.stride, self.runs.lengths)


def copy(target: Bytes, to: Int64s, source: Bytes, at: Int64s, lengths: Int64s) -> None:
    """Runs of bytes from one memory to another, in one native call off the interpreter lock."""
    native.load().copy(
        target.ctypes.data,
        source.ctypes.data,
        to.ctypes.data,
        at.ctypes.data,
        lengths.ctypes.data,
        len(lengths),
        NO_STOP.ctypes.data,
        0,
    )


def measured(access: Access, block_tokens: int, prefill: float) -> Costs:
    """The load-or-recompute rule with this machine's constants; `prefill`: tokens a second. Raises `UserError` where the folder
    of the SSD tier takes no file."""
    costs = Costs(block_tokens, access.slot_bytes, prefill)
    if access.pool >= 0:
        source, target = np.ones(PROBE_BYTES, np.uint8), np.ones(PROBE_BYTES, np.uint8)  # written, so that there is memory
        took = []
        for _ in range(PROBES):
            began = time.perf_counter()
            copy(target, ZERO, source, ZERO, np.array([PROBE_BYTES]))
            took.append(time.perf_counter() - began)
        costs.bandwidth["dram"] = PROBE_BYTES / min(took)
    if access.folder:
        try:
            costs.bandwidth["ssd"] = read_speed(Path(access.folder), PROBE_BYTES)
        except OSError as e:
            raise UserError(f"--kv-ssd-dir {access.folder}: {e.strerror}; name a folder with room", "kv_ssd_dir") from None
    return costs
