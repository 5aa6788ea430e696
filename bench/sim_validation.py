"""`python -m bench.sim_validation`: whether the simulator says what the real server does, on this machine.

Three servers: one TE, two TEs, a prefill and a decode TE. Each is first asked for single prompts and steady decodes, from which
the costs of its steps are fitted. Then come scenarios: requests at a rate at which the simulated TEs compute for a stated part of
the time. What the server was sent, and when, goes through the simulator with the fitted costs; means of TTFT and TPOT are put
beside each other. Client, server and TEs share this machine's cores, in the measurement of costs as well.

The result goes into `bench/results/sim_validation.json`; layouts that a run leaves out keep what an earlier one found.
Exit status 1 where a mean is farther off than 25 %.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench.cpu import machine
from bench.profile import line
from bench.scale_server import MODEL, serving
from bench.serve import Outcome, Work, one
from sched.costs import Costs, Step, fitted
from sched.gateway.client import Client
from sched.heatmap import HeatMap
from sched.simulate import Cluster, Figures, Simulation, figures, roles_of
from sched.simulate_te import Spec
from sched.traces import Arrival, Spans, around, edited, gaps, streams

OUT = Path(__file__).parent / "results" / "sim_validation.json"
BAR = 0.25
ENDPOINT = "/v1/completions"
PARAMS = {"temperature": 0.0, "ignore_eos": True}
# The server's settings, spelt out: the simulator has the same.
CHUNK, SEATS, BLOCK, KV_BLOCKS = 256, 64, 16, 8192
IDS = 10_000, 30_000  # random tokens of prompts: the middle of the vocabulary, where no special ones are


class Layout(NamedTuple):
    name: str
    roles: str
    flags: tuple[str, ...]


LAYOUTS = {
    "1c": Layout("one TE", "1c", ("--te", "1")),
    "2c": Layout("two TEs", "2c", ("--te", "2")),
    "1p1d": Layout("a prefill and a decode TE", "1p1d", ("--pd", "1p1d")),
}


class Scenario(NamedTuple):
    name: str
    layout: str
    busy: float  # of the TEs' time
    prompt: tuple[float, float]  # mean tokens, and how their logarithm spreads
    output: tuple[float, float]
    variance: float = 1.0  # of gaps, beside a Poisson process's
    kept: float = 0.0  # of a prompt, the part that a session's next one repeats, in the mean


SCENARIOS = (
    Scenario("short chats", "1c", 0.75, (150, 0.5), (60, 0.5)),
    Scenario("long prompts", "1c", 0.6, (800, 0.4), (30, 0.4)),
    Scenario("bursts", "1c", 0.5, (250, 0.6), (50, 0.6), variance=3.0),
    Scenario("sessions that repeat their prompts", "1c", 0.6, (600, 0.3), (40, 0.4), kept=0.8),
    Scenario("two TEs", "2c", 0.6, (250, 0.6), (50, 0.6)),
    Scenario("prefill and decode apart", "1p1d", 0.6, (300, 0.5), (60, 0.5)),
)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- what is asked --------------------------------------------------------------------------------------------------


def arrivals(scenario: Scenario, rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
    """For so long, `rate` a second."""
    when, sizes, results, rng = streams(seed, 4)
    prompts, outputs = around(sizes, *scenario.prompt, 8, 1500), around(results, *scenario.output, 2, 400)
    at, spans, prompt = 0.0, dict[int, Spans](), dict[int, int]()
    for number, gap in enumerate(gaps(when, rate, scenario.variance), 1):
        at += gap
        if at > seconds:
            return
        session = int(rng.integers(8)) if scenario.kept else number
        prompt.setdefault(session, next(prompts))
        kept = int(prompt[session] * rng.beta(4 * scenario.kept, 4 * (1 - scenario.kept))) if scenario.kept else 0
        spans[session] = edited(spans.get(session, ()), kept, number)
        yield Arrival(at, prompt[session], next(outputs), spans[session])


def ids_of(spans: Spans, tokens: int, salt: int) -> list[int]:
    """The same ids for the same places of a source, and for no others. `salt`: of a scenario, so that none finds another's."""
    found: list[int] = []
    for source, end in spans:
        rng = np.random.default_rng((salt, source))
        whole = rng.integers(*IDS, min(end, tokens))
        found += whole[len(found) :].tolist()
    return found[:tokens]


async def ask(client: Client, ids: list[int], output: int) -> Outcome:
    work = Work(ids, output, len(ids))  # type: ignore[arg-type]  # ids instead of a text
    outcome = await one(client, ENDPOINT, MODEL, work, PARAMS)
    if not outcome.ok:
        raise RuntimeError(f"a request failed: {outcome.error}")
    return outcome


# ---- costs ----------------------------------------------------------------------------------------------------------

PROMPTS = (16, 64, 128, 256, 512, 1024)
DECODES = ((1, 64), (2, 64), (4, 64), (8, 64), (16, 64), (1, 1024), (4, 1024), (8, 512))  # sequences of a TE, tokens of context
DECODED = 48  # tokens of each
BESIDE = (2, 8)  # sequences that decode while prompts of so many tokens are computed
BESIDE_PROMPT = 1024
SETTLE = 0.3  # seconds until a TE is busy
BESIDE_DECODED = 320  # tokens of each: enough to last until the prompt is computed, however quick the machine
REPEATS = 4


class Fitted(NamedTuple):
    costs: Costs
    around: float  # seconds that a first token takes outside of steps
    error: float  # of the fit: the root of the mean squared relative error


async def measure_costs(client: Client, layout: Layout, seed: int) -> Fitted:
    """The costs of a TE while its neighbours do the same."""
    rng = np.random.default_rng(seed)
    tes = 2 if layout.name == LAYOUTS["2c"].name else 1
    split = layout.name == LAYOUTS["1p1d"].name

    async def batch(count: int, tokens: int, output: int) -> list[Outcome]:
        prompts = rng.integers(*IDS, (count, tokens)).tolist()
        return list(await asyncio.gather(*(ask(client, ids, output) for ids in prompts)))

    async def neighbour(prompt: int, output: int) -> None:
        """Keep the other TE of a pair busy, with prompts alone or with decodes."""
        while True:
            await batch(1 if output == 1 else 4, prompt, output)

    await batch(tes, 256, 16)
    steps: list[Step] = []
    # TEs of a pair do different things, and slow each other down all the same: every other measurement is made while the other
    # one is busy, as it is for about half of the time in the scenarios.
    for streams_, tokens, beside_it in [(*d, busy) for d in DECODES for busy in ((False, True) if split else (False,))]:
        async with meanwhile(neighbour(BESIDE_PROMPT, 1) if beside_it else None):
            done = await batch(streams_ * tes, tokens, DECODED)
        ends = [o.start + o.ttft + np.concatenate(([0.0], np.cumsum(o.itl))) for o in done]
        begin, end = max(times[0] for times in ends), min(times[-1] for times in ends)
        found = [b - a for times in ends for a, b in pairwise(times.tolist()) if a >= begin and b <= end]
        if found:
            steps.append(Step(0.0, 0.0, streams_, streams_ * (tokens + DECODED / 2), float(np.mean(found))))
    alone = steps[0].seconds
    # What a lone request with a prompt of one token takes beyond a step is the way to the TE and back.
    way = max(0.0, float(np.median([(await batch(1, 1, 1))[0].ttft for _ in range(4 * REPEATS)])) - alone)
    before = (0, 0.0)
    transfers: list[tuple[float, float]] = []
    for tokens in PROMPTS:
        done = [o for _ in range(REPEATS) for o in await batch(tes, tokens, 8 if split else 1)]
        if split:
            async with meanwhile(neighbour(16, BESIDE_DECODED)):
                done += [o for _ in range(REPEATS) for o in await batch(tes, tokens, 8)]
        seconds = float(np.mean([o.ttft for o in done])) - way
        if tokens <= CHUNK:
            steps.append(Step(tokens, 0.0, 0.0, 0.0, seconds))
        else:
            chunks = (tokens - before[0]) / CHUNK
            steps.append(Step(CHUNK, (before[0] + tokens - CHUNK) / 2, 0.0, 0.0, (seconds - before[1]) / chunks))
        before = tokens, seconds
        transfers += [(tokens, max(0.0, o.itl[0] - float(np.median(o.itl[1:])))) for o in done if len(o.itl) > 1]
    full = steps[-1]
    for streams_ in BESIDE if not split else ():  # no step of a pair does both
        steps += [await beside(client, streams_, tes, rng) for _ in range(REPEATS)]
    start = Costs(p1=full.seconds / full.prompt, d0=alone, chunk=CHUNK)
    peer0, peer = line(transfers) if split else (0.0, 0.0)
    costs = msgspec.structs.replace(fitted(start, steps), peer0=peer0, peer=peer)
    errors = [costs.step(s.prompt, s.context, s.sequences, s.kv) / s.seconds - 1 for s in steps]
    return Fitted(costs, way, float(np.sqrt(np.mean(np.square(errors)))))


@contextlib.asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, None] | None) -> AsyncIterator[None]:
    """While that goes on beside."""
    task = asyncio.ensure_future(work) if work is not None else None
    await asyncio.sleep(SETTLE if task is not None else 0.0)
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))


async def beside(client: Client, count: int, tes: int, rng: np.random.Generator) -> Step:
    """A step of a long prompt, in the mean, of those in which `count` sequences a TE decode: from their longest gaps while it is
    computed."""
    decodes = [asyncio.ensure_future(ask(client, ids, BESIDE_DECODED)) for ids in rng.integers(*IDS, (count * tes, 64)).tolist()]
    await asyncio.sleep(0.06 * count)  # until all of them decode
    began = time.monotonic()
    await asyncio.gather(*(ask(client, ids, 1) for ids in rng.integers(*IDS, (tes, BESIDE_PROMPT)).tolist()))
    ended = time.monotonic()
    done = await asyncio.gather(*decodes)
    chunk = CHUNK - count
    steps = BESIDE_PROMPT // chunk
    gaps_of = [np.sort(gaps_between(o, began, ended))[-steps:] for o in done]
    seconds = float(np.mean([gaps.mean() for gaps in gaps_of if len(gaps) == steps]))
    return Step(chunk, (steps - 1) * chunk / 2, count, count * 96, seconds)


def gaps_between(outcome: Outcome, began: float, ended: float) -> np.ndarray:
    """Seconds between the tokens that came from one moment to another; both by CLOCK_MONOTONIC."""
    times = outcome.start + outcome.ttft + np.concatenate(([0.0], np.cumsum(outcome.itl)))
    return np.diff(times[(times >= began) & (times <= ended)])


# ---- both worlds ----------------------------------------------------------------------------------------------------


def simulated(layout: Layout, fit: Fitted, asked: Sequence[Arrival]) -> tuple[Figures, float]:
    """Figures of all requests, and the part of the time in which a TE computed (the busiest one's)."""
    spec = Spec(seats=SEATS, block=BLOCK, kv_tokens=KV_BLOCKS * BLOCK, overlapped=True)
    cluster = Cluster(roles=roles_of(layout.roles, None), costs=fit.costs, spec=spec)
    simulation = Simulation(cluster, "cost", HeatMap())
    done = simulation.run(asked)
    busiest = max(te.busy_seconds for te in simulation.tes.values())
    return figures(done, 0.0, asked[-1].at + 1.0, None), busiest / done.seconds


def rate_for(scenario: Scenario, fit: Fitted, seconds: float, seed: int) -> float:
    """The rate at which the busiest simulated TE computes for the stated part of the time."""
    low, high = 0.0, 1.0
    layout = LAYOUTS[scenario.layout]

    def busy(rate: float) -> float:
        return simulated(layout, fit, list(arrivals(scenario, rate, 10 * seconds, seed)))[1]

    while busy(high) < scenario.busy:
        high *= 2
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if busy(middle) < scenario.busy else (low, middle)
    return (low + high) / 2


async def served(client: Client, asked: Sequence[Arrival], salt: int) -> list[Outcome]:
    """Each request when it is due."""
    prompts = [ids_of(a.spans, a.prompt, salt) for a in asked]
    start = time.monotonic() + 0.5

    async def send(arrival: Arrival, ids: list[int]) -> Outcome:
        await asyncio.sleep(start + arrival.at - time.monotonic())
        return await ask(client, ids, arrival.output)

    return list(await asyncio.gather(*(send(a, ids) for a, ids in zip(asked, prompts, strict=True))))


async def play(client: Client, scenario: Scenario, fit: Fitted, seconds: float, seed: int) -> dict[str, Any]:
    layout = LAYOUTS[scenario.layout]
    rate = rate_for(scenario, fit, seconds, seed)
    planned = list(arrivals(scenario, rate, seconds, seed))
    outcomes = await served(client, planned, seed)
    began = min(o.start for o in outcomes)
    # What the simulator is given is when requests were really sent.
    sent = [msgspec.structs.replace(a, at=o.start - began) for a, o in zip(planned, outcomes, strict=True)]
    sent.sort(key=lambda a: a.at)
    told, busy = simulated(layout, fit, sent)
    ttft = 1e3 * float(np.mean([o.ttft for o in outcomes]))
    tpot = 1e3 * float(np.mean([t for o in outcomes if (t := o.tpot) is not None]))
    predicted = {"ttft_ms": told.ttft_mean + 1e3 * fit.around, "tpot_ms": told.tpot_mean}
    measured = {"ttft_ms": ttft, "tpot_ms": tpot}
    errors = {name: round(predicted[name] / measured[name] - 1, 3) for name in measured}
    row = {
        "scenario": scenario.name,
        "layout": layout.name,
        "requests": len(planned),
        "rate": round(rate, 3),
        "utilisation": round(busy, 3),
        "prompt_tokens": round(float(np.mean([a.prompt for a in planned])), 1),
        "output_tokens": round(float(np.mean([a.output for a in planned])), 1),
        "cached": round(told.cached, 3),
        "measured": {name: round(value, 2) for name, value in measured.items()},
        "simulated": {name: round(value, 2) for name, value in predicted.items()},
        "error": errors,
    }
    say(
        f"{scenario.name} ({layout.name}, {rate:.2f} a second, busy {busy:.0%}): TTFT {ttft:.0f} ms, simulated"
        f" {predicted['ttft_ms']:.0f} ({errors['ttft_ms']:+.0%}); TPOT {tpot:.1f} ms, simulated"
        f" {predicted['tpot_ms']:.1f} ({errors['tpot_ms']:+.0%})"
    )
    return row


async def run_layout(url: str, layout: Layout, scenarios: Sequence[Scenario], seconds: float, seed: int) -> dict[str, Any]:
    async with Client(url) as client:
        fit = await measure_costs(client, layout, seed)
        say(f"{layout.name}: {fit.costs}, fitted to within {fit.error:.0%}; {1e3 * fit.around:.1f} ms outside of steps")
        rows = [await play(client, s, fit, seconds, seed + n) for n, s in enumerate(scenarios, 1)]
    about = {"costs": msgspec.to_builtins(fit.costs), "outside_of_steps_ms": round(1e3 * fit.around, 2)}
    return {"calibration": about | {"fit_error": round(fit.error, 3)}, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sim_validation")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of each scenario (default: 60)")
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS], metavar="L", help=", ".join(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"default: {OUT.name} in bench/results")
    args = parser.parse_args(argv)
    settings = ("--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", str(SEATS), "--block-size", str(BLOCK))
    # Layouts that this run leaves out keep what an earlier one found.
    found: dict[str, Any] = json.loads(args.out.read_bytes())["layouts"] if args.out.exists() else {}
    command = " ".join(["python -m bench.sim_validation", *(sys.argv[1:] if argv is None else argv)])
    for name in args.layouts:
        layout = LAYOUTS[name]
        scenarios = [s for s in SCENARIOS if s.layout == name]
        say(f"{layout.name}: starting a server")
        with serving(MODEL, *layout.flags, *settings) as server:
            found[name] = asyncio.run(run_layout(server.url, layout, scenarios, args.seconds, args.seed + 100))
        found[name] |= {"command": command, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    found = {name: found[name] for name in LAYOUTS if name in found}
    rows = [row for one_layout in found.values() for row in one_layout["rows"]]
    reached = all(abs(error) <= BAR for row in rows for error in row["error"].values())
    report = {
        "what": __doc__.splitlines()[0].partition(": ")[2],
        "machine": machine(),
        "model": MODEL,
        "bar": BAR,
        "reached": reached,
        "layouts": found,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['scenario']:36} busy {row['utilisation']:4.0%}  TTFT {row['measured']['ttft_ms']:7.1f} simulated"
            f" {row['simulated']['ttft_ms']:7.1f} ms  TPOT {row['measured']['tpot_ms']:6.2f} simulated"
            f" {row['simulated']['tpot_ms']:6.2f} ms"
        )
    print(f"{'reached' if reached else 'MISSED'}: every mean within {BAR:.0%}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
