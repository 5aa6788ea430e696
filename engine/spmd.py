"""SPMD: the ranks of one TE. Every rank runs the same step loop on the same messages in the same order; nothing else passes
between them but activations.

The master is rank 0: it computes like the others, and it alone talks with the control process and copies keys and values to
other TEs, to DRAM and to files. A plan depends on messages and counters, and every rank samples the same ids from the same
gathered logits, so it is enough that all take in the same before the same step: the master hands on, before each step, the bytes
of the messages that it took in, which transfers have ended, and what of the slower tiers it has heard or timed. That all do
sample the same is checked by a sum over the ids. The ranks have a ring from the master and one back to it, on which they say once
that they are ready, or why they can't be.

No rank outlives another: the master watches each rank, the ranks watch a pipe that the master alone holds open, and all of them
watch the control process. Knows bytes and descriptors, no devices.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

import msgspec

from engine import shmq
from engine.devices import kv_pool
from engine.rtc.wire import Event
from engine.types import Failed, FromWorker, Ready, UserError

DONE = b""  # a rank's last word

End = tuple[int, str | None]  # of a transfer between TEs: its number, what went wrong
# What a step loop takes in at once: messages, ends of transfers, and what has come about in the slower tiers; and a checksum of
# all ids that it has sampled.
Turn = tuple[list[bytes], list[End], list[Event], int]


@dataclass(slots=True)
class Group:
    """The descriptors of a TE's ranks: the keeper makes them all, and sends each process those that are its own."""

    ranks: int
    memory: int  # memfds, empty so far: the device's and for the KV cache (`devices.Rank`)
    pool: int
    leash: tuple[int, int]  # a pipe: the master alone has the writing end (-1), the others have the reading end
    down: list[shmq.RingFds]  # from the master to ranks 1, 2, ...; another rank has its two rings as its inbox and outbox
    up: list[shmq.RingFds]  # and back

    def close(self) -> None:
        for fd in (self.memory, self.pool, *self.leash):
            if fd >= 0:
                os.close(fd)
        for ring in (*self.down, *self.up):
            ring.close()

    def numbers(self, rank: int) -> list[int]:
        """What is sent to a rank, as `received` takes it."""
        own = [self.memory, self.pool, self.leash[0 if rank else 1]]
        rings = () if rank else (*self.down, *self.up)
        return own + [fd for ring in rings for fd in ring.numbers()]


def create(ranks: int) -> Group:
    """What `ranks` ranks need, the master counted in."""
    down, up = ([shmq.create() for _ in range(ranks - 1)] for _ in range(2))
    return Group(ranks, os.memfd_create("deepserve-ranks", os.MFD_CLOEXEC), kv_pool.create(), os.pipe(), down, up)


def received(ranks: int, rank: int, numbers: list[int]) -> Group:
    """In rank `rank`: what `Group.numbers` was, by the numbers that it has here."""
    memory, pool, leash = numbers[:3]
    rings = [shmq.RingFds(*numbers[at : at + 3]) for at in range(3, len(numbers), 3)]
    ends = (leash, -1) if rank else (-1, leash)
    return Group(ranks, memory, pool, ends, rings[: len(rings) // 2], rings[len(rings) // 2 :])


class Leader:
    """The master's end of its ranks."""

    def __init__(self, group: Group):
        self.ranks = [shmq.Sender(ring) for ring in group.down]
        self.answers = [shmq.Receiver(ring) for ring in group.up]
        self.decoder = msgspec.msgpack.Decoder(FromWorker)

    def agree(self, turn: Turn) -> Turn:
        """What the master takes in before its next step is what all ranks do."""
        frame = msgspec.msgpack.encode(turn)
        for rank in self.ranks:
            rank.send(frame)
            rank.flush_blocking(None)
        return turn

    def gather(self) -> list[Ready]:
        """What each rank says when it has all that it needs. Raises what one says that can't get it."""
        said: list[Ready] = []
        for answer in self.answers:
            answer.wait(None)
            word = self.decoder.decode(answer.receive()[0])
            if isinstance(word, Failed):
                raise UserError(word.why, word.param) if word.param else RuntimeError(word.why)
            assert isinstance(word, Ready)
            said.append(word)
        return said

    def part(self) -> None:
        """Wait until each rank has nothing more to do: they end with the master, so it leaves last."""
        for answer in self.answers:
            answer.wait(None)  # for `DONE`


class Follower:
    """Another rank's end, and its inbox: a frame from the master for each turn of the step loop, empty or not."""

    def __init__(self, ring: shmq.Receiver):
        self.ring = ring
        self.frames: deque[bytes] = deque()
        self.decoder = msgspec.msgpack.Decoder(Turn)

    def agree(self, turn: Turn) -> Turn:
        """The master's turn: a rank has nothing of its own. Raises `RuntimeError` where it has sampled other ids, which would
        go on unseen and end in wrong texts."""
        while not self.frames:
            self.ring.wait(None)
            self.frames += self.ring.receive()
        agreed = self.decoder.decode(self.frames.popleft())
        if agreed[3] != turn[3]:
            raise RuntimeError("this rank has sampled other ids than the master: its logits or its plans were others")
        return agreed

    def receive(self) -> list[bytes]:
        """All that comes is the master's."""
        return []

    def wait(self, timeout: float | None) -> bool:
        return bool(self.frames) or self.ring.wait(timeout)

    def beat(self) -> None:
        """The master's heartbeat is the TE's: it stops when a rank does."""

    def rouse(self) -> None:
        self.ring.rouse()
