"""Part `growth` of `bench.scale`: from 1, 8 and 32 TEs to 64, each of which has then answered a request; and that without each
fast path in turn.

What a person does: a server that runs is told `POST /v1/admin/scale {"te": 64}`, and when that has answered, one request for each
TE is sent at once. Who answered, each request's job tells; those whom none has reached get another wave. The time runs from the
first byte of the POST to the last TE's first answer.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import Counter
from typing import Any

import uvloop

from bench.cpu_report import markdown
from bench.scale_figures import reached, seconds, spread
from bench.scale_server import MODEL, Options, memory, say, serving, wait_for_pool
from engine.types import UserError
from scale.ladder import STEPS
from sched.gateway.client import Client

FROM = (1, 8, 32)
WEIGHTS = {"q4_1": (), "bf16": ("--quantization", "none")}  # flags for the shipped file
# In turn with runs that have all of them: what the machine does meanwhile hits both.
PATHS = ("keeper", "warm", "fork", "dram", "fork dram", "lazy-kv")
SLOW = ("keeper", "fork dram")  # these take half a minute where others take three seconds: in the first round only
KV = "32M"  # for each TE: 64 of them fit most machines also where they are committed at the start
PROMPT = "Request {} of wave {} is like no other one, and it asks for a single token:"
MOST_PROMPT = 32  # tokens
MOST_WAVES = 20
BAR_SECONDS, BAR_MB = 2.5, 40.0
SETTLE = 0.5  # seconds from when all is ready, for what that leaves behind


def runs_of(options: Options, number: int) -> list[tuple[str, int, str]]:
    """(weights, TEs at first, fast path left out) of a round, in order."""
    runs: list[tuple[str, int, str]] = []
    for i, path in enumerate(path for path in PATHS if number == 0 or path not in SLOW):
        if i % 2 == 0:
            runs.append(("q4_1", 1, ""))
        runs.append(("q4_1", 1, path))
    runs.append(("q4_1", 1, ""))
    starts = [n for n in FROM if n < options.te]
    return [*runs, *(("q4_1", n, "") for n in starts[1:]), *(("bf16", n, "") for n in starts)]


def measure(options: Options) -> dict[str, Any]:
    runs, failed = [], []
    for number in range(options.rounds):
        for weights, start, without in runs_of(options, number):
            load = os.getloadavg()[0]
            paths = f", without {without}" if without else ""
            try:
                found = grown(options.te, weights, start, without)
            except UserError as e:
                failed.append(f"{weights}, {start} to {options.te} TEs{paths}: {e}")
                say(failed[-1])
                continue
            runs.append({"round": number, "weights": weights, "from": start, "without": without, "load": load, **found})
            each = found["memory"]
            say(
                f"{weights}, {start} to {options.te} TEs{paths}: {found['total_s']:.2f} s (POST {found['scaled_s']:.2f});"
                f" {each['te_private_mb'] / each['te']:.1f} MB a TE and {each['kv_committed_mb'] / each['te']:.1f} MB of KV"
            )
    verdict = {"verdict": "; ".join(failed)} if failed else {}
    return {"te": options.te, "kv_cache_memory_bytes": KV, "runs": runs} | verdict


def grown(te: int, weights: str, start: int, without: str) -> dict[str, Any]:
    """One server's growth. Raises `UserError`."""
    pool = 0 if without in ("keeper", "warm") else te - start
    flags = [*WEIGHTS[weights], "--te", str(start), "--kv-cache-memory-bytes", KV]
    flags += ["--warm-te", str(pool)] + (["--scale-without", *without.split()] if without else [])
    with serving(MODEL, *flags) as server:
        wait_for_pool(server, pool)
        time.sleep(SETTLE)
        found = uvloop.run(grow(server.url, te, start))
        time.sleep(SETTLE)
        return found | {"memory": memory(server)}


async def grow(url: str, te: int, start: int) -> dict[str, Any]:
    async with Client(url) as client:
        await client.ask("POST", "/v1/completions", {"prompt": PROMPT.format("before", 0), "max_tokens": 1})
        wall, began = time.time(), time.monotonic()
        await client.ask("POST", "/v1/admin/scale", {"te": te})
        scaled = time.monotonic() - began
        answered: dict[int, float] = {}
        waves = 0
        while len(answered) < te:
            if waves == MOST_WAVES:
                raise UserError(f"after {waves} waves of {te} requests {te - len(answered)} TEs have answered none")
            replies = await asyncio.gather(*(one(client, PROMPT.format(i, waves), began) for i in range(te)))
            waves += 1
            for number, at in await asyncio.gather(*(who(client, id, at) for id, at in replies)):
                answered[number] = min(at, answered.get(number, at))
        state = await client.ask("GET", "/v1/admin/scale")
    climbs = state["climbs"][-(te - start) :]
    steps = {step: [climb["steps"].get(step, 0.0) for climb in climbs] for step in STEPS}
    return {
        "total_s": max(answered.values()),
        "scaled_s": scaled,
        "waves": waves,
        "ready_at_s": sorted(climb["began"] + climb["total_s"] - wall for climb in climbs),
        "answered_at_s": sorted(answered.values()),
        "how": dict(Counter(climb["how"] for climb in climbs)),
        "path": dict(Counter(climb["path"] for climb in climbs)),
        "fell": sorted({why for climb in climbs for why in climb["fell"]})[:4],
        "steps": {
            step: {"sum_s": sum(values), "median_s": statistics.median(values), "max_s": max(values)}
            for step, values in steps.items()
        },
    }


async def one(client: Client, prompt: str, began: float) -> tuple[str, float]:
    """A request: its id, and seconds from `began` to its answer."""
    reply = await client.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1})
    at = time.monotonic() - began
    if reply["usage"]["prompt_tokens"] > MOST_PROMPT:
        raise UserError(f"the prompt has {reply['usage']['prompt_tokens']} tokens; {MOST_PROMPT} are meant to be the most")
    return reply["id"], at


async def who(client: Client, id: str, at: float) -> tuple[int, float]:
    """The TE that answered."""
    record = await client.ask("GET", f"/v1/jobs/{id}")
    return record["jobs"][0]["tasks"][-1]["te"], at


# ---- the table ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    runs, te = found["runs"], found["te"]

    def of(weights: str, start: int, without: str = "") -> list[dict[str, Any]]:
        return [r for r in runs if (r["weights"], r["from"], r["without"]) == (weights, start, without)]

    rows = [[f"to {te} TEs, seconds", "all answered", "POST answered", "TE private, MB", "with its KV, MB", "time", "memory"]]
    for weights in WEIGHTS:
        for start in sorted({r["from"] for r in runs}):
            if some := of(weights, start):
                total = spread([r["total_s"] for r in some])
                private = max(r["memory"]["te_private_mb"] / r["memory"]["te"] for r in some)
                each = max(r["memory"]["each_te_mb"] for r in some)
                rows.append(
                    [
                        f"{weights}, from {start}",
                        seconds(total),
                        seconds(spread([r["scaled_s"] for r in some])),
                        f"{private:.1f}",
                        f"{each:.1f}",
                        reached(total["median"], BAR_SECONDS),
                        reached(each, BAR_MB),
                    ]
                )
    lines = [f"From some TEs to {te}, each of which has answered a request of at most {MOST_PROMPT} tokens:", "", *markdown(rows)]
    if not of("q4_1", 1):
        return lines
    last = of("q4_1", 1)[-1]["memory"]
    lines += [
        "",
        f"Memory afterwards (Q4_1, from 1; MB): {te} TEs {last['te_private_mb']:.0f} private, KV committed"
        f" {last['kv_committed_mb']:.0f}, weights once {last['weights_once_mb']:.0f}, queues {last['queues_and_rest_mb']:.0f},"
        f" keeper {last['keeper_private_mb']:.0f}, control process {last['control_private_mb']:.0f}, {last['pool']} warm"
        f" processes {last['pool_private_mb']:.0f}; all of it (proportional set sizes) {last['pss_mb']:.0f}.",
        "",
    ]
    rows = [["Q4_1, from 1, seconds", "all have answered", "times as long", "TE with its KV, MB", *STEPS, "processes", "weights"]]
    base = statistics.median(r["total_s"] for r in of("q4_1", 1))
    for without in ("", *PATHS):
        if some := of("q4_1", 1, without):
            total = spread([r["total_s"] for r in some])
            medians = [statistics.median(r["steps"][step]["median_s"] for r in some) for step in STEPS]
            sums = sum(sum(step["sum_s"] for step in r["steps"].values()) for r in some)
            shares = [sum(r["steps"][step]["sum_s"] for r in some) / sums for step in STEPS]
            rows.append(
                [
                    f"without {without}" if without else "every fast path",
                    seconds(total),
                    f"{total['median'] / base:.2f}",
                    f"{max(r['memory']['each_te_mb'] for r in some):.1f}",
                    *(f"{m:.3f} ({share:.0%})" for m, share in zip(medians, shares, strict=True)),
                    said(some[-1]["how"]),
                    said(some[-1]["path"]),
                ]
            )
    note = "Steps: a TE's median, and the share of the sum over all TEs; they wait for each other's cores. Without fork each TE"
    note += " has a copy of the packed weights, without DRAM alone it has them from a running TE."
    return [*lines, *markdown(rows), "", note]


def said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
