"""`python -m bench.distflow`: DistFlow's transfer between two processes beside a plain memcpy and a TCP socket, in the same run.

KV blocks of the default model (16 tokens, 30 layers) are pushed to another process's pool, shuffled on both sides, in one
transfer or one for each layer, from the call to its completion, the making of spans included. memcpy: as many bytes in one piece,
by numpy within one process. TCP: as many bytes in one piece over loopback, until the receiver has said that it has them. The
rounds of all candidates are interleaved, so that a disturbance of the machine meets each of them, and the median round counts.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from bench.queue import cpu_model
from engine.devices.kv_pool import KVPool
from engine.distflow import DistFlow, Spans, block_spans
from engine.handover import LAYERS_AT_ONCE
from engine.types import KVLayout, Memory, Peer

LAYERS, HEADS, RUN, BLOCK_SIZE = 30, 3, 16 * 64 * 2, 16  # of SmolLM2-135M in bfloat16
LAYER_BYTES = 2 * HEADS * RUN
BLOCK_BYTES = LAYERS * LAYER_BYTES  # 368640
COUNTS = (1, 8, 64, 512)
ROUNDS = 5
SECONDS = 0.25  # of each measurement; ROUNDS x COUNTS x candidates of them take about 25 s
RESULTS = Path(__file__).parent / "results" / "distflow.json"
OWN, OTHER = 1, 2


def layout(blocks: int) -> KVLayout:
    return KVLayout("panels", LAYERS, LAYER_BYTES, 2, LAYER_BYTES // 2, blocks, BLOCK_BYTES, BLOCK_SIZE, HEADS, RUN)


def pool(blocks: int, fill: int) -> KVPool:
    made = KVPool(blocks * BLOCK_BYTES)
    made.commit(made.nbytes)
    np.frombuffer(made.view, np.uint8)[:] = fill
    return made


# ---- the other process -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def other(blocks: int) -> Iterator[tuple[Memory, socket.socket]]:
    """A process with a pool, which also takes what comes over TCP into it: the pool, and a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pid = os.fork()
        if pid == 0:
            try:
                with server.accept()[0] as connection:
                    serve(connection, pool(blocks, 2))
            finally:
                os._exit(0)
        with socket.create_connection(server.getsockname()) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                yield msgspec.msgpack.decode(connection.recv(1000), type=Memory), connection
            finally:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def serve(connection: socket.socket, memory: KVPool) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(msgspec.msgpack.encode(memory.memory))
    while head := connection.recv(8, socket.MSG_WAITALL):
        rest = memory.view[: struct.unpack("<Q", head)[0]]
        while len(rest):
            rest = rest[connection.recv_into(rest) :]
        connection.sendall(b"!")


# ---- candidates --------------------------------------------------------------------------------------------------------------


def candidates(own: KVPool, memory: Memory, connection: socket.socket, flow: DistFlow) -> dict[str, Callable[[int], None]]:
    """Each moves so many blocks once."""
    blocks = own.nbytes // BLOCK_BYTES
    mine = layout(blocks)
    flow.link_cluster([Peer(OTHER, memory, mine, BLOCK_SIZE)])
    rng = np.random.default_rng(0)
    here, there = rng.permutation(blocks), rng.permutation(blocks)
    second = pool(blocks, 3)
    source, target = np.frombuffer(own.view, np.uint8), np.frombuffer(second.view, np.uint8)

    def spans(te: int, table: np.ndarray, layers: range | None) -> Spans:
        return Spans(te, *block_spans(mine, BLOCK_SIZE, table, layers=layers))

    def whole(count: int) -> None:
        done = flow.transfer(spans(OWN, here[:count], None), spans(OTHER, there[:count], None))
        done.wait()
        assert done.error is None

    def by_layer(count: int) -> None:
        for first in range(0, LAYERS, LAYERS_AT_ONCE):
            layers = range(first, min(first + LAYERS_AT_ONCE, LAYERS))
            done = flow.transfer(spans(OWN, here[:count], layers), spans(OTHER, there[:count], layers))
        done.wait()
        assert done.error is None

    def memcpy(count: int) -> None:
        np.copyto(target[: count * BLOCK_BYTES], source[: count * BLOCK_BYTES])

    def tcp(count: int) -> None:
        connection.sendall(struct.pack("<Q", count * BLOCK_BYTES))
        connection.sendall(own.view[: count * BLOCK_BYTES])
        assert connection.recv(1) == b"!"

    return {"transfer, whole blocks": whole, "transfer, by layer": by_layer, "memcpy": memcpy, "TCP on loopback": tcp}


def measure(move: Callable[[int], None], count: int) -> float:
    """Seconds of one move: the median."""
    move(count)
    times, stop = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < stop:
        begin = time.perf_counter()
        move(count)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distflow", description="Copies of KV blocks between two processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    out: Path = parser.parse_args().out

    blocks = COUNTS[-1]
    with other(blocks) as (memory, connection):
        own = pool(blocks, 1)
        with contextlib.closing(DistFlow(own.view, OWN)) as flow:
            moves = candidates(own, memory, connection, flow)
            cells = [(name, count) for count in COUNTS for name in moves]
            rounds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
            for number in range(ROUNDS):
                print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
                for name, count in cells:
                    rounds[name, count].append(measure(moves[name], count))

    rows = []
    for (name, count), times in rounds.items():
        seconds = statistics.median(times)
        speed = count * BLOCK_BYTES / seconds / 1e9
        rows.append({"way": name, "blocks": count, "us": round(seconds * 1e6, 1), "gb_per_s": round(speed, 2)})
        print(f"{name:24}{count:5} blocks {seconds * 1e6:12.1f} us {speed:8.2f} GB/s")
    system = os.uname()
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", "bench.distflow", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{system.sysname} {system.release} {system.machine}",
        "python": platform.python_version(),
        "block_bytes": BLOCK_BYTES,
        "rounds": ROUNDS,
        "what": "median over rounds of the median time of one move; load: of the machine over the last minute",
        "results": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
