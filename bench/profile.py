"""`deepserve.py profile`: what this machine does with a model, for the scheduler: the heat map and the costs of a step.

The same machine is split in three ways: two colocated TEs, a prefill and a decode TE, and a semi pair. All three are up at once
and used in turn, so that a change of the machine's speed meets all of them; a TE with nothing to do takes no time. First come
the costs: prompts and decodes of some sizes at the colocated TEs, and what a hand over adds. Then, for as long as the budget
lasts, cells of the map: a batch of requests of equal lengths, with prompts that begin unlike, at one rate, in each of the three
ways. What is measured next is what tells most about doubtful cells in a second (`sched.heatmap.next_cell`).

A rate is a part of what the machine can do of such requests, as the costs have it. After each cell the profile is written, so an
interrupted run is of use, and the next run goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from math import ceil, inf, log
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench import profile_picture
from bench.cpu_report import rendered, tidy
from engine import capacity, devices, models
from engine.config import Config
from engine.rtc import tiers
from engine.rtc.cost import Tier
from engine.types import SamplingParams, UserError
from engine.weights import open_checkpoint
from sched import profile_store
from sched.costs import Costs, Step, fitted
from sched.files import write
from sched.heatmap import SPLIT, STREAMS, Cell, HeatMap, Kind, MapData, alone, next_cell, work
from sched.profile_store import Profile, TeCosts
from sched.service import AsyncLLM

Say = Callable[[str], None]

TES = 2  # of each way
WAYS: dict[Kind, dict[str, Any]] = {
    "colocated": {"te": TES, "pd": ""},
    "disaggregated": {"te": TES, "pd": "1p1d"},
    "semi": {"te": TES, "pd": "semi"},
}
# Settings that are about how many TEs there are: the ways say that.
NOT_MEASURED = ("te", "pd", "min_te", "max_te", "keep_alive", "slo_ttft_ms", "slo_tpot_ms")

# A batch has so many requests: the fewest that meet each other, and up to the most while all of them are SECONDS of work.
FEWEST, MOST, SECONDS = 8, 24, 1.2
# What the costs are fitted to: prompts of so many full steps, and decodes of (streams a TE, prompt tokens).
PROMPTS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
DECODES = ((1, 64), (4, 64), (16, 64), (1, 1024), (4, 1024))
DECODE_TOKENS = 128  # enough for the first stream not to end before the last one begins
REPEATS = 2
HANDED_OVER = (512, 1024)  # prompt tokens


class Timed(NamedTuple):
    """A request as its caller saw it. CLOCK_MONOTONIC seconds."""

    start: float
    times: list[float]  # of each token

    @property
    def jct(self) -> float:
        return self.times[-1] - self.start

    @property
    def ttft(self) -> float:
        return self.times[0] - self.start

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.times)]


# ---- requests -----------------------------------------------------------------------------------------------------------


async def ask(engine: AsyncLLM, ids: Sequence[int], tokens: int) -> Timed:
    """One request of exactly so many output tokens."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens)
    start, times = time.monotonic(), list[float]()
    async for output in engine.generate(ids, params):
        times += [time.monotonic()] * (len(output.outputs[0].token_ids) - len(times))
    if len(times) != tokens:
        raise RuntimeError(f"{tokens} tokens were asked for and {len(times)} came")
    return Timed(start, times)


async def batch(engine: AsyncLLM, prompts: Sequence[Sequence[int]], tokens: int, arrivals: Sequence[float]) -> list[Timed]:
    """A request for each prompt, sent `arrivals` seconds from now."""
    began = time.monotonic()

    async def one(ids: Sequence[int], at: float) -> Timed:
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        return await ask(engine, ids, tokens)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(ids, at)) for ids, at in zip(prompts, arrivals, strict=True)]
    return [task.result() for task in tasks]


def arrival_times(count: int, rate: float, rng: np.random.Generator) -> list[float]:
    """Of a Poisson process whose gaps have their expected sizes, shuffled: batches differ by the gaps' order alone."""
    gaps = -np.log(1 - (np.arange(count) + 0.5) / count) / rate
    rng.shuffle(gaps)
    return list(map(float, np.cumsum(gaps) - gaps[0]))


class Prompts:
    """Prompts of random tokens: no two begin alike, so nothing is found in a cache."""

    def __init__(self, vocab: int, seed: int):
        self.vocab, self.rng = vocab, np.random.default_rng(seed)

    def some(self, count: int, tokens: int) -> list[list[int]]:
        # Away from the ends of the vocabulary, where special tokens are.
        ids: list[list[int]] = self.rng.integers(self.vocab // 4, self.vocab // 2, (count, tokens)).tolist()
        return ids


# ---- the three ways -----------------------------------------------------------------------------------------------------


class Ways:
    """An engine for each way. On a device with memory of its own only the one that is used is up, since each would take all."""

    def __init__(self, config: Config):
        own_memory = devices.kind(devices.choose(config.device)[0]).own_memory
        self.alone = own_memory
        kinds = [kind for kind in WAYS if not (own_memory and kind == "semi")]  # semi pairs are on cpu so far
        self.plain = msgspec.structs.replace(config, **{name: None for name in NOT_MEASURED if name not in ("te", "pd")})
        self.engines = {kind: AsyncLLM(config=msgspec.structs.replace(self.plain, **WAYS[kind])) for kind in kinds}

    @contextlib.asynccontextmanager
    async def started(self, say: Say) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for kind, engine in self.engines.items():
                say(f"starting {kind} TEs")
                await stack.enter_async_context(engine)
                if self.alone:
                    await engine.sleep("", 1)
            yield

    @contextlib.asynccontextmanager
    async def use(self, kind: Kind) -> AsyncIterator[AsyncLLM]:
        engine = self.engines[kind]
        if self.alone:
            await engine.wake("")
        yield engine
        if self.alone:
            await engine.sleep("", 1)

    @property
    def split(self) -> list[Kind]:
        return [kind for kind in SPLIT if kind in self.engines]

    def box(self) -> capacity.Machine:
        box = self.engines["colocated"].box
        assert box is not None
        return box

    def cores(self, tes: int) -> int:
        """Of each TE, where there are so many; 0 where each has a device of its own."""
        return 0 if self.alone else capacity.threads_for(self.box().cores, tes)


# ---- costs --------------------------------------------------------------------------------------------------------------


async def sample(engine: AsyncLLM, tes: int, prompts: Prompts) -> list[Step]:
    """Steps of colocated TEs, all of which do the same at once."""
    config = engine.config
    assert config.max_num_batched_tokens and config.max_model_len
    chunk, longest = config.max_num_batched_tokens, config.max_model_len
    await batch(engine, prompts.some(tes, min(256, longest // 2)), 8, [0.0] * tes)  # warms up
    found, before = list[Step](), (0, 0.0)
    for tokens in (max(1, int(chunk * times)) for times in PROMPTS):
        if tokens >= longest:
            break
        many = [await batch(engine, prompts.some(tes, tokens), 1, [0.0] * tes) for _ in range(REPEATS)]
        seconds = float(np.mean([one.ttft for done in many for one in done]))
        if tokens <= chunk:
            found.append(Step(tokens, 0.0, 0.0, 0.0, seconds))
        else:  # of each step that the shorter prompt had not
            steps = (tokens - before[0]) / chunk
            found.append(Step(chunk, (before[0] + tokens - chunk) / 2, 0.0, 0.0, (seconds - before[1]) / steps))
        before = tokens, seconds
    for streams, tokens in DECODES:
        if tokens + DECODE_TOKENS >= longest or streams > config.max_num_seqs:
            continue
        done = await batch(engine, prompts.some(streams * tes, tokens), DECODE_TOKENS, [0.0] * streams * tes)
        begin, end = max(one.times[0] for one in done), min(one.times[-1] for one in done)
        gaps = [b - a for one in done for a, b in pairwise(one.times) if a >= begin and b <= end]
        if sum(gaps) > 0:  # the mean: of two tokens that are heard of at once, one gap is 0
            found.append(Step(0.0, 0.0, streams, streams * (tokens + DECODE_TOKENS / 2), float(np.mean(gaps))))
    return found


async def sample_transfer(engine: AsyncLLM, prompts: Prompts) -> list[tuple[int, float]]:
    """(prompt tokens, seconds that a hand over adds to the time until the second token)."""
    assert engine.config.max_model_len
    found = []
    for tokens in (n for n in HANDED_OVER if n + 16 <= engine.config.max_model_len):
        for _ in range(REPEATS):
            gaps = (await ask(engine, prompts.some(1, tokens)[0], 16)).gaps
            found.append((tokens, max(0.0, gaps[0] - float(np.median(gaps[1:])))))
    return found


async def measure_costs(ways: Ways, prompts: Prompts, say: Say) -> list[TeCosts]:
    """Of a TE that has the whole machine, and of one of several."""
    start = start_of(ways.engines["colocated"])
    say("costs of hand overs")
    async with ways.use("disaggregated") as engine:
        transfers = await sample_transfer(engine, prompts)
    say(f"costs of prompts and decodes, {TES} TEs")
    async with ways.use("colocated") as engine:
        found = [TeCosts(ways.cores(TES), costs_of(await sample(engine, TES, prompts), transfers, start))]
    if ways.cores(1) != ways.cores(TES):
        say("costs of prompts and decodes, 1 TE")
        async with AsyncLLM(config=msgspec.structs.replace(ways.plain, te=1, pd="")) as engine:
            found.append(TeCosts(ways.cores(1), costs_of(await sample(engine, 1, prompts), transfers, start)))
    return found


def start_of(engine: AsyncLLM) -> Costs:
    """What the engine's settings and this machine's memory tell of its costs; steps are still to be measured."""
    config, deployment = engine.config, engine.deployments[0]
    assert config.max_num_batched_tokens and deployment.box is not None
    seconds: dict[Tier, float] = {}
    if not devices.tiers_need(config.device, config.dtype, deployment.box.compiled):
        model = models.build(open_checkpoint(Path(deployment.plan.path)).config)
        nbytes = capacity.kv_bytes_per_token(model, config.dtype, config.kv_cache_dtype)
        access = tiers.Access(socket=-1, model=b"", pool=0, slots=0, slot_bytes=nbytes, folder=config.kv_ssd_dir)
        rates = tiers.measured(access, 1, 0.0).bandwidth
        seconds = {tier: nbytes / rate for tier, rate in rates.items()}
    return Costs(p1=0.0, d0=0.0, chunk=config.max_num_batched_tokens, **seconds)


def costs_of(steps: Sequence[Step], transfers: Sequence[tuple[int, float]], start: Costs) -> Costs:
    """`start` with what was measured."""
    prefill = max((s for s in steps if s.prompt), key=lambda s: s.prompt)
    decode = min((s.seconds for s in steps if not s.prompt), default=prefill.seconds / prefill.prompt)
    guess = msgspec.structs.replace(start, p1=prefill.seconds / prefill.prompt, d0=decode)
    peer0, peer = line(transfers)
    return msgspec.structs.replace(fitted(guess, steps), peer0=peer0, peer=peer)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(at 0, slope) of a line through points, neither less than 0."""
    if not points:
        return 0.0, 0.0
    x, y = np.asarray(points, np.float64).T
    slope = max(0.0, float(np.polyfit(x, y, 1)[0])) if len(set(x)) > 1 else 0.0
    return max(0.0, float(np.mean(y - slope * x))), slope


# ---- the map ------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a cell is measured."""

    requests: int
    rate: float  # a second
    seconds: float  # that it takes, in all ways together


def plan(cell: Cell, costs: Costs, longest: int, ways: int) -> Plan | None:
    """None where the requests are longer than the model's texts may be."""
    prefill, decode = cell.prefill, cell.decode
    if prefill + decode > longest:
        return None
    seconds = work(costs, prefill, decode) / TES
    requests = min(MOST, max(FEWEST, ceil(SECONDS / seconds)))
    return Plan(requests, cell.load / seconds, ways * (requests * seconds / cell.load + alone(costs, prefill, decode)))


def compared(whole: Sequence[Timed], split: Sequence[Timed]) -> tuple[float, float]:
    """(log of the ratio of mean JCTs, its variance) of batches with the same arrivals."""
    ratio = log(sum(one.jct for one in whole) / sum(one.jct for one in split))
    pairs = np.log([a.jct / b.jct for a, b in zip(whole, split, strict=True)])
    return ratio, float(pairs.var(ddof=1)) / len(pairs)


async def measure(ways: Ways, cell: Cell, how: Plan, prompts: Prompts, turn: int) -> dict[Kind, tuple[float, float]]:
    """One cell in all ways, with the same prompts and arrivals; whose turn is first changes from cell to cell."""
    asked = prompts.some(how.requests, cell.prefill)
    arrivals = arrival_times(how.requests, how.rate, prompts.rng)
    kinds = list(ways.engines)
    done: dict[Kind, list[Timed]] = {}
    warm = prompts.some(TES, cell.prefill) if ways.alone else []  # what a TE that just came up does once is no cell's
    for kind in (*kinds[turn % len(kinds) :], *kinds[: turn % len(kinds)]):
        async with ways.use(kind) as engine:
            await batch(engine, warm, 8, [0.0] * len(warm))
            done[kind] = await batch(engine, asked, cell.decode, arrivals)
    return {kind: compared(done["colocated"], done[kind]) for kind in ways.split}


# ---- the whole run ------------------------------------------------------------------------------------------------------


async def run(config: Config, budget: float, rates: Sequence[float], say: Say) -> tuple[Profile, Path]:
    """Measure for `budget` seconds, add that to the stored profile, and store it. Raises `UserError`."""
    began = time.monotonic()
    ways = Ways(config)
    async with ways.started(say):
        whole = ways.engines["colocated"]
        resolved, box, path = whole.config, ways.box(), whole.deployments[0].plan.path
        key = profile_store.key_of(Path(path), resolved, box)
        file = profile_store.path_of(key)
        profile = begun(key, whole.names[0], profile_store.read(file), rates, ways.split, say)
        heat = HeatMap(profile.heat)
        vocabulary = (await whole.model("")).tokenizer.vocab_size
        prompts = Prompts(vocabulary, seed=profile.cells)

        if not profile.costs:
            profile.costs = await measure_costs(ways, prompts, say)
        costs = profile.costs_for(ways.cores(TES))
        say(said(costs))
        assert resolved.max_model_len
        spent, slower = profile.seconds, 1.0
        while True:
            plans = [plan(cell, costs, resolved.max_model_len, len(ways.engines)) for cell in heat.cells()]
            left = began + budget - time.monotonic()
            cell = next_cell(heat, [inf if p is None else p.seconds * slower for p in plans], left)
            if cell is None:
                break
            how = plans[cell.point]
            assert how is not None
            at = time.monotonic()
            found = await measure(ways, cell, how, prompts, profile.cells)
            # What batches really take, beside what the costs say: the next choice goes by it.
            slower += ((time.monotonic() - at) / how.seconds - slower) / 4
            for kind, (ratio, variance) in found.items():
                heat.add(kind, cell.point, ratio, variance)
            heat.refit()
            profile.cells += 1
            profile.made, profile.seconds = time.time(), spent + time.monotonic() - began
            profile_store.save(profile, file)
            values = ", ".join(f"{kind} {100 * (np.exp(ratio) - 1):+.0f} %" for kind, (ratio, _) in found.items())
            say(f"{time.monotonic() - began:4.0f} s: {cell.prefill} in, {cell.decode} out, load {cell.load:g}: {values}")
        profile.made, profile.seconds = time.time(), spent + time.monotonic() - began
        profile_store.save(profile, file)
        if not profile.cells:
            say(f"no cell of the map was measured: --budget {budget:g} left no time for one; use --budget 600")
    return profile, file


def begun(
    key: profile_store.Key, model: str, stored: Profile | None, rates: Sequence[float], split: list[Kind], say: Say
) -> Profile:
    """The stored profile, to go on with, or an empty one."""
    heat = MapData(loads=tuple(sorted(rates)), kinds=tuple(split))
    if stored is None or stored.key != key:
        return Profile(key, model, [], heat)
    if (stored.heat.loads, stored.heat.kinds) != (heat.loads, heat.kinds):
        say(f"the stored map is of other rates ({' '.join(f'{r:g}' for r in stored.heat.loads)}): a new one is begun")
        return Profile(key, model, stored.costs, heat)
    say(f"going on from the stored profile: {stored.cells} cells in {stored.seconds:.0f} s")
    return stored


def said(costs: Costs) -> str:
    prompt, step = 512 / costs.prefill(512.0), costs.step(0, 0, STREAMS, STREAMS * 512) * 1e3
    hand = costs.transfer(512) * 1e3
    return (
        f"each of {TES} TEs: {prompt:.0f} prompt tokens a second, a step of {STREAMS} decodes {step:.1f} ms;"
        f" a hand over of 512 tokens adds {hand:.1f} ms"
    )


def report(profile: Profile, budget: float, busy: float) -> dict[str, Any]:
    """The profile as a file for people: with the maps drawn up."""
    heat = HeatMap(profile.heat)
    maps = {
        kind: {
            "value": rows(heat, [v.value for v in heat.tables[kind]]),
            "confidence": rows(heat, [v.confidence for v in heat.tables[kind]]),
            "at_load": {f"{load:g}": rows(heat, heat.at_load(kind, i)) for i, load in enumerate(profile.heat.loads)},
            "same_sign_at_all_loads": heat.same_sign(kind),
        }
        for kind in profile.heat.kinds
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python deepserve.py profile {profile.model} --budget {budget:g}",
        "hardware": profile.key.hardware,
        "load_average": busy,  # before it; about 0 where nothing else runs
        "maps": maps,
        "profile": msgspec.to_builtins(profile),
    }


def rows(heat: HeatMap, cells: Sequence[float]) -> list[list[float]]:
    """Of shape [rows, columns], rounded as far as anybody reads it."""
    return [[round(v, 3) for v in cells[i : i + heat.columns]] for i in range(0, len(cells), heat.columns)]


def main(config: Config, budget: float, rates: Sequence[float], out: Path | None, png: Path | None, say: Say) -> int:
    """Measure, store and show. Raises `UserError`."""
    if not all(0 < rate < 1 for rate in rates) or len(set(rates)) != len(rates):
        raise UserError(
            f"--rates {' '.join(f'{r:g}' for r in rates)}: write parts of 1, each once, for example 0.3 0.6 0.9", "rates"
        )
    if budget <= 0:
        raise UserError(f"--budget {budget:g}: write the seconds to measure for, for example 600", "budget")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        say(f"the machine is busy with other work (load average {busy:.1f}), and the map will show that too")
    profile, file = asyncio.run(run(config, budget, rates, say))
    heat = HeatMap(profile.heat)
    for kind in profile.heat.kinds:
        print(*profile_picture.terminal(heat, kind), "", sep="\n")
    say(f"{profile.cells} cells in {profile.seconds:.0f} s are in {file}, where serve finds them")
    if out is not None:
        write(out, (rendered(tidy(report(profile, budget, busy))) + "\n").encode())
    if png is not None:
        write(png, profile_picture.draw(heat, f"{profile.model}, {profile.key.hardware}"))
    return 0
