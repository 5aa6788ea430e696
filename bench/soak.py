"""Kill task executors under load, over and over: every stream must end with the text it has undisturbed.

    python -m bench.soak [--rounds 20] [--model MODEL] [--out FILE]

Starts a server of two TEs, runs 16 streams (half greedy, half sampled with a seed) once undisturbed, then `--rounds`
times with a SIGKILL of the busiest TE, in turn while it prefills and while it decodes. Afterwards no process and no
used KV block may be left. Exit status 1 where a text differs or something is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from sched.gateway.client import Client
from tests.server import Server, family, wait_until

STREAMS = 16
TOKENS = 96


async def stream(url: str, model: str, i: int, progress: list[int]) -> str:
    """One stream's text; `progress` counts every stream's tokens."""
    prompt = f"This is stream number {i}. " * (4 + 6 * (i % 4))
    text = ""
    async with Client(url) as client:
        settings = {"max_tokens": TOKENS, "temperature": float(i % 2), "seed": i, "ignore_eos": True}
        async for event in client.complete(prompt, model=model, **settings):
            text += event.text
            progress[i] += 1
    return text


async def round_of(server: Server, model: str, kill_when: str | None, rng: random.Random) -> tuple[list[str], float]:
    """All streams' texts, and seconds until /health told of the kill."""
    progress = [0] * STREAMS
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream(server.url, model, i, progress)) for i in range(STREAMS)]
        noticed = group.create_task(kill(server, kill_when, progress, rng))
    return [t.result() for t in tasks], noticed.result()


async def kill(server: Server, when: str | None, progress: list[int], rng: random.Random) -> float:
    if when is None:
        return 0.0
    wanted = 0 if when == "prefill" else rng.randrange(STREAMS, STREAMS * TOKENS // 2)
    while sum(progress) < wanted or not any(t["load"]["running"] + t["load"]["waiting"] for t in await tes(server)):
        await asyncio.sleep(0.002)
    pid = max((t for t in await tes(server) if t["state"] == "ready"), key=lambda t: t["load"]["running"])["pid"]
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    while (await asyncio.to_thread(server.get, "/health"))[0] == 200 and any(t["pid"] == pid for t in await tes(server)):
        await asyncio.sleep(0.002)
    return time.monotonic() - began


async def tes(server: Server) -> list[dict]:
    return await asyncio.to_thread(server.tes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    rows, failed = [], 0
    with Server(
        args.model, "--te", "2", "--max-model-len", "1024", "--max-num-batched-tokens", "128", "--kv-cache-memory-bytes", "512M"
    ) as server:
        server.ready()
        model = server.get("/v1/models")[1]["data"][0]["id"]
        want, _ = asyncio.run(round_of(server, model, None, rng))
        for number in range(args.rounds):
            when = ("prefill", "decode")[number % 2]
            wait_until("all TEs are back", lambda: server.get("/health")[0] == 200)
            began = time.monotonic()
            got, noticed = asyncio.run(round_of(server, model, when, rng))
            wrong = sum(a != b for a, b in zip(got, want, strict=True))
            failed += wrong > 0
            rows.append(
                {
                    "killed_in": when,
                    "wrong_texts": wrong,
                    "noticed_s": round(noticed, 4),
                    "seconds": round(time.monotonic() - began, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        wait_until("all TEs are back", lambda: server.get("/health")[0] == 200)
        used = sum(t["load"]["blocks_used"] for t in server.tes())
        marker = server.marker
    left = len(family(marker))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m bench.soak " + " ".join(argv or sys.argv[1:]),
        "streams": STREAMS,
        "rounds": rows,
        "failed_rounds": failed,
        "blocks_in_use_after": used,
        "processes_left": left,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{args.rounds} kills, {failed} rounds with a wrong text, {used} blocks in use, {left} processes left;"
        f" written to {args.out}"
    )
    return int(bool(failed or used or left))


if __name__ == "__main__":
    sys.exit(main())
