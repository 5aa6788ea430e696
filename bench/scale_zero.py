"""Part `zero` of `bench.scale`: from nothing to the first token of a streamed chat.

    asleep, weights in memory   the server runs, its model was put to sleep with level 1: keeper warm, packed weights in DRAM
    asleep, weights on disk     ... with level 2: keeper warm, the model's file in the page cache
    no process                  a start of the server, all it reads in the page cache; the client asks again until it is answered
    page cache dropped          a start without the model's file in memory, and without anything (where the kernel lets us)

llama.cpp's and vLLM's starts stand beside those with the page cache full, by the same client.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from bench import peers
from bench.cpu import into_page_cache
from bench.cpu_report import markdown
from bench.cpu_servers import NAME, POLL, SPECS, Server, Spec, version
from bench.scale_figures import reached, seconds, spread
from bench.scale_server import MODEL, Options, say, serving, wait_for_pool
from deepserve import __version__
from engine.types import UserError
from scale import pull
from sched.gateway.client import Client, RequestFailed
from tests.server import Server as RunningServer

CHAT = [{"role": "user", "content": "Say hello."}]
TRIES, STARTS, PEER_STARTS, COLD_STARTS = 10, 5, 2, 2
SETTLE = 0.2  # seconds between the last change of anything and being asked
PATIENCE = 400.0  # seconds; vLLM compiles for 100 of them when it is started for the first time
ANSWER = 60.0  # seconds in which who has taken a request must have begun to answer
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
OURS, OTHERS = "deepserve-q4_1", ("llama.cpp-q4_1", "vllm-bf16")
BARS = {"weights in memory": 0.15, "weights on disk": 0.6, "no process": 1.0}


def measure(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with serving(MODEL, "--keep-alive", "600") as server:
        for level, name in ((1, "weights in memory"), (2, "weights on disk")):
            tries = uvloop.run(woken(server, level, 3 if options.quick else TRIES))
            found[name] = summary(tries)
            say(f"keeper warm, {name}: {found[name]['first_token_s']['median']:.3f} s")
    specs = {spec.name: spec for spec in SPECS}
    made = peers.ensure(options.peers, say)
    model = pull.pull(MODEL, say)
    into_page_cache(specs[OURS], made)
    started(specs[OURS], made)  # brings interpreter, libraries and all else that it reads into the page cache
    found["no process"] = starts(specs[OURS], made, 2 if options.quick else STARTS)
    for name in () if options.quick else OTHERS:
        into_page_cache(specs[name], made)
        found[name] = starts(specs[name], made, PEER_STARTS)
    found["model's file dropped"] = starts(specs[OURS], made, COLD_STARTS, lambda: drop(model))
    try:
        found["page cache dropped"] = starts(specs[OURS], made, COLD_STARTS, lambda: drop_all(model))
    except OSError as e:
        found["page cache dropped"] = {"error": f"not measured: {DROP_CACHES}: {e.strerror}"}
    return {"servers": {name: {"title": specs[name].title, "version": version(specs[name], __version__)} for name in OTHERS}} | {
        "cases": found
    }


# ---- a server that runs -------------------------------------------------------------------------------------------------


async def woken(server: RunningServer, level: int, count: int) -> list[dict[str, Any]]:
    """Put to sleep and asked, so often: seconds to the first token, and how the TE came."""
    tries = []
    async with Client(server.url) as client:
        await first_token(client, None)
        for _ in range(count):
            await client.ask("POST", "/v1/admin/sleep", {"level": level})
            await asyncio.to_thread(wait_for_pool, server, 1)  # the keeper makes a new one a second after the last start
            await asyncio.sleep(SETTLE)
            took = await first_token(client, None)
            climb = (await client.ask("GET", "/v1/admin/scale"))["climbs"][-1]
            tries.append({"first_token_s": took, **{key: climb[key] for key in ("how", "path", "fell", "steps", "total_s")}})
    return tries


async def first_token(client: Client, model: str | None) -> float:
    """Seconds from asking to the first text. Raises `RequestFailed`."""
    began = time.monotonic()
    async with contextlib.aclosing(client.chat(CHAT, model, max_tokens=2, temperature=0.0)) as stream:
        async for event in stream:
            if event.text:
                return event.at - began
    raise RequestFailed("no text came back")


def summary(tries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "first_token_s": spread([one["first_token_s"] for one in tries]),
        "climb_s": spread([one["total_s"] for one in tries]),
        "how": sorted({one["how"] for one in tries}),
        "path": sorted({one["path"] for one in tries}),
        "fell": sorted({why for one in tries for why in one["fell"]}),
        "steps": {step: spread([one["steps"].get(step, 0.0) for one in tries]) for step in tries[0]["steps"]},
    }


# ---- a server that starts -----------------------------------------------------------------------------------------------


def starts(spec: Spec, made: peers.Peers, count: int, drop: Callable[[], float] | None = None) -> dict[str, Any]:
    """Seconds from the start of the process to the first token, so often; with `drop` the part of the model's file that stayed in
    memory all the same."""
    took, stayed = [], []
    try:
        for _ in range(count):
            if drop is not None:
                stayed.append(drop())
            took.append(started(spec, made))
    except UserError as e:
        say(f"{spec.title}: {e}")
        return {"error": str(e)}
    say(f"{spec.title}: {seconds(spread(took))} s from process start to first token")
    return {"first_token_s": spread(took)} | ({"model_still_there": max(stayed)} if stayed else {})


def started(spec: Spec, made: peers.Peers) -> float:
    with Server(spec, made) as server:
        return uvloop.run(answered(server))


async def answered(server: Server) -> float:
    """Seconds from the start of the process to the first token of a chat that is sent again until it is answered."""
    why = "it does not listen"
    async with Client(server.urls[0], fresh=True) as client:
        while time.monotonic() < server.started + PATIENCE:
            server.check()
            try:
                async with asyncio.timeout(ANSWER):
                    await first_token(client, NAME)
                return time.monotonic() - server.started
            except TimeoutError:
                raise UserError(f"a request had no answer within {ANSWER:g} s: {server.said()}") from None
            except RequestFailed as e:
                why = str(e)
            await asyncio.sleep(POLL)
    raise UserError(f"no first token within {PATIENCE:g} s ({why}): {server.said()}")


# ---- the page cache -----------------------------------------------------------------------------------------------------


def drop(path: Path) -> float:
    """Have the kernel forget a file's pages; the part that it keeps (somebody maps them)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(path)


def drop_all(path: Path) -> float:
    """Have it forget every file's pages; the part of `path` that it keeps. Raises `OSError` where we may not."""
    os.sync()
    DROP_CACHES.write_text("3")
    return resident(path)


def resident(path: Path) -> float:
    """The part of a file's pages that is in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        pages = -(-len(view) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view)), states)
        del first
        if failed:
            raise UserError(f"mincore: {os.strerror(ctypes.get_errno())}")
        return sum(state & 1 for state in states) / pages


# ---- the table ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    rows = [["to the first token of a chat, seconds", "median (least–most)", "n", "bar", "process", "weights"]]
    titles = {
        "weights in memory": "keeper warm, weights in DRAM",
        "weights on disk": "keeper warm, weights on disk, in the page cache",
        "no process": "no process, all in the page cache",
        "model's file dropped": "no process, the model's file not in the page cache",
        "page cache dropped": "no process, nothing in the page cache",
    }
    for name, case in found["cases"].items():
        if one := found["servers"].get(name):
            title = f"{one['title']} ({one['version']}), no process, all in the page cache"
        else:
            title = titles[name]
        if case.get("model_still_there", 0) > 0.01:
            title += f" ({case['model_still_there']:.0%} of the model's stayed)"
        if "error" in case:
            rows.append([title, case["error"], "", "", "", ""])
            continue
        took = case["first_token_s"]
        bar = reached(took["median"], BARS[name]) if name in BARS else ""
        rows.append([title, seconds(took), str(took["n"]), bar, ", ".join(case.get("how", ())), ", ".join(case.get("path", ()))])
    lines = ["From zero:", "", *markdown(rows)]
    for name in ("weights in memory", "weights on disk"):
        steps = ", ".join(f"{step} {values['median']:.3f}" for step, values in found["cases"][name]["steps"].items())
        lines += ["", f"Steps of a wake-up with {name}, medians: {steps}."]
    return lines
