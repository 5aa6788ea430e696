"""What one API key's first tokens cost beside another key: alone, beside a key that sends as much, beside a flood.

    python -m bench.fairness [--requests 150] [--rounds 3] [--load 0.1] [--models smollm2-135m-instruct] [--out FILE]

A real server with two keys. The victim's requests come by chance (Poisson) at `--load` of what the server can do; the other key
sends none, as many, or, in the flood, so many that three times the seats are always taken or waited for. `one key` is the flood
with the victim's requests under the flood's own key: what it would be without fairness. The four take turns, `--rounds` of
each, so that a disturbance of the machine meets them all.

Passed where the victim's P99 beside the flood is within its P99 alone plus two steps of the token budget, and within 1.3 times
its P99 beside the equal key: exit status 1 where it isn't. A step's time is measured: what one budget more of prompt adds to a
first token on the idle server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from bench.cpu import machine
from bench.scale_figures import finite, percentile
from sched.gateway.client import Client
from tests import tiny
from tests.assets import default_model
from tests.server import Server

SEATS, BUDGET = 32, 256
OUTPUT = 32  # tokens of each answer
SHORTEST, LONGEST = 32, 96  # tokens of a prompt
STEPS, EQUAL = 2, 1.3  # what the flood may add: so many steps, and so many times what an equal key does
SETTLE = 5.0  # seconds until a flood is at its height
PHASES = ("alone", "equal", "flood", "one key")
KEYS = """
[keys.victim]
key = "victim"
[keys.other]
key = "other"
"""


class Asker:
    """Sends requests of one key."""

    def __init__(self, client: Client, rng: Random):
        self.client, self.rng = client, rng

    def prompt(self, tokens: int = 0) -> list[int]:
        return [self.rng.randrange(256) for _ in range(tokens or self.rng.randint(SHORTEST, LONGEST))]

    async def ask(self, tokens: int = 0, output: int = OUTPUT) -> float:
        """Seconds to the first token of a request with a prompt of so many tokens, or of any length."""
        began, first = time.monotonic(), 0.0
        async for event in self.client.complete(self.prompt(tokens), max_tokens=output, temperature=0.0, ignore_eos=True):
            first = first or event.at
        return first - began

    async def by_chance(self, rate: float, count: int) -> list[float]:
        """So many requests at `rate` a second, whatever became of those before."""
        running = []
        for _ in range(count):
            await asyncio.sleep(self.rng.expovariate(rate))
            running.append(asyncio.create_task(self.ask()))
        return list(await asyncio.gather(*running))

    async def always(self, streams: int, done: list[float]) -> None:
        """So many requests at once, for good; `done` gets the times at which they end."""

        async def one() -> None:
            while True:
                body = {"prompt": self.prompt(), "max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True}
                await self.client.ask("POST", "/v1/completions", body)
                done.append(time.monotonic())

        await asyncio.gather(*(one() for _ in range(streams)))


async def send_always(url: str, streams: int, seed: int) -> None:
    async with Client(url, "other") as client:
        await Asker(client, Random(seed)).always(streams, [])


def flood(url: str, streams: int, seed: int) -> None:
    asyncio.run(send_always(url, streams, seed))


@contextlib.contextmanager
def flooded(url: str, seed: int) -> Iterator[None]:
    """While a process of its own floods the server: in ours it would delay what we measure."""
    process = multiprocessing.get_context("spawn").Process(target=flood, args=(url, 3 * SEATS, seed))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


class Figures(NamedTuple):
    """A victim's first tokens, in seconds."""

    p50: float
    p99: float
    n: int


def figures(seconds: Sequence[float]) -> Figures:
    return Figures(percentile(seconds, 50), percentile(seconds, 99), len(seconds))


def verdict(found: dict[str, Figures], step: float) -> dict[str, Any]:
    """Whether the flood costs the victim no more than it may."""
    flood, by_steps, by_equal = found["flood"].p99, found["alone"].p99 + STEPS * step, EQUAL * found["equal"].p99
    return {
        "p99_flood_s": flood,
        "at_most_by_steps_s": by_steps,
        "at_most_by_equal_s": by_equal,
        "within_steps": flood <= by_steps,
        "within_equal": flood <= by_equal,
    }


async def step_seconds(victim: Asker) -> float:
    """How long a step of the whole token budget takes on the idle server."""
    await victim.ask(BUDGET, 1)
    pairs = [(await victim.ask(BUDGET, 1), await victim.ask(3 * BUDGET, 1)) for _ in range(7)]
    return statistics.median(long - short for short, long in pairs) / 2


async def capacity(other: Asker, seconds: float = 5.0) -> float:
    """Requests a second that the server ends with all seats taken."""
    done: list[float] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2 * seconds):
            await other.always(2 * SEATS, done)
    return sum(at > done[-1] - seconds for at in done) / seconds


async def phase(name: str, url: str, victim: Asker, other: Asker, rate: float, count: int) -> list[float]:
    if name == "alone":
        return await victim.by_chance(rate, count)
    if name == "equal":
        mine, _ = await asyncio.gather(victim.by_chance(rate, count), other.by_chance(rate, count))
        return mine
    with flooded(url, count):
        await asyncio.sleep(SETTLE)
        await victim.ask()  # from here on the server knows of the victim
        return await (victim if name == "flood" else other).by_chance(rate, count)


async def measure(url: str, requests: int, rounds: int, load: float, seed: int) -> dict[str, Any]:
    async with Client(url, "victim") as mine, Client(url, "other") as theirs:
        victim, other = Asker(mine, Random(seed)), Asker(theirs, Random(seed + 1))
        step = await step_seconds(victim)
        most = await capacity(other)
        rate = load * most
        took: dict[str, list[float]] = {name: [] for name in PHASES}
        for _ in range(rounds):
            for name in PHASES:
                took[name] += await phase(name, url, victim, other, rate, -(-requests // rounds))
    found = {name: figures(seconds) for name, seconds in took.items()}
    return {
        "requests_s": most,
        "victim_requests_s": rate,
        "step_s": step,
        "ttft_s": {name: one._asdict() for name, one in found.items()},
        **verdict(found, step),
    }


def serve(model: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    path = tiny.make(folder / "tiny", max_position_embeddings=2048) if model == "tiny" else default_model()
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    flags = ("--max-num-seqs", SEATS, "--max-num-batched-tokens", BUDGET, "--max-model-len", 2048, "--no-enable-prefix-caching")
    with Server(path, "--api-keys-file", keys, *map(str, flags)) as server:
        row = {"model": model, **asyncio.run(measure(server.ready().url, args.requests, args.rounds, args.load, args.seed))}
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    times = ", ".join(f"{name} {one['p50'] * 1e3:.0f}/{one['p99'] * 1e3:.0f}" for name, one in row["ttft_s"].items())
    print(f"{row['model']}: {row['requests_s']:.1f} requests/s, a step {row['step_s'] * 1e3:.0f} ms; TTFT P50/P99 in ms: {times}")
    for what in ("steps", "equal"):
        said = "within" if row[f"within_{what}"] else "BEYOND"
        print(f"  {row['p99_flood_s'] * 1e3:.0f} ms is {said} {row[f'at_most_by_{what}_s'] * 1e3:.0f} ms ({what})", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fairness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=150, help="of the victim, in each of the four cases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.1, help="the victim's part of what the server can do")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"], choices=["tiny", "smollm2-135m-instruct"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fairness.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = [serve(model, Path(folder), args) for model in args.models]
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python -m bench.fairness", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)),
        "seats": SEATS,
        "step_tokens": BUDGET,
        "prompt_tokens": [SHORTEST, LONGEST],
        "output_tokens": OUTPUT,
        "load": args.load,
        "rounds": args.rounds,
        "rows": [finite(row) for row in rows],
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["within_steps"] and row["within_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
