"""Part `models` of `bench.scale`: eight models where there is memory for three, asked for by Zipf's law by eight clients.

Who comes back to a model that sleeps wakes it; whether its packed weights are still in memory depends on `--weights-dram-bytes`,
which is measured with room for three more, for all, and for none. A request is a hit where its model was ready when it came: its
task was given to a TE at once, as its job's record says.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import uvloop

from bench.cpu_report import markdown
from bench.scale_figures import lru_hits, percentile, zipf
from bench.scale_server import MODEL, Options, say, serving
from engine.types import UserError
from scale import pull
from sched.gateway.client import Client, RequestFailed

MODELS, HOLDS, CLIENTS = 8, 3, 8
REQUESTS, QUICK_REQUESTS = 320, 48
TOKENS = 8
KV = "32M"
AT_ONCE = 0.002  # seconds from admission to a TE: a task that waits for none has it within the same turn of the loop
LOOK = 1.0  # seconds; the server keeps its last 256 starts
MORE = {"three more": HOLDS, "all": MODELS, "none": 0}  # models whose packed weights may be kept beside
PROMPT = "Client {} asks for the {}th time: tell me a short story about"


def measure(options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="deepserve-bench-") as folder:
        paths = copies(pull.pull(MODEL, say), Path(folder))
        with serving(paths[0], "--kv-cache-memory-bytes", KV) as server:
            [one] = server.get("/v1/admin/scale")[1]["models"]
        footprint, weights = one["footprint_bytes"], one["weights_bytes"]
        budget = HOLDS * footprint + footprint // 4
        found = {}
        for name, count in MORE.items():
            dram = count * weights + (weights // 4 if count else 0)
            flags = ["--memory-budget", str(budget), "--weights-dram-bytes", str(dram), "--kv-cache-memory-bytes", KV]
            with serving(*paths, *flags) as server:
                found[name] = uvloop.run(asked(server.url, options)) | {"weights_dram_bytes": dram}
            case = found[name]
            say(
                f"packed weights of {name}: {case['hit_percent']:.0f} % hits, {case['swap_ins']} swap-ins,"
                f" {case['failed']} failed, {case['took_s']:.1f} s"
            )
    failed = sum(case["failed"] for case in found.values())
    verdict = {"verdict": f"{failed} requests failed"} if failed else {}
    return (
        verdict
        | {"models": MODELS, "holds": HOLDS, "clients": CLIENTS, "memory_budget": budget, "footprint_bytes": footprint}
        | {
            "weights_bytes": weights,
            "cases": found,
        }
    )


def copies(shipped: Path, folder: Path) -> list[Path]:
    """The model under so many names."""
    paths = [folder / f"model-{number}.gguf" for number in range(1, MODELS + 1)]
    for path in paths:
        try:
            os.link(shipped, path)
        except OSError:  # another file system
            shutil.copyfile(shipped, path)
    return paths


async def asked(url: str, options: Options) -> dict[str, Any]:
    """The load on one server, and what came of it."""
    requests = QUICK_REQUESTS if options.quick else REQUESTS
    rng = Random(options.seed)
    order = rng.choices(range(MODELS), zipf(MODELS), k=requests)
    climbs: dict[tuple[int, float], dict[str, Any]] = {}
    outcomes: list[dict[str, Any]] = []
    async with Client(url) as client:
        names = await client.models()
        if len(names) != MODELS:
            raise UserError(f"the server lists {len(names)} models where {MODELS} are served")

        async def look() -> None:
            for climb in (await client.ask("GET", "/v1/admin/scale"))["climbs"]:
                climbs[climb["te"], climb["began"]] = climb

        async def keep_looking() -> None:
            while True:
                await look()
                await asyncio.sleep(LOOK)

        left = iter(enumerate(order))

        async def run(who: int) -> None:
            for number, model in left:  # each takes the next one: closed loop
                outcomes.append(await one(client, names[model], PROMPT.format(who, number)))

        looking = asyncio.create_task(keep_looking())
        began = time.monotonic()
        await asyncio.gather(*(run(who) for who in range(CLIENTS)))
        took = time.monotonic() - began
        looking.cancel()
        await asyncio.wait((looking,))
        await look()
    swaps = [climb for climb in climbs.values() if climb["why"] != "the server starts"]
    good = [o for o in outcomes if not o["error"]]
    return {
        "requests": requests,
        "failed": len(outcomes) - len(good),
        "errors": sorted({o["error"] for o in outcomes if o["error"]})[:4],
        "took_s": took,
        "hit_percent": 100 * sum(o["hit"] for o in good) / max(1, len(good)),
        "lru_of_one_client_percent": 100 * lru_hits(order, HOLDS),
        "most_popular_percent": 100 * sum(zipf(MODELS)[:HOLDS]),
        "ttft_of_hits_s": both([o["ttft"] for o in good if o["hit"]]),
        "ttft_of_misses_s": both([o["ttft"] for o in good if not o["hit"]]),
        "swap_ins": len(swaps),
        "swap_in_s": {path: both([c["total_s"] for c in swaps if c["path"] == path]) for path in ("dram", "disk", "fork")},
        "fell": sorted({why for climb in swaps for why in climb["fell"]})[:4],
    }


async def one(client: Client, model: str, prompt: str) -> dict[str, Any]:
    """A completion: whether its model was ready, and seconds from asking until the server had its first token."""
    began = time.time()
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
    try:
        reply = await client.ask("POST", "/v1/completions", body)
        record = await client.ask("GET", f"/v1/jobs/{reply['id']}")
    except RequestFailed as e:
        return {"error": str(e)}
    times = {life["state"]: life["at"] for life in record["jobs"][0]["tasks"][0]["times"]}
    hit = times["dispatched"] - times["queued"] < AT_ONCE
    return {"hit": hit, "ttft": record["first_token_at"] - began, "error": ""}


def both(values: list[float]) -> dict[str, float] | None:
    return {"n": len(values), "median": percentile(values, 50), "p95": percentile(values, 95)} if values else None


# ---- the table ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['models']} models of {found['footprint_bytes'] / 1e6:.0f} MB each (weights {found['weights_bytes'] / 1e6:.0f})"
        f" in {found['memory_budget'] / 1e6:.0f} MB: {found['holds']} fit. {found['clients']} clients, each with one request at a"
        " time.",
        "",
    ]
    head = [
        "packed weights kept beside, of",
        "requests",
        "hits",
        "TTFT of hits, median / P95, s",
        "of misses",
        "swap-in from DRAM",
    ]
    rows = [[*head, "from disk", "failed"]]
    for name, case in found["cases"].items():
        spreads = (case["ttft_of_hits_s"], case["ttft_of_misses_s"], case["swap_in_s"]["dram"], case["swap_in_s"]["disk"])
        rows.append(
            [name, str(case["requests"]), f"{case['hit_percent']:.0f} %", *map(pair, spreads), str(case["failed"])],
        )
    lines += markdown(rows)
    case = next(iter(found["cases"].values()))
    note = (
        f"For comparison: the {found['holds']} most popular models get {case['most_popular_percent']:.0f} % of the requests, and"
    )
    return [*lines, "", f"{note} one client alone would find {case['lru_of_one_client_percent']:.0f} % ready."]


def pair(values: dict[str, float] | None) -> str:
    return "–" if values is None else f"{values['median']:.3f} / {values['p95']:.3f} ({values['n']})"
