"""How the control process talks with one TE: send, messages, closed. Above a link nothing knows where the TE runs.

The local link is a pair of shared-memory queues and the TE's pidfd. A TE on another machine would be another link.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

import msgspec

from engine import shmq
from engine.types import FromWorker, ToWorker
from scale.keeper_client import readable

RING_BYTES = 1 << 20  # a step of 64 sequences is under 2 KiB; a 100 000 token prompt is 400 kB and still travels in one piece


class LocalLink:
    """Rings to and from a forked TE. `closed` is called once, when the TE has died."""

    def __init__(self, messages: Callable[[FromWorker], None], closed: Callable[[], None]):
        self.messages = messages
        self.closed = closed
        self.loop = asyncio.get_running_loop()
        self.to_te = shmq.create(RING_BYTES)
        self.from_te = shmq.create(RING_BYTES)
        self.sender = shmq.Sender(self.to_te)
        self.receiver = shmq.Receiver(self.from_te)
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder = msgspec.msgpack.Decoder(FromWorker)
        self.pidfd = -1
        self.sender.attach(self.loop)
        self.receiver.attach(self.loop, self.receive)

    @property
    def rings(self) -> tuple[shmq.RingFds, shmq.RingFds]:
        """The TE's inbox and outbox, to be sent to it."""
        return self.to_te, self.from_te

    def watch(self, pidfd: int) -> None:
        """The TE lives: hear of its death. Takes the pidfd over."""
        self.pidfd = pidfd
        self.loop.add_reader(pidfd, self.died)

    def send(self, message: ToWorker) -> None:
        self.sender.send(self.encoder.encode(message))

    def receive(self, batch: list[bytes]) -> None:
        for data in batch:
            self.messages(self.decoder.decode(data))

    def beat_age(self, now: float) -> float:
        """Seconds since the TE's step loop last came round."""
        return now - self.sender.last_beat()

    def died(self) -> None:
        """The process has ended. What it wrote whole before is still delivered."""
        self.loop.remove_reader(self.pidfd)
        self.receive(self.receiver.receive())
        self.closed()

    async def ended(self, timeout: float) -> bool:
        """Wait for the TE's end without telling `closed`; False after `timeout` seconds."""
        self.loop.remove_reader(self.pidfd)
        return await readable(self.loop, self.pidfd, timeout)

    def kill(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Release everything here; a TE that still lives is killed. Idempotent."""
        self.kill()
        if self.pidfd >= 0:
            self.loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        self.receiver.close()
        self.sender.close()
        self.to_te.close()
        self.from_te.close()
