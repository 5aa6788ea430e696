"""The index of the DRAM and SSD tiers: what the keeper knows of them. Pure: no memory, no files, no sockets, no clock of its own.

The keeper is the only allocator. A slot of the DRAM pool is in exactly one of four conditions:

    free      on the free list
    writing   given to a TE, which copies a block into it; found by nobody
    idle      found by its key, waits to be matched or evicted
    pinned    found by its key, being read by one or more TEs

Every slot has a generation, which grows each time the slot is given out for writing. It lies in the pool's own memory too: a
reader compares it after its copy, so that even a reader whose pins the keeper took for dead never takes one block for another.
A TE's pins, and the slots it was writing, die with its socket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.rtc.order import Order, Place
from engine.rtc.wire import (
    FILE,
    KNOWN,
    NOWHERE,
    Demoted,
    Filed,
    Fill,
    FromPool,
    Lost,
    Match,
    Matched,
    Placed,
    Put,
    Release,
    Stored,
    ToPool,
    Unlink,
)

# Blocks are copied on to files while fewer than this share of the slots could be taken without losing a block.
LOW_SHARE = 1 / 4
# ... so many with one answer: 16 blocks of the default model are 6 MB, some tens of milliseconds of a TE's tier thread.
DEMOTED_AT_ONCE = 16
PAGE, HUGE_PAGE = 4096, 2 << 20  # bytes


@dataclass(slots=True)
class Block:
    """A block in DRAM."""

    slot: int
    generation: int
    until: float
    writer: int = -1  # the TE that is writing it; -1: written
    pins: int = 0
    place: Place | None = None  # in `idle`, where nobody has asked for it since it was pinned to be written to a file


class Dram:
    """Who lies in which slot."""

    def __init__(self, slots: int, mark: Callable[[int, int], None]):
        """`mark(slot, generation)` puts a slot's new generation where readers look."""
        self.slots = slots
        self.mark = mark
        self.free = list(range(slots - 1, -1, -1))
        self.generations = [0] * slots
        self.blocks: dict[bytes, Block] = {}
        self.idle: Order[bytes] = Order()
        self.cold: Order[bytes] = Order()  # written blocks that are in no file
        self.pins: dict[int, Counter[bytes]] = {}  # TE -> key -> how often
        self.evictions = 0
        self.left: list[bytes] = []  # evicted, and no TE was told

    def put(self, te: int, key: bytes, until: float, now: float) -> tuple[int, int]:
        """A slot to write `key` into and its generation; or KNOWN, or NOWHERE."""
        known = self.blocks.get(key)
        if known is not None:
            known.until = max(known.until, until)
            if key in self.idle:
                self.idle.add(key, now, known.until)
            return KNOWN, 0
        if self.free:
            slot = self.free.pop()
        else:
            oldest = self.idle.first(now)
            if oldest is None:
                return NOWHERE, 0
            slot = self.evict(oldest)
        self.generations[slot] += 1
        self.mark(slot, self.generations[slot])
        self.blocks[key] = Block(slot, self.generations[slot], until, writer=te)
        return slot, self.generations[slot]

    def evict(self, key: bytes) -> int:
        """Forget an idle block; its slot."""
        self.idle.discard(key)
        self.cold.discard(key)
        self.evictions += 1
        self.left.append(key)
        return self.blocks.pop(key).slot

    def stored(self, te: int, key: bytes, now: float, filed: bool) -> None:
        """`te` has written `key`, which can be found now; `filed`: there is a file of it too."""
        block = self.blocks.get(key)
        if block is None or block.writer != te:
            return
        block.writer = -1
        self.idle.add(key, now, block.until)
        if not filed:
            self.cold.add(key, now, block.until)

    def pin(self, te: int, key: bytes) -> Block | None:
        """The written block called `key`, pinned; or None."""
        block = self.blocks.get(key)
        if block is None or block.writer >= 0:
            return None
        self.idle.discard(key)
        block.place = None
        block.pins += 1
        self.pins.setdefault(te, Counter())[key] += 1
        return block

    def release(self, te: int, key: bytes, now: float) -> None:
        """Take back one pin; what was not pinned is ignored, since a TE may release after its pins died."""
        held = self.pins.get(te)
        if held is None or not held[key]:
            return
        held[key] -= 1
        if not held[key]:
            del held[key]
        block = self.blocks[key]
        block.pins -= 1
        if block.pins:
            return
        if block.place is not None:
            self.idle.put_back(key, block.place, now)
            block.place = None
        else:
            self.idle.add(key, now, block.until)

    def leave(self, te: int, now: float) -> None:
        """A TE has died: its pins go, and what it was writing."""
        for key, count in list(self.pins.get(te, Counter()).items()):
            for _ in range(count):
                self.release(te, key, now)
        self.pins.pop(te, None)
        for key in [key for key, block in self.blocks.items() if block.writer == te]:
            self.free.append(self.blocks.pop(key).slot)

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. For tests."""
        used = [block.slot for block in self.blocks.values()]
        assert sorted(used + self.free) == list(range(self.slots)), "a slot is lost or owned twice"
        held: Counter[bytes] = Counter()
        for counts in self.pins.values():
            held.update(counts)
        for key, block in self.blocks.items():
            assert block.generation == self.generations[block.slot]
            assert block.pins == held[key], f"{key!r} has {block.pins} pins, {held[key]} are known"
            assert (key in self.idle) == (block.writer < 0 and not block.pins)
        assert set(held) | set(self.idle) | set(self.cold) <= set(self.blocks)


class Files:
    """Which files there are, least recently used first, in so many bytes."""

    def __init__(self, limit: int, there: Iterable[tuple[str, int, float]] = (), now: float = 0.0):
        """`there`: (name, bytes, age in seconds) of files from before, of this model and of others."""
        self.limit = limit
        self.sizes: dict[str, int] = {}
        self.order: Order[str] = Order()
        self.total = 0
        self.evictions = 0
        for name, nbytes, age in sorted(there, key=lambda file: -file[2]):
            self.sizes[name] = nbytes
            self.order.add(name, now - age)
            self.total += nbytes

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def use(self, name: str, now: float, until: float = 0.0) -> None:
        self.order.add(name, now, max(until, self.order.until(name)))

    def add(self, name: str, nbytes: int, now: float, until: float = 0.0) -> list[str]:
        """A file is there: the names of those that have to go for it."""
        self.total += nbytes - self.sizes.get(name, 0)
        self.sizes[name] = nbytes
        self.order.add(name, now, until)
        return self.shrink(now)

    def shrink(self, now: float) -> list[str]:
        gone = []
        while self.total > self.limit:
            name = self.order.pop(now)
            self.total -= self.sizes.pop(name)
            self.evictions += 1
            gone.append(name)
        return gone

    def forget(self, name: str) -> None:
        if name in self.sizes:
            self.order.discard(name)
            self.total -= self.sizes.pop(name)

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. For tests."""
        assert self.total == sum(self.sizes.values()) and set(self.order) == set(self.sizes)


class Pool:
    """Both tiers of one packed model: answers what TEs ask."""

    def __init__(self, dram: Dram | None, slot_bytes: int, files: Files | None, name: Callable[[bytes], str]):
        """`name`: of the file of a key."""
        self.dram = dram
        self.slot_bytes = slot_bytes
        self.files = files
        self.name = name
        self.unlinking: list[str] = files.shrink(0.0) if files is not None else []  # where the limit is lower than last time
        self.told: dict[str, bytes] = {}  # files that TEs know of, and their keys
        self.left: list[bytes] = []  # of those that are gone, and no TE was told

    def answer(self, te: int, message: ToPool, now: float) -> FromPool | None:
        """What `te` is told, if it is to be told anything."""
        match message:
            case Put():
                return self.put(te, message, now)
            case Match():
                return self.match(te, message, now)
            case Filed():
                return self.take_file(message, now)
            case Stored() if self.dram is not None:
                for key in message.keys:
                    self.dram.stored(te, key, now, self.filed(key))
            case Release() if self.dram is not None:
                for key in reversed(message.keys):  # the last of a chain becomes idle, and goes, first
                    self.dram.release(te, key, now)
            case Lost() if self.files is not None:
                self.files.forget(self.name(message.key))
                self.told.pop(self.name(message.key), None)
        return None

    def put(self, te: int, message: Put, now: float) -> Placed:
        slots, generations = [], []
        for key, until in zip(message.keys, message.until, strict=True):
            slot, generation = self.place(te, key, until, now, message.leaving)
            slots.append(slot)
            generations.append(generation)
        return Placed(slots, generations, self.demote(te, now, message.leaving), self.fill())

    def place(self, te: int, key: bytes, until: float, now: float, leaving: bool) -> tuple[int, int]:
        filed = self.filed(key)
        if filed:
            assert self.files is not None
            self.files.use(self.name(key), now, until)
        if self.dram is not None and (not leaving or key in self.dram.blocks):
            return self.dram.put(te, key, until, now)
        if self.files is None:
            return NOWHERE, 0
        return (KNOWN if filed else FILE), 0

    def filed(self, key: bytes) -> bool:
        return self.files is not None and self.name(key) in self.files

    def match(self, te: int, message: Match, now: float) -> Matched:
        slots, generations = [], []
        for key in message.keys:
            block = self.dram.pin(te, key) if self.dram is not None else None
            if block is not None:
                slots.append(block.slot)
                generations.append(block.generation)
            elif self.files is not None and (name := self.name(key)) in self.files:
                self.files.use(name, now)
                self.told[name] = key
                slots.append(FILE)
                generations.append(0)
            else:
                break
        return Matched(slots, generations, self.fill())

    def take_file(self, message: Filed, now: float) -> Unlink:
        assert self.files is not None
        self.told[self.name(message.key)] = message.key
        gone, self.unlinking = self.unlinking, []
        gone += self.files.add(self.name(message.key), message.nbytes, now, message.until)
        self.left += [key for name in gone if (key := self.told.pop(name, None)) is not None]
        if self.dram is not None:
            self.dram.cold.discard(message.key)
        return Unlink(gone, self.fill())

    def demote(self, te: int, now: float, leaving: bool) -> list[Demoted]:
        """The oldest blocks that are in DRAM alone, pinned for `te` to write to files. Unless the TE is leaving: none while
        enough slots could be taken without losing a block."""
        out: list[Demoted] = []
        if self.dram is None or self.files is None:
            return out
        dram = self.dram
        spare = len(dram.free) + len(dram.idle) - len(dram.cold)
        while len(out) < DEMOTED_AT_ONCE and dram.cold and (leaving or spare + len(out) < dram.slots * LOW_SHARE):
            key = dram.cold.pop(now)
            place = dram.idle.take(key) if key in dram.idle else None
            block = dram.pin(te, key)
            assert block is not None
            block.place = place
            out.append(Demoted(key, block.slot, block.generation, block.until))
        return out

    def leave(self, te: int, now: float) -> None:
        """A TE has died."""
        if self.dram is not None:
            for key in self.dram.pins.get(te, ()):  # it may have been writing files of them
                if not self.filed(key):
                    self.dram.cold.add(key, now, self.dram.blocks[key].until)
            self.dram.leave(te, now)

    def fill(self) -> Fill:
        """To be sent to a TE, which then knows what has left the tiers."""
        dram, files = self.dram, self.files
        left, self.left = self.left, []
        if dram is not None:
            left += dram.left
            dram.left = []
            left = [key for key in left if (block := dram.blocks.get(key)) is None or block.writer >= 0]
        return Fill(
            dram_bytes=(dram.slots - len(dram.free)) * self.slot_bytes if dram is not None else 0,
            ssd_bytes=files.total if files is not None else 0,
            dram_evictions=dram.evictions if dram is not None else 0,
            ssd_evictions=files.evictions if files is not None else 0,
            on_ssd=[key for key in left if self.filed(key)],
            gone=[key for key in left if not self.filed(key)],
        )

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. For tests."""
        if self.dram is not None:
            self.dram.check()
        if self.files is not None:
            self.files.check()


def geometry(slots: int, slot_bytes: int) -> tuple[int, int]:
    """Where the first slot lies in the pool's memory, behind a generation of 8 bytes for each slot, and how many bytes the memory
    has, a multiple of a huge page."""
    first = -(-slots * 8 // PAGE) * PAGE
    return first, -(-(first + slots * slot_bytes) // HUGE_PAGE) * HUGE_PAGE
