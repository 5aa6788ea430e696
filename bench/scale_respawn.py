"""Part `respawn` of `bench.scale`: for a minute one of 64 TEs is killed every 0.3 s, while 16 streams run without a pause.

Texts must be those that the same prompts have undisturbed (greedy; on the compiled kernels a text is the same whatever ran beside
it and wherever it was begun anew). Afterwards all TEs are back, the control process and the keeper have as many descriptors as
before and the family as many memfds, memory has not grown, and with the server's end every process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from bench.cpu_report import markdown
from bench.scale_figures import slope
from bench.scale_server import MODEL, Held, Options, descriptors, memfds, processes, pss, say, serving
from scale.memory import available
from sched.gateway.client import Client, RequestFailed
from tests.server import Server, family, wait_until

STREAMS, TOKENS, PROMPTS = 16, 64, 32
SECONDS, QUICK_SECONDS = 60.0, 6.0
GAP = 0.3  # seconds between two kills, half as many more or less
LOOK = 3.0  # seconds between two looks at the memory of all: each costs some milliseconds a process
KV = "32M"
PROMPT = "This is story number {} of a long row, and it begins on a "
SHARED_MEMORY = Path("/dev/shm")
COUNTERS = {"replays": "deepserve:task_replays_total", "restarts": "deepserve:te_restarts_total"}


def measure(options: Options) -> dict[str, Any]:
    seconds = QUICK_SECONDS if options.quick else SECONDS
    files = set(os.listdir(SHARED_MEMORY))
    with serving(MODEL, "--te", str(options.te), "--kv-cache-memory-bytes", KV) as server:
        found = disturbed(server, options, seconds)
    own = {name for name in set(os.listdir(SHARED_MEMORY)) - files if "deepserve" in name}
    found |= {"processes_left": len(family(server.marker)), "shared_files_left": len(own)}
    say(
        f"{found['kills']} kills, {found['streams']} streams: {found['lost']} lost, {found['wrong']} with another text;"
        f" {found['replays']:g} tasks replayed"
    )
    wrong = found["lost"] or found["wrong"] or found["processes_left"] or found["shared_files_left"]
    return found | ({"verdict": "requests were lost or changed, or something is left"} if wrong else {})


def disturbed(server: Server, options: Options, seconds: float) -> dict[str, Any]:
    want = uvloop.run(undisturbed(server.url))
    # The same load once more, so that what grows with use only has done so before anything is counted.
    uvloop.run(undisturbed(server.url))
    before = counted(server)
    found = uvloop.run(killing(server, want, seconds, options.seed))
    began = time.monotonic()
    wait_until(f"all {options.te} TEs are back", lambda: server.get("/health")[0] == 200)
    health = server.get("/health")[1]
    found |= {"te": options.te, "seconds": seconds, "back_after_s": time.monotonic() - began, "te_ready": health["te_ready"]}
    uvloop.run(undisturbed(server.url))  # whoever it reaches has its buffers again
    metrics = server.get("/metrics")[1]
    return found | {"before": before, "after": counted(server)} | {key: counter(metrics, name) for key, name in COUNTERS.items()}


# ---- load ---------------------------------------------------------------------------------------------------------------


async def text(client: Client, number: int) -> str:
    """A stream's text. Raises `RequestFailed` where it breaks off."""
    params: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
    pieces: list[str] = []
    async with contextlib.aclosing(client.complete(PROMPT.format(number), **params)) as stream:
        async for event in stream:
            pieces.append(event.text)
    return "".join(pieces)


async def undisturbed(url: str) -> list[str]:
    """The text of each prompt."""
    room = asyncio.Semaphore(STREAMS)

    async def one(client: Client, number: int) -> str:
        async with room:
            return await text(client, number)

    async with Client(url) as client:
        return list(await asyncio.gather(*(one(client, number) for number in range(PROMPTS))))


async def killing(server: Server, want: list[str], seconds: float, seed: int) -> dict[str, Any]:
    """Streams all the time, and kills."""
    rng = random.Random(seed)
    streams: Counter[str] = Counter()
    errors: set[str] = set()
    kills = 0
    samples: list[tuple[float, Held, int]] = []  # (seconds, what the family has, bytes that the box has free)
    begun = time.monotonic()

    async def run(client: Client, who: int) -> None:
        number = who
        while time.monotonic() < begun + seconds:
            try:
                got = await text(client, number % PROMPTS)
                streams["wrong" if got != want[number % PROMPTS] else "right"] += 1
            except RequestFailed as e:
                streams["lost"] += 1
                errors.add(str(e))
            number += 7  # no divisor of PROMPTS: each stream goes through all

    async def kill() -> None:
        nonlocal kills
        while time.monotonic() < begun + seconds:
            await asyncio.sleep(GAP * rng.uniform(0.5, 1.5))
            tes = sorted(pid for pid, kind in processes(server).items() if kind == "te")
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(tes), signal.SIGKILL)
                kills += 1

    async def look() -> None:
        while True:
            held = await asyncio.to_thread(lambda: pss(processes(server)))
            samples.append((time.monotonic() - begun, held, available()))
            await asyncio.sleep(LOOK)

    async with Client(server.url) as client:
        looking = asyncio.create_task(look())
        await asyncio.gather(kill(), *(run(client, who) for who in range(STREAMS)))
        looking.cancel()
        await asyncio.wait((looking,))
    return {
        "kills": kills,
        "streams": streams.total(),
        "wrong": streams["wrong"],
        "lost": streams["lost"],
        "errors": sorted(errors)[:4],
        "pss_mb": [[at, own.pss / 1e6] for at, own, _ in samples],
        "pss_mb_a_minute": 60 * slope([(at, own.pss / 1e6) for at, own, _ in samples]),
        "anonymous_mb_a_minute": 60 * slope([(at, own.anonymous / 1e6) for at, own, _ in samples]),
        "available_mb_a_minute": 60 * slope([(at, free / 1e6) for at, _, free in samples]),
    }


# ---- what is there ------------------------------------------------------------------------------------------------------


def counted(server: Server) -> dict[str, Any]:
    """Descriptors, memfds and memory of the server, nobody being connected."""
    found = processes(server)
    by_kind = {kind: pid for pid, kind in found.items() if kind in ("control", "keeper")}
    return {
        "control_descriptors": descriptors(by_kind["control"]),
        "keeper_descriptors": descriptors(by_kind["keeper"]),
        "memfds": len(memfds(found)),
        "processes": dict(Counter(found.values())),
        "anonymous_mb": pss(found).anonymous / 1e6,
    }


def counter(metrics: str, name: str) -> float:
    """The sum of a counter over its labels, in Prometheus' text."""
    return sum(map(float, re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", metrics, re.MULTILINE)))


# ---- the table ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    before, after = found["before"], found["after"]
    rows = [["", "before", "after"]]
    for key in ("control_descriptors", "keeper_descriptors", "memfds", "anonymous_mb"):
        rows.append([key.replace("_", " "), f"{before[key]:.0f}", f"{after[key]:.0f}"])
    said = [
        f"{found['kills']} kills in {found['seconds']:g} s among {found['te']} TEs under {STREAMS} streams:",
        f"{found['streams']} texts of {TOKENS} tokens, {found['lost']} lost, {found['wrong']} different;",
        f"{found['replays']:.0f} tasks begun anew, {found['restarts']:.0f} TEs brought up again, all {found['te_ready']} ready",
        f"{found['back_after_s']:.2f} s after the last stream.",
        f"Memory {found['pss_mb_a_minute']:+.0f} MB a minute (proportional set sizes of all processes,",
        "with KV blocks that are used for the first time),",
        f"{found['anonymous_mb_a_minute']:+.0f} without shared memory; MemAvailable {found['available_mb_a_minute']:+.0f}.",
        f"Left after the server's end: {found['processes_left']} processes, {found['shared_files_left']} shared memory files.",
    ]
    return [" ".join(said), "", *markdown(rows)]
