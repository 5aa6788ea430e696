"""DistFlow's line between hosts: two processes over loopback, and in two network namespaces with a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.devices.remote import PIECE, Line, cut
from engine.distflow import Completion, Spans
from engine.native import checksum

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SIZE = 24 * MIB
OWN, OTHER = 1, 2

# The far end: holds memory, answers and says what is in it. Address and port to listen at; then a command a line.
FAR = """
import socket, sys
import numpy as np
from tests.test_distflow_remote import OTHER, SIZE, Line, checksum, finished, noise, spans
memory = noise(bytearray(SIZE), 6)
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    line = Line.listen(memoryview(memory), OTHER, server)
for command in sys.stdin:
    if command == "back\\n":  # a transfer that this end begins
        print(finished(line.transfer(spans(OTHER, (0, SIZE)), spans(line.te, (0, SIZE)))).error, flush=True)
    else:
        print(checksum(memory), flush=True)
line.close()
"""

# Two namespaces of a user's own, with a cable between them; the far end in one, the scenario in the other.
NAMESPACES = """
set -e
unshare -n sh -c 'echo up; exec sleep 60' > "$1/up" & far=$!
trap 'kill $far' EXIT
until [ -s "$1/up" ]; do sleep 0.05; done
ip link add near type veth peer name far
ip link set far netns $far
ip addr add 10.77.0.1/24 dev near
ip link set near up
ip link set lo up
nsenter -t $far -n ip addr add 10.77.0.2/24 dev far
nsenter -t $far -n ip link set far up
nsenter -t $far -n ip link set lo up
"$2" -c 'from tests.test_distflow_remote import namespaces; import sys; namespaces(int(sys.argv[1]))' $far
"""


def noise(memory: bytearray, seed: int) -> bytearray:
    memory[:] = np.random.default_rng(seed).integers(0, 256, len(memory), np.uint8).tobytes()
    return memory


def spans(te: int, *runs: tuple[int, int]) -> Spans:
    offsets, lengths = np.array(runs, np.int64).reshape(-1, 2).T
    return Spans(te, offsets, lengths)


def finished(completion: Completion) -> Completion:
    assert completion.wait(60)
    return completion


class Far:
    def __init__(self, address: str, prefix: tuple[str, ...] = ()):
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", FAR, address],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def ask(self, command: str = "sum") -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def pair_of(address: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> Iterator[tuple[Line, bytearray, Far]]:
    """A line, the memory of this end, and the process of the other."""
    far = Far(address, prefix)
    memory = noise(bytearray(SIZE), 5)
    line = Line.connect(memoryview(memory), OWN, address, far.port)
    try:
        yield line, memory, far
    finally:
        line.close()
        far.process.communicate(timeout=60)


def both_ways(line: Line, memory: bytearray, far: Far) -> None:
    """Pushed, pulled, begun by the other end, and both at once: each end has what an oracle says."""
    rng = np.random.default_rng(1)
    there = noise(bytearray(SIZE), 6)
    for _ in range(3):
        order, landed = rng.permutation(24)[:10], rng.permutation(24)[:10]
        src = [(int(i) * MIB + 3, MIB - 3) for i in order]
        dst = [(int(i) * MIB, MIB - 3) for i in landed]
        before = bytes(there)
        done = finished(line.transfer(spans(OWN, *src), spans(OTHER, *dst)))
        assert done.error is None and done.nbytes == 10 * (MIB - 3) and done.seconds > 0
        for (i, n), (j, _) in zip(src, dst, strict=True):
            there[j : j + n] = memory[i : i + n]
        assert far.ask() == str(checksum(there)) and bytes(there) != before
        expected = bytearray(memory)
        for (i, n), (j, _) in zip(src, dst, strict=True):
            expected[j : j + n] = there[i : i + n]
        assert finished(line.transfer(spans(OTHER, *src), spans(OWN, *dst))).error is None
        assert memory == expected
    assert far.ask("back") == "None"
    assert memory == there
    half = SIZE // 2
    push = line.transfer(spans(OWN, (0, half)), spans(OTHER, (half, half)))
    pull = line.transfer(spans(OTHER, (0, half)), spans(OWN, (half, half)))
    assert finished(push).error is None and finished(pull).error is None
    assert finished(line.transfer(spans(OWN), spans(OTHER))).nbytes == 0


def namespaces(far: int) -> None:
    """Runs in the near one; `far` is a process in the other."""
    prefix = ("nsenter", "-t", str(far), "-n")
    with pair_of("10.77.0.2", prefix) as (line, memory, process):
        both_ways(line, memory, process)
        with pytest.raises(OSError):  # the other's loopback is not this one's
            socket.create_connection(("127.0.0.1", process.port), 5)
    print("copied between namespaces")


@pytest.fixture(scope="module")
def loopback() -> Iterator[tuple[Line, bytearray, Far]]:
    with pair_of() as made:
        yield made


# ---- what is copied ------------------------------------------------------------------------------------------------------


def test_over_loopback(loopback):
    both_ways(*loopback)


def test_between_two_network_namespaces(tmp_path):
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    tried = subprocess.run(
        ["unshare", "-rn", "ip", "link", "add", "near", "type", "veth", "peer", "name", "far"], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"this machine lets a user make no network namespaces with veth: {tried.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", NAMESPACES, "sh", str(tmp_path), sys.executable],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "copied between namespaces" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("lengths", [[], [0], [1], [100, 0, 250, 7], [64], [64, 64], [1000]])
def test_pieces(lengths):
    """In order, each but the last full, and from the start of the buffer."""
    offsets = np.cumsum([0, *lengths])[:-1] + 11 * np.arange(len(lengths))
    wanted = [int(o) + i for o, n in zip(offsets, lengths, strict=True) for i in range(n)]
    found = []
    pieces = cut(Spans(OWN, offsets.astype(np.int64), np.array(lengths, np.int64)), 64)
    for piece in pieces:
        at = [
            (int(t) + i, int(s) + i)
            for s, t, n in zip(piece.source, piece.target, piece.lengths, strict=True)
            for i in range(int(n))
        ]
        assert [t for t, _ in at] == list(range(piece.nbytes))
        found += [s for _, s in at]
    assert found == wanted and all(piece.nbytes == 64 for piece in pieces[:-1])


# ---- ends ----------------------------------------------------------------------------------------------------------------


def test_spans_are_checked_before_anything_is_sent(loopback):
    line, _, _ = loopback
    for src, dst in (
        (spans(OWN, (0, 10)), spans(OTHER, (0, 11))),
        (spans(OWN, (SIZE - 9, 10)), spans(OTHER, (0, 10))),
        (spans(OTHER, (SIZE - 9, 10)), spans(OWN, (0, 10))),
        (spans(OWN, (0, 1)), spans(OWN, (1, 1))),
        (spans(3, (0, 1)), spans(OWN, (1, 1))),
    ):
        with pytest.raises(ValueError, match=r"TE|bytes"):
            line.transfer(src, dst)


def test_gates_timeouts_and_cancels(loopback):
    line = loopback[0]
    gate, ended = threading.Event(), []
    whole = (0, SIZE)
    waiting = line.transfer(spans(OWN, whole), spans(OTHER, whole), after=lambda: gate.wait(30) or None)
    late = line.transfer(spans(OWN, whole), spans(OTHER, whole), timeout=0)
    late_pull = line.transfer(spans(OTHER, whole), spans(OWN, whole), timeout=0)
    given_up = line.transfer(spans(OTHER, whole), spans(OWN, whole), on_done=lambda c: ended.append(c.error))
    given_up.cancel()

    def fail() -> None:
        raise RuntimeError("layer 7 was never computed")

    failed = line.transfer(spans(OWN, whole), spans(OTHER, whole), after=fail)
    assert not waiting.done()
    waiting.cancel()
    gate.set()
    assert finished(waiting).cancelled and finished(given_up).cancelled
    assert finished(late).error == finished(late_pull).error == "timed out"
    assert "layer 7" in str(finished(failed).error)
    assert ended == ["cancelled"]
    assert finished(line.transfer(spans(OWN, whole), spans(OTHER, whole))).error is None, "the line still works"


@pytest.mark.parametrize("push", [True, False])
def test_cancelled_between_pieces(loopback, push):
    """Much is asked for; a part of it is copied, whole pieces, and the line goes on."""
    line, memory, _ = loopback
    runs = 500
    ours, theirs = (Spans(te, np.zeros(runs, np.int64), np.full(runs, SIZE)) for te in (OWN, OTHER))
    memory[:8] = b"far away"
    assert finished(line.transfer(spans(OWN, (0, 8)), spans(OTHER, (0, 8)))).error is None
    memory[:8] = bytes(8)
    first = line.transfer(*((ours, theirs) if push else (theirs, ours)))
    if push:
        assert not first.wait(0.05)
    else:
        while bytes(memory[:8]) == bytes(8):
            assert not first.wait(0.001)
    first.cancel()
    assert finished(first).cancelled and first.nbytes < runs * SIZE and first.nbytes % PIECE == 0
    assert finished(line.transfer(spans(OWN, (0, 9)), spans(OTHER, (0, 9)))).error is None


def test_the_other_end_dies():
    with pair_of() as (line, _, far):
        runs = 500
        src, dst = (Spans(te, np.zeros(runs, np.int64), np.full(runs, SIZE)) for te in (OWN, OTHER))
        dying = line.transfer(src, dst)
        assert not dying.wait(0.05)
        far.process.kill()
        assert "TE 2 can't be reached" in str(finished(dying).error)
        assert "TE 2 can't be reached" in str(finished(line.transfer(src, dst)).error)


def test_closed():
    before = threading.active_count()
    with pair_of() as (line, _, far):
        runs = 500
        src, dst = (Spans(te, np.zeros(runs, np.int64), np.full(runs, SIZE)) for te in (OTHER, OWN))
        running, waiting = line.transfer(src, dst), line.transfer(src, dst)
        line.close()
        assert finished(running).error == finished(waiting).error == "DistFlow was closed"
        assert finished(line.transfer(src, dst)).error == "DistFlow was closed"
        line.close()
        far.process.communicate(timeout=60)
        assert far.process.returncode == 0, "the other end sees an end, not an error"
    assert threading.active_count() == before


def test_somebody_else_at_the_other_end():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def web() -> None:
            with server.accept()[0] as sock:
                sock.sendall(b"\x05\0\0\0HTTP/1.1 400 Bad Request")

        thread = threading.Thread(target=web)
        thread.start()
        with pytest.raises(OSError, match="something else"):
            Line.connect(memoryview(bytearray(10)), OWN, "127.0.0.1", server.getsockname()[1])
        thread.join()
