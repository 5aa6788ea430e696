"""`python -m bench.control`: what a token costs the control process, from the TE's message to the client's socket.

Three processes. The server is the real one but for its cluster manager: gateway, service, job executor, link and shared-memory
queue under uvloop. Its only TE is the real step loop (batch, executor, messages) on a device that computes nothing: each step
takes a fixed time and brings every sequence the next token of an English text. This process is the client: it reads and drops
the bytes. Counted is the server's own CPU time (user and system, all threads) over the tokens it handled in the same window,
after every stream has begun; so neither the model nor the client nor the start of a request is in the figure.

The stages come from windows of their own, in a second server that looks at its thread's CPU clock where each stage begins.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import uvloop

from engine import native, shmq
from engine.batch import Batch
from engine.config import Config, Seat
from engine.core import Core
from engine.devices import StepInputs, StepOutput
from engine.executor import Executor
from engine.rtc import RTC
from engine.tokenizer import Tokenizer
from engine.types import FromWorker, Ready
from scale import ladder, pull
from sched.cluster import TE, Slot
from sched.gateway import app as gateway
from sched.gateway.sse import EventStream
from sched.job_executor import JobExecutor
from sched.link import LocalLink
from sched.metrics import Metrics
from sched.service import AsyncLLM
from sched.stream import Stream

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("README.md", "docs/design.md", "docs/api.md", "docs/operations.md")  # what the fake model says, from anywhere in it
MOST_STREAMS = 64
CONTEXT = 1 << 15  # tokens: no stream ends while it is measured
BLOCK = 16
SETTLE = 0.5  # seconds between the last stream's first token and the window
OK = b"HTTP/1.1 200 OK"
KINDS = ("completion", "chat", "chat, not streamed")

LOOP = "event loop, HTTP and waking up"


class Stopwatch:
    """CPU seconds of this thread by stage, from a look at the clock where a stage begins. What a look costs is taken off."""

    # What is called -> the stage that begins there.
    ENTRIES: tuple[tuple[type, str, str], ...] = (
        (shmq.Receiver, "_deliver", "queue"),
        (LocalLink, "receive", "decoding"),
        (JobExecutor, "message", "job executor and detokenising"),
        (Stream, "feed", "encoding"),
        (EventStream, "send", "writing"),
    )

    def __init__(self, clock: Callable[[], float] = time.thread_time):
        self.clock = clock
        self.spent: Counter[str] = Counter()
        self.look = min(-clock() + clock() for _ in range(1000))
        self.stage, self.last = LOOP, clock()

    def enter(self, stage: str) -> None:
        if stage != self.stage:
            now = self.clock()
            self.spent[self.stage] += now - self.last - self.look
            self.stage, self.last = stage, now

    def install(self) -> None:
        """Watch the real classes, for the rest of this process's life."""
        for owner, name, stage in self.ENTRIES:
            setattr(owner, name, self.watched(getattr(owner, name), stage, leaves=owner is shmq.Receiver))

    def watched(self, method: Callable[..., Any], stage: str, leaves: bool) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self.enter(stage)
            try:
                return method(*args)
            finally:
                if leaves:
                    self.enter(LOOP)

        return timed


# ---- the TE: the real step loop on a device that computes nothing ----------------------------------------------------------


class Step:
    """A launched step: `result` comes when its time is over."""

    def __init__(self, due: float, ids: np.ndarray):
        self.due, self.ids = due, ids

    def result(self) -> StepOutput:
        time.sleep(max(0.0, self.due - time.monotonic()))
        return StepOutput(self.ids)


class PacedDevice:
    """Every step takes `period` seconds and brings each row the id of `script` (int32 [N]) that its slot and position lead to."""

    name, block_size = "paced", BLOCK

    def __init__(self, script: np.ndarray, period: float):
        self.script, self.period = script, period
        self.due = 0.0

    def configure(self, *, vocab: int, slots: int, tokens: int) -> None:
        pass

    def launch(self, forward: object, step: StepInputs) -> Step:
        rows = step.sampling
        ids = self.script[(rows.position + rows.slot * 997) % len(self.script)]
        self.due = max(self.due, time.monotonic()) + self.period
        return Step(self.due, ids)

    def close(self) -> None:
        pass


class Vocabulary(msgspec.Struct):
    """All that the executor asks of a model that is never run."""

    vocab: int


class Nowhere:
    """A KV cache of no memory."""

    nbytes = 1

    def commit(self, blocks: int) -> None: ...


def run_te(inbox: shmq.RingFds, outbox: shmq.RingFds, script: np.ndarray, vocab: int, period: float) -> None:
    """What `engine.worker` does, without weights."""
    native.watch_process(os.pidfd_open(os.getppid()))
    sender, encoder = shmq.Sender(outbox), msgspec.msgpack.Encoder()

    def tell(message: FromWorker) -> None:
        sender.send(encoder.encode(message))
        sender.flush_blocking(None)

    blocks = MOST_STREAMS * CONTEXT // BLOCK
    batch = Batch(RTC(blocks, BLOCK, False), max_seqs=MOST_STREAMS, max_tokens=1024, max_len=CONTEXT)
    executor = Executor(PacedDevice(script, period), Vocabulary(vocab), Nowhere(), batch.tables, BLOCK, 1024)  # type: ignore[arg-type]
    receiver = shmq.Receiver(inbox)
    tell(Ready(0, os.getpid(), blocks, BLOCK, {}, time.monotonic(), {}))
    Core(batch, executor, receiver, tell).run(True)


def te_main(args: argparse.Namespace) -> int:
    tokenizer = Tokenizer.load(pull.resolve(args.model))
    text = "\n".join((ROOT / name).read_text() for name in TEXTS)
    script = [i for i in tokenizer.encode(text, add_special=False) if i not in tokenizer.special_ids]
    fds = args.rings
    rings = shmq.RingFds(*fds[:3]), shmq.RingFds(*fds[3:])
    run_te(*rings, np.array(script, np.int32), tokenizer.vocab_size, args.period)
    return 0


# ---- the server ------------------------------------------------------------------------------------------------------------


class OneTE(AsyncLLM):
    """The service on one paced TE, without keeper and cluster manager."""

    async def load(self) -> None:
        path = pull.resolve(self.asked.model)
        native.load()
        [model] = self.deployments
        model.names = ["bench"]
        model.metrics = Metrics(self.families, "bench")
        model.je = JobExecutor(model.config, model.metrics, self.rng, used=model.used)
        model.je.tokenizer = model.tokenizer = Tokenizer.load(path)
        # It counts as described and as up: nothing is left to be done for it.
        model.describing = asyncio.create_task(asyncio.sleep(0))
        model.tokenizing = asyncio.create_task(asyncio.sleep(0, model.tokenizer))
        model.slots = [Slot(0, model, Seat("colocated"), 1, 0, False, False, "it is measured", missed=False)]

    async def bring_up(self, command: list[str]) -> TE:
        """The TE, once it takes tasks; its process ends with the link or with this one."""
        await self.start()
        je = self.deployments[0].listener
        te = TE(0, "bench", je, Seat("colocated"))
        te.climb = ladder.Climb(0, time.monotonic())
        fds = [fd for ring in te.link.rings for fd in ring.numbers()]
        process = await asyncio.to_thread(lambda: subprocess.Popen([*command, *map(str, fds)], pass_fds=fds, cwd=ROOT))
        te.link.watch(os.pidfd_open(process.pid))
        te.move("forked")
        await te.announced.wait()
        je.ready(te)
        return te


class Reading(msgspec.Struct):
    """The server's account of itself."""

    cpu: float  # seconds of CPU time, user and system, all threads
    tokens: int  # handled
    outstanding: int  # sequences
    stages: dict[str, float] = {}  # seconds by stage, where it is watched


async def serve(args: argparse.Namespace) -> None:
    """Serve until standard input ends; each line there asks for a reading."""
    watch = Stopwatch() if args.stages else None
    if watch is not None:
        watch.install()
    config = Config(
        model=args.model, max_model_len=CONTEXT, block_size=BLOCK, max_num_batched_tokens=256, max_num_seqs=MOST_STREAMS, seed=1
    )
    engine = OneTE(config=config)
    command = [sys.executable, "-m", "bench.control", "te", "--model", args.model, "--period", str(args.period), "--rings"]
    te = await engine.bring_up(command)
    listener = await gateway.listen(gateway.build(engine), "127.0.0.1", 0)
    print(json.dumps({"port": listener.port}), flush=True)
    registry, je, over = engine.families.registry, engine.deployments[0].listener, asyncio.Event()

    def asked() -> None:
        if not sys.stdin.readline():
            over.set()
            return
        tokens = registry.get_sample_value("deepserve:generation_tokens_total", {"model_name": "bench"})
        reading = Reading(time.process_time(), int(tokens or 0), je.outstanding, dict(watch.spent) if watch is not None else {})
        print(msgspec.json.encode(reading).decode(), flush=True)

    asyncio.get_running_loop().add_reader(0, asked)
    await over.wait()
    te.link.close()
    await engine.close()
    await listener.close()


# ---- the client ------------------------------------------------------------------------------------------------------------


class Drop(asyncio.Protocol):
    """Reads and drops."""

    def __init__(self) -> None:
        self.head = b""

    def data_received(self, data: bytes) -> None:
        if len(self.head) < len(OK):
            self.head = (self.head + data)[: len(OK)]


def body_of(kind: str, rng: Random) -> tuple[str, dict[str, Any]]:
    """(path, body) of one request, with a prompt of its own."""
    say = f"Tell me about the number {rng.randrange(10**6)}."
    settings = {"max_tokens": CONTEXT // 2, "ignore_eos": True, "stream": kind != "chat, not streamed"}
    if kind == "completion":
        return "/v1/completions", {"prompt": say, **settings}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": say}], **settings}


class Server:
    """The server's process, from the client's side."""

    def __init__(self, args: argparse.Namespace, stages: bool = False):
        command = [sys.executable, "-m", "bench.control", "serve", "--model", args.model, "--period", str(args.step_ms / 1e3)]
        command += ["--stages"] * stages
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.ask_pipe, self.answers = self.process.stdin, self.process.stdout
        line = self.answers.readline()
        if not line:
            raise SystemExit("bench.control: the server did not start; what it said is above")
        self.port = json.loads(line)["port"]

    def ask(self) -> Reading:
        self.ask_pipe.write("\n")
        self.ask_pipe.flush()
        return msgspec.json.decode(self.answers.readline(), type=Reading)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.ask_pipe.close()
        self.process.wait(30)
        self.answers.close()


async def until(server: Server, found: Callable[[Reading], bool]) -> Reading:
    """The first reading that `found` likes."""
    while not found(reading := await asyncio.to_thread(server.ask)):  # noqa: ASYNC110 - another process, which has no event to give
        await asyncio.sleep(0.05)
    return reading


async def window(server: Server, kind: str, streams: int, seconds: float) -> tuple[Reading, Reading]:
    """Readings before and after `seconds` of `streams` streams that all run."""
    loop, rng = asyncio.get_running_loop(), Random(streams)
    begin = server.ask()
    transports = []
    for _ in range(streams):
        transport, protocol = await loop.create_connection(Drop, "127.0.0.1", server.port)
        path, fields = body_of(kind, rng)
        body = json.dumps(fields).encode()
        transport.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body))
        transports.append((transport, protocol))
    await until(server, lambda r: r.outstanding == streams and r.tokens >= begin.tokens + 4 * streams)
    await asyncio.sleep(SETTLE)
    before = await asyncio.to_thread(server.ask)
    await asyncio.sleep(seconds)
    after = await asyncio.to_thread(server.ask)
    for transport, protocol in transports:
        assert protocol.head in (OK, b"") and not transport.is_closing(), protocol.head  # b"": a reply that isn't streamed
        transport.close()
    await until(server, lambda r: not r.outstanding)
    return before, after


def cost(before: Reading, after: Reading) -> float:
    """Microseconds of CPU time a token."""
    return (after.cpu - before.cpu) / max(1, after.tokens - before.tokens) * 1e6


def stage_costs(before: Reading, after: Reading) -> dict[str, float]:
    """Microseconds of CPU time a token by stage, in the order of a step; other threads are left out."""
    tokens = max(1, after.tokens - before.tokens)
    order = [stage for _, _, stage in Stopwatch.ENTRIES] + [LOOP]
    return {s: round((after.stages.get(s, 0.0) - before.stages.get(s, 0.0)) / tokens * 1e6, 2) for s in order}


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    cells = [(kind, streams) for streams in args.streams for kind in args.kinds]
    found: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    with Server(args) as server:
        for turn in range(args.rounds):
            for cell in cells if turn % 2 == 0 else cells[::-1]:
                found[cell].append(round(cost(*await window(server, *cell, args.seconds)), 2))
    with Server(args, stages=True) as server:
        stages = {kind: stage_costs(*await window(server, kind, max(args.streams), args.seconds)) for kind in args.kinds}
    rows = [{"kind": k, "streams": n, "us": statistics.median(us), "all_us": us} for (k, n), us in found.items()]
    return {"step_ms": args.step_ms, "seconds": args.seconds, "rounds": args.rounds, "rows": rows, "stages_us": stages}


def table(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'':20}{'streams':>8}{'us a token':>12}   every round"
    for r in report["rows"]:
        yield f"{r['kind']:20}{r['streams']:>8}{r['us']:>12.1f}   " + " ".join(f"{us:.1f}" for us in r["all_us"])
    for kind, stages in report["stages_us"].items():
        yield f"{kind}, by stage, at the most streams: " + ", ".join(f"{stage} {us:.1f}" for stage, us in stages.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.control", description="CPU time a token in the control process")
    parser.add_argument("role", nargs="?", choices=["measure", "serve", "te"], default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose tokenizer (default: %(default)s)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help=f"at most {MOST_STREAMS}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--step-ms", type=float, default=29.3, help="what a step takes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved; medians count (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON as well")
    parser.add_argument("--stages", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--period", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rings", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.role == "te":
        with contextlib.suppress(KeyboardInterrupt):
            return te_main(args)
        return 0
    if args.role == "serve":
        uvloop.run(serve(args))
        return 0
    report = uvloop.run(measure(args))
    print("\n".join(table(report)))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
