"""`python -m bench.pd`: what a long prompt does to others' decodes, in each way to split prefill from decode, in one run.

`--rounds` times and each time in another order, a server is started for each mode. First long prompts come alone, for the time
to the second token beside a decode step. Then 8 streams decode steadily while a prompt of 2000 tokens arrives every 3 seconds,
whatever has become of the one before. For each arrival the longest gap between two tokens of any steady stream counts, of those
gaps that reach into the 3 seconds after it; the median over all arrivals is a mode's figure. All modes get the same prompts and
must answer them with the same texts. Beforehand the shares of a team of threads are measured, which semi-PD divides the cores by.

The result goes into `bench/results/pd.json`, the table to standard output. Exit status 1 where a bar is missed or a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench.cpu import machine
from bench.cpu_report import markdown, number, rendered, rotated, tidy
from bench.serve import Outcome, Work, fitted, natural, one, samples
from engine.native import cpu
from sched.gateway.client import Client
from tests.server import Server

ENDPOINT = "/v1/completions"
PARAMS = {"temperature": 0.0, "ignore_eos": True}
PERCENTILES = (50, 90, 99)


class Mode(NamedTuple):
    name: str
    title: str
    flags: tuple[str, ...]


MODES = (
    Mode("colocated", "colocated, whole prompts", ("--te", "1", "--max-num-batched-tokens", "2304")),
    Mode("chunked", "colocated, chunked", ("--te", "1")),
    Mode("1p1d-layer", "1p1d by layer", ("--pd", "1p1d", "--kv-transfer", "layer")),
    Mode("1p1d-request", "1p1d by request", ("--pd", "1p1d", "--kv-transfer", "request")),
    Mode("semi", "semi", ("--pd", "semi")),
)


class Load(msgspec.Struct, frozen=True):
    """What each server is given in a round."""

    decodes: int = 8  # steady streams
    prompt: int = 2000  # tokens of a long prompt
    output: int = 16  # tokens that it is answered with
    arrivals: int = 7  # of long prompts, beside the streams
    every: float = 3.0  # seconds between them
    lone: int = 4  # long prompts that come alone, before; the first of them warms the server up
    steady_prompt: int = 32
    steady_output: int = 3000  # more than a stream gets done while it is looked at


class Seen(msgspec.Struct):
    """What one mode showed, over all rounds. Seconds."""

    gaps: list[float] = []  # the longest after each arrival
    arrived: list[Outcome] = []  # the long prompts among decodes
    lone: list[Outcome] = []  # ... and alone
    itl: list[float] = []  # between tokens of steady streams

    def add(self, other: Seen) -> None:
        for field in self.__struct_fields__:
            getattr(self, field).extend(getattr(other, field))


# ---- load -----------------------------------------------------------------------------------------------------------


async def make_prompts(client: Client, model: str, load: Load) -> tuple[list[Work], list[Work]]:
    """(long prompts, steady ones), no two of which begin alike."""

    async def count(text: str) -> int:
        found = await client.count_tokens(text, model)
        assert found is not None, "our own server counts tokens"
        return found

    rng = np.random.default_rng(0)

    async def some(many: int, tokens: int, output: int) -> list[Work]:
        return [Work(await fitted(count, rng, "", tokens), output, tokens) for _ in range(many)]

    long = await some(load.lone + load.arrivals, load.prompt, load.output)
    return long, await some(load.decodes, load.steady_prompt, load.steady_output)


async def steady(client: Client, model: str, work: Work, times: list[float], moved: asyncio.Event) -> None:
    """A stream that goes on until it is cancelled; `times` get when its tokens came, and `moved` is set at each. Raises where it
    ends by itself: what follows would be no load."""
    async for event in client.stream(ENDPOINT, {"prompt": work.prompt}, model, {**PARAMS, "max_tokens": work.output_len}):
        times.append(event.at)
        moved.set()
    raise RuntimeError(f"a steady stream ended after {len(times)} tokens: ask for more, or for fewer arrivals")


async def asked(request: Awaitable[Outcome]) -> Outcome:
    outcome = await request
    if not outcome.ok:
        raise RuntimeError(f"a request failed: {outcome.error}")
    return outcome


async def measure(url: str, model: str, long: Sequence[Work], streams: Sequence[Work], load: Load) -> Seen:
    """One server's round."""
    seen = Seen()
    async with Client(url) as client:

        def ask(work: Work) -> Awaitable[Outcome]:
            return asked(one(client, ENDPOINT, model, work, PARAMS))

        for work in long[: load.lone]:
            seen.lone.append(await ask(work))
        times: list[list[float]] = [[] for _ in streams]
        moved = asyncio.Event()

        async def until(found: Callable[[], bool]) -> None:
            while not found():
                moved.clear()
                await moved.wait()

        async with asyncio.TaskGroup() as group:
            decodes = [group.create_task(steady(client, model, *pair, moved)) for pair in zip(streams, times, strict=True)]
            await until(lambda: min(map(len, times)) >= 2)  # all of them decode
            asking, began = [], time.monotonic() + load.every / 2
            for i, work in enumerate(long[load.lone :]):
                await asyncio.sleep(began + i * load.every - time.monotonic())
                asking.append(group.create_task(ask(work)))
            seen.arrived = [await task for task in asking]
            # The gap that an arrival made may be longer than its own time.
            end = max(seen.arrived[-1].start + load.every, time.monotonic())
            await until(lambda: min(own[-1] for own in times) >= end)
            for task in decodes:
                task.cancel()
        seen.gaps = [longest_gap(times, o.start, o.start + load.every) for o in seen.arrived]
        seen.itl = [b - a for own in times for a, b in pairwise(own) if began <= b <= end]
    seen.lone = seen.lone[1:]
    return seen


def longest_gap(times: Sequence[Sequence[float]], begin: float, end: float) -> float:
    """The longest time between two tokens of a stream, of those that have a moment in common with begin to end; 0 where there are
    none. `times`: of each stream's tokens, rising."""
    longest = 0.0
    for own in times:
        first = max(1, bisect_right(own, begin))
        for i in range(first, len(own)):
            if own[i - 1] >= end:
                break
            longest = max(longest, own[i] - own[i - 1])
    return longest


# ---- figures --------------------------------------------------------------------------------------------------------


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(milliseconds, p)) for p in PERCENTILES}


def second_token(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Milliseconds from the first token to the second, and of the steps after it: medians, and their ratio."""
    second = float(np.median([o.itl[0] for o in outcomes])) * 1000
    step = float(np.median([gap for o in outcomes for gap in o.itl[1:]])) * 1000
    return {"second_ms": second, "step_ms": step, "ratio": second / step}


def figures(seen: Seen) -> dict[str, Any]:
    gaps = [g * 1000 for g in seen.gaps]
    return {
        "arrivals": len(gaps),
        "gap_ms": {"median": float(np.median(gaps)), "min": min(gaps), "max": max(gaps)},
        "ttft_ms": percentiles(samples(seen.arrived, "ttft")),
        "tpot_ms": percentiles([s * 1000 for s in seen.itl]),
        "long_tpot_ms": percentiles(samples(seen.arrived, "tpot")),
        "lone_ttft_ms": percentiles(samples(seen.lone, "ttft")),
        "second_token_alone": second_token(seen.lone),
        "second_token_beside_decodes": second_token(seen.arrived),
    }


class Bar(NamedTuple):
    what: str
    ratio: float
    bar: float

    @property
    def reached(self) -> bool:
        return self.ratio <= self.bar


def bars(modes: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Of those modes that were measured."""
    if "colocated" in modes:
        for name in ("1p1d-layer", "1p1d-request", "semi"):
            if name in modes:
                ratio = modes[name]["gap_ms"]["median"] / modes["colocated"]["gap_ms"]["median"]
                yield Bar(f"longest gap, {name} beside colocated", ratio, 0.5)
    if "1p1d-layer" in modes:
        yield Bar(
            "time to second token, 1p1d-layer, beside a decode step", modes["1p1d-layer"]["second_token_alone"]["ratio"], 1.3
        )


def differing(seen: dict[str, Seen]) -> dict[str, int]:
    """How many long prompts each mode answered with another text than the first mode that was asked."""
    texts = {name: [o.text for o in (*s.lone, *s.arrived)] for name, s in seen.items()}
    first = next(iter(texts.values()))
    return {name: sum(a != b for a, b in zip(own, first, strict=True)) for name, own in texts.items()}


def table(modes: dict[str, dict[str, Any]]) -> list[str]:
    head = ["mode", "longest gap", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "alone: TTFT", "second token", "a step"]
    rows = [head]
    for mode in MODES:
        if mode.name in modes:
            f = modes[mode.name]
            alone = f["second_token_alone"]
            cells = [f["gap_ms"]["median"], *f["ttft_ms"].values(), *f["tpot_ms"].values()]
            cells += [f["lone_ttft_ms"]["p50"], alone["second_ms"], alone["step_ms"]]
            rows.append([mode.title, *map(number, cells)])
    return markdown(rows)


# ---- shares of a team -------------------------------------------------------------------------------------------------


def measure_shares(seconds: float) -> list[dict[str, float]]:
    """What a team with a share takes of its threads' time, and its speed beside that of the whole team; `seconds` for each."""
    size, many, rows = 576, 60, 64  # matrices of the default model: some milliseconds a program
    weights = [aligned(cpu.packed_bytes("bfloat16", size, size)) for _ in range(many)]
    x, out = aligned(rows * size * 2), aligned(rows * size * 4)
    kinds = {"kind": cpu.LINEAR, "x": x.ctypes.data, "out": out.ctypes.data, "n": size, "k": size}
    ops = (cpu.Op * many)(*(cpu.Op(w=w.ctypes.data, **kinds) for w in weights))
    step = cpu.Step(tokens=rows)
    team = cpu.Team(machine()["cores"])
    found: list[dict[str, float]] = []
    for percent in (100, 90, 75, 60, 50, 30, 10):
        team.share(percent)
        team.run(ops, step)
        runs, used, began = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() < began + seconds:
            team.run(ops, step)
            runs += 1
        wall = time.perf_counter() - began
        taken = 100 * (time.process_time() - used) / wall / team.threads
        found.append({"share": percent, "taken": taken, "speed": 100 * runs / wall})
    team.close()
    whole = found[0]["speed"]
    return [row | {"speed": 100 * row["speed"] / whole} for row in found]


def aligned(nbytes: int) -> np.ndarray:
    """Zeros that begin at a cache line, as weights and buffers do."""
    raw = np.zeros(nbytes + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:nbytes]


# ---- the whole run --------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, load: Load) -> dict[str, Any]:
    modes = [mode for mode in MODES if mode.name in args.modes]
    seen = {mode.name: Seen() for mode in modes}
    busy = os.getloadavg()[0]
    shares = measure_shares(args.share_seconds)
    prompts: tuple[list[Work], list[Work]] | None = None
    common = ("--max-model-len", str(load.prompt + load.steady_output + load.steady_prompt))
    for number_of_round in range(args.rounds):
        for mode in rotated(modes, number_of_round, args.rounds):
            say(f"round {number_of_round + 1}: {mode.title}")
            with Server(args.model, *common, *mode.flags) as server:
                server.ready()
                name = server.get("/v1/models")[1]["data"][0]["id"]
                if prompts is None:
                    prompts = asyncio.run(with_client(server.url, name, load))
                found = asyncio.run(measure(server.url, name, *prompts, load))
            seen[mode.name].add(found)
            gaps = " ".join(number(g * 1000) for g in found.gaps)
            say(f"  longest gaps {gaps} ms; TTFT {number(np.median(samples(found.arrived, 'ttft')))} ms")
    found = {name: figures(own) for name, own in seen.items()}
    wrong = differing(seen)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m bench.pd --rounds {args.rounds} --arrivals {args.arrivals}",
        "machine": machine(),
        "load_average": busy,  # before it; about 0 where nothing else runs
        "model": str(args.model) if not Path(args.model).exists() else Path(args.model).name,
        "load": msgspec.structs.asdict(load),
        "flags": {mode.name: " ".join(mode.flags) for mode in modes},
        "modes": {name: own | {"other_texts": wrong[name]} for name, own in found.items()},
        "bars": [bar._asdict() | {"reached": bar.reached} for bar in bars(found)],
        "shares_percent": shares,
    }


async def with_client(url: str, model: str, load: Load) -> tuple[list[Work], list[Work]]:
    async with Client(url) as client:
        return await make_prompts(client, model, load)


def say(text: str) -> None:
    print(f"bench pd: {text}", file=sys.stderr, flush=True)


def show(report: dict[str, Any]) -> int:
    """Print the table and the bars; the exit status."""
    print("\n".join(table(report["modes"])), "(milliseconds)", sep="\n")
    if report["load_average"] > 1:
        print(f"The machine was busy with other work: load average {report['load_average']:.1f}.")
    for bar in report["bars"]:
        print(f"{bar['what']}: {bar['ratio']:.2f}x, {'reached' if bar['reached'] else 'missed'} (≤ {bar['bar']:g})")
    wrong = {name: own["other_texts"] for name, own in report["modes"].items() if own["other_texts"]}
    print("texts: " + (f"other than the first mode's: {wrong}" if wrong else "the same in every mode"))
    for row in report["shares_percent"]:
        print(f"a share of {row['share']} %: {row['taken']:.0f} % of the threads' time, {row['speed']:.0f} % of the speed")
    return int(bool(wrong) or not all(bar["reached"] for bar in report["bars"]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [mode.name for mode in MODES]
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=natural, default=3)
    parser.add_argument("--arrivals", type=natural, default=Load().arrivals, help="long prompts in a mode's round")
    parser.add_argument("--modes", nargs="+", choices=names, default=names)
    parser.add_argument("--share-seconds", type=float, default=1.0, help="for each share of a team of threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pd.json")
    args = parser.parse_args(argv)
    report = run_all(args, Load(arrivals=args.arrivals))
    args.out.write_text(rendered(tidy(report)) + "\n")
    say(f"written to {args.out}")
    return show(json.loads(args.out.read_text()))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
