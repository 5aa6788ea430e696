"""Part `burst` of `bench.scale`: one TE with a tenth of the cores has half of the load it can bear, then ten times as much for a
minute, then what it had.

More TEs on one box add compute here only because each is held to its share (`--te-share 10`), as if each were on a machine of its
own; without shares one TE would have all cores from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any

import msgspec
import numpy as np
import uvloop

from bench.cpu_report import markdown
from bench.scale_figures import percentile, restored, windows
from bench.scale_server import MODEL, Options, say, serving
from sched.gateway.client import Client, RequestFailed

SHARE, MOST = 10, 10  # percent of the cores, and TEs: together all of them
PROMISE = 1.0  # seconds to the first token, for 95 % of the requests
BEFORE, BURST, AFTER = 10.0, 60.0, 30.0  # seconds
QUICK = (3.0, 12.0, 4.0)
CAPACITY_SECONDS, CAPACITY_AT_ONCE = 8.0, 8
LOOK = 0.5  # seconds between two counts of the TEs
PROMPT = "Request {}: write about the sea, the wind and what the sailors of an old ship have to do in bad weather."
TOKENS = 16
KV = "64M"
SLO = ("--slo-ttft-ms", f"{1000 * PROMISE:g}")
MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "fork": ("autoscaling, TEs by fork", ("--max-te", str(MOST), *SLO)),
    "none": ("no scaling", ()),
    "cold": (
        "autoscaling, cold starts",
        ("--max-te", str(MOST), *SLO, "--scale-without", "keeper", "warm", "fork", "dram"),
    ),
}


class Sent(msgspec.Struct):
    """One request; seconds from the first one's time, infinite where there was no token."""

    at: float
    ttft: float = math.inf
    done: bool = False
    refused: bool = False
    error: str = ""


def measure(options: Options) -> dict[str, Any]:
    times = QUICK if options.quick else (BEFORE, BURST, AFTER)
    common = ("--te", "1", "--te-share", str(SHARE), "--kv-cache-memory-bytes", KV)
    with serving(MODEL, *common) as server:
        capacity = uvloop.run(saturated(server.url, 3.0 if options.quick else CAPACITY_SECONDS))
    rate = capacity / 2
    say(f"a TE with {SHARE} % of the cores ends {capacity:.2f} requests a second: load is {rate:.2f}, then {10 * rate:.2f}")
    found: dict[str, Any] = {}
    for name, (title, flags) in MODES.items():
        with serving(MODEL, *common, *flags) as server:
            found[name] = uvloop.run(loaded(server.url, rate, times, options.seed)) | {"title": title, "flags": " ".join(flags)}
        one = found[name]
        after = "not within the burst" if one["restored_s"] is None else f"after {one['restored_s']:.1f} s"
        say(
            f"{title}: promise kept again {after}, at most {one['most_te']} TEs, {one['refused']} refused, {one['failed']} failed"
        )
    failed = sum(one["failed"] for one in found.values())
    return ({"verdict": f"{failed} requests failed"} if failed else {}) | {
        "share_percent": SHARE,
        "capacity_a_s": capacity,
        "rates_a_s": [rate, 10 * rate, rate],
        "seconds": times,
        "promise_s": PROMISE,
        "tokens": TOKENS,
        "modes": found,
    }


# ---- load ---------------------------------------------------------------------------------------------------------------


async def saturated(url: str, seconds: float) -> float:
    """Requests a second that end where as many are always under way as run well together."""
    ended = 0
    async with Client(url) as client:
        await one(client, "warm up", 0.0)
        began = time.monotonic()

        async def loop(who: int) -> None:
            nonlocal ended
            count = 0
            while time.monotonic() < began + seconds:
                await one(client, f"{who}.{count}", 0.0)
                count += 1
                ended += 1

        await asyncio.gather(*(loop(who) for who in range(CAPACITY_AT_ONCE)))
        return ended / (time.monotonic() - began)


async def one(client: Client, name: str, at: float) -> Sent:
    sent = Sent(at)
    start = time.monotonic()
    try:
        prompt = PROMPT.format(name)
        async with contextlib.aclosing(client.complete(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)) as stream:
            async for event in stream:
                if event.text and sent.ttft == math.inf:
                    sent.ttft = event.at - start
        sent.done = True
    except RequestFailed as e:
        sent.refused, sent.error = e.status == 429, str(e)
    return sent


def arrivals(rate: float, times: tuple[float, float, float], seed: int) -> list[float]:
    """Poisson arrivals: at `rate`, ten times that, and `rate` again; seconds."""
    rng = np.random.default_rng(seed)
    found: list[float] = []
    begin = 0.0
    for seconds, factor in zip(times, (1, 10, 1), strict=True):
        at = begin + rng.exponential(1 / (factor * rate))
        while at < begin + seconds:
            found.append(at)
            at += rng.exponential(1 / (factor * rate))
        begin += seconds
    return found


async def loaded(url: str, rate: float, times: tuple[float, float, float], seed: int) -> dict[str, Any]:
    jump, over, end = times[0], times[0] + times[1], sum(times)
    async with Client(url) as client:
        await one(client, "warm up", 0.0)
        began = time.monotonic()
        waiting: dict[asyncio.Task[Sent], float] = {}
        counts: list[tuple[float, int]] = []

        async def count() -> None:
            while True:
                [card] = (await client.ask("GET", "/v1/models"))["data"]
                counts.append((time.monotonic() - began, card["te"]))
                await asyncio.sleep(LOOK)

        counting = asyncio.create_task(count())
        for number, at in enumerate(arrivals(rate, times, seed)):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            waiting[asyncio.create_task(one(client, str(number), at))] = at
        await asyncio.sleep(max(0.0, began + end - time.monotonic()))
        counting.cancel()
        await asyncio.wait((counting,))
        # What has no answer by now had 30 s for it and more, and would only tell how long the queue is.
        left = [task for task in waiting if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.wait(waiting)
        state = await client.ask("GET", "/v1/admin/scale")
    sent = [task.result() if not task.cancelled() else Sent(at) for task, at in waiting.items()]
    climbs = [climb for climb in state["climbs"] if climb["why"] != "the server starts"]
    return summed(sent, jump, over, end) | {
        "te": [[round(at, 1), te] for at, te in counts],
        "most_te": max(te for _, te in counts),
        "starts": len(climbs),
        "start_s": max((climb["total_s"] for climb in climbs), default=None),
    }


def summed(sent: list[Sent], jump: float, over: float, end: float) -> dict[str, Any]:
    """What came of the requests. A refused one counts as one whose token never came."""
    samples = [(one.at, one.ttft) for one in sent]
    burst = [one.ttft for one in sent if jump <= one.at < over]
    return {
        "requests": len(sent),
        "refused": sum(one.refused for one in sent),
        "failed": sum(bool(one.error) and not one.refused for one in sent),
        "errors": sorted({one.error for one in sent if one.error and not one.refused})[:4],
        "waiting_at_the_end": sum(not one.done and not one.error for one in sent),
        "restored_s": restored(samples, jump, over, PROMISE),
        "kept_percent": 100 * sum(ttft <= PROMISE for ttft in burst) / len(burst),
        "p95_before_s": percentile([one.ttft for one in sent if one.at < jump] or [math.inf], 95),
        "p95_burst_s": percentile(burst, 95),
        "p95_s": [[at, seconds] for at, seconds in windows(samples, 0.0, end, 1.0)],
    }


# ---- the table ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    before, burst, after = found["seconds"]
    low, high, _ = found["rates_a_s"]
    said = [
        f"One TE with {found['share_percent']} % of the cores ends {found['capacity_a_s']:.2f} requests of {found['tokens']}",
        f"tokens a second. Load: {low:.2f} a second for {before:g} s, {high:.2f} for {burst:g} s, {low:.2f} for {after:g} s",
        f"(Poisson). Promised: a first token within {found['promise_s']:g} s at P95. More TEs on this one box add compute only",
        "because each is held to its share.",
    ]
    lines = [" ".join(said), ""]
    rows = [
        ["", "promise kept again after", "P95 TTFT of the burst", "within the promise", "TEs", "a start", "refused", "failed"]
    ]
    for mode in found["modes"].values():
        again = "not within the burst" if mode["restored_s"] is None else f"{mode['restored_s']:.1f} s"
        p95 = "more never came" if mode["p95_burst_s"] is None else f"{mode['p95_burst_s']:.2f} s"
        slowest = "" if mode["start_s"] is None else f"≤ {mode['start_s']:.2f} s"
        counts = [str(mode[key]) for key in ("refused", "failed")]
        rows.append([mode["title"], again, p95, f"{mode['kept_percent']:.0f} %", str(mode["most_te"]), slowest, *counts])
    lines += markdown(rows)
    for mode in found["modes"].values():
        steps = [
            f"{at - before:.1f} s: {te}"
            for (_, last), (at, te) in zip([[0, 0], *mode["te"]], mode["te"], strict=False)
            if te != last
        ]
        lines += ["", f"TEs, {mode['title']}, from the jump: {', '.join(steps)}."]
    return lines
