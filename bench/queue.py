"""`python -m bench.queue`: the shared-memory queue beside multiprocessing.Queue and a Unix socket, in the same run.

Two processes each time. Rate: one sends as fast as the other takes, for a fixed time. Wake-up: a message goes there and
back, both sides asleep in between. The rounds of all candidates are interleaved, so that a disturbance of the machine
meets each of them, and the median round counts.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import signal
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from engine import shmq

SIZES = (64, 4096)
ROUNDS = 5
SECONDS = 0.5  # of each measurement; ROUNDS x SIZES x candidates x 2 of them take about 35 s
RESULTS = Path(__file__).parent / "results" / "queue.json"


class Channel(Protocol):
    """One direction between two processes; made before the fork, each side used in one of them."""

    def send(self, payload: bytes) -> None: ...

    def receive(self) -> list[bytes]:
        """Blocks until there is at least one message."""
        ...

    def close(self) -> None: ...


class SharedMemory:
    def __init__(self) -> None:
        self.fds = shmq.create()
        self.sender: shmq.Sender | None = None
        self.receiver: shmq.Receiver | None = None

    def send(self, payload: bytes) -> None:
        if self.sender is None:
            self.sender = shmq.Sender(self.fds)
        self.sender.send(payload)
        if self.sender.backlog:
            self.sender.flush_blocking()

    def receive(self) -> list[bytes]:
        if self.receiver is None:
            self.receiver = shmq.Receiver(self.fds)
        self.receiver.wait()
        return self.receiver.receive()

    def close(self) -> None:
        for part in (self.fds, self.sender, self.receiver):
            if part is not None:
                part.close()


class MultiprocessingQueue:
    def __init__(self) -> None:
        # Bounded, as the others are, or the sender's memory would hold whatever the receiver can't keep up with.
        self.queue: multiprocessing.Queue[bytes] = multiprocessing.get_context("fork").Queue(1024)

    def send(self, payload: bytes) -> None:
        self.queue.put(payload)

    def receive(self) -> list[bytes]:
        return [self.queue.get()]

    def close(self) -> None:
        self.queue.cancel_join_thread()
        self.queue.close()


class UnixSocket:
    """A stream with length-prefixed frames, read in large pieces."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.rest = b""

    def send(self, payload: bytes) -> None:
        self.ours.sendall(struct.pack("<I", len(payload)) + payload)

    def receive(self) -> list[bytes]:
        while True:
            data = self.rest + self.theirs.recv(1 << 18)
            messages, at = [], 0
            while at + 4 <= len(data):
                end = at + 4 + int.from_bytes(data[at : at + 4], "little")
                if end > len(data):
                    break
                messages.append(data[at + 4 : end])
                at = end
            self.rest = data[at:]
            if messages:
                return messages

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


CANDIDATES: dict[str, Callable[[], Channel]] = {
    "shared memory": SharedMemory,
    "multiprocessing.Queue": MultiprocessingQueue,
    "unix socket": UnixSocket,
}


def fork(body: Callable[[], None]) -> int:
    """A child that runs `body` until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                body()
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def rate(channel: Channel, payload: bytes) -> float:
    """Messages a second, one way."""
    pid = fork(lambda: channel.send(payload))
    channel.receive()
    count, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < SECONDS:
        count += len(channel.receive())
    kill(pid)
    return count / (now - begin)


def round_trips(there: Channel, back: Channel, payload: bytes) -> list[float]:
    """Seconds of each message's way there and back."""

    def echo() -> None:
        for message in there.receive():
            back.send(message)

    pid = fork(echo)
    trips: list[float] = []
    stop = time.perf_counter() + SECONDS
    while (begin := time.perf_counter()) < stop:
        there.send(payload)
        back.receive()
        trips.append(time.perf_counter() - begin)
    kill(pid)
    return trips[len(trips) // 10 :]  # the first ones pay for the start


def measure(make: Callable[[], Channel], size: int) -> dict[str, float]:
    payload = bytes(size)
    channel, there, back = make(), make(), make()
    per_second = rate(channel, payload)
    percentiles = statistics.quantiles(round_trips(there, back, payload), n=100)
    for used in (channel, there, back):
        used.close()
    return {
        "messages_per_s": per_second,
        "round_trip_p50_us": percentiles[49] * 1e6,
        "round_trip_p99_us": percentiles[98] * 1e6,
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Hardware", "CPU part")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.queue", description="Queues between two processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    out: Path = parser.parse_args().out

    cells = [(name, size) for size in SIZES for name in CANDIDATES]
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
        for name, size in cells:
            rounds[name, size].append(measure(CANDIDATES[name], size))

    rows = [
        {"queue": name, "bytes": size}
        | {key: round(statistics.median(r[key] for r in rounds[name, size]), 1) for key in rounds[name, size][0]}
        for name, size in cells
    ]
    print(f"{'queue':<22} {'bytes':>6} {'messages/s':>12} {'round trip p50':>15} {'p99':>10}")
    for row in rows:
        print(
            f"{row['queue']:<22} {row['bytes']:>6} {row['messages_per_s']:>12,.0f}"
            f" {row['round_trip_p50_us']:>12.1f} us {row['round_trip_p99_us']:>7.1f} us"
        )
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", "bench.queue", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "seconds_each": SECONDS,
        "rounds": ROUNDS,
        "what": "median over rounds; round_trip: there and back, two wake-ups",
        "results": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
