"""`python -m bench.placing`: Algorithm 1 on the real server, beside round robin and the least loaded TE.

Two colocated TEs and a 1p1d pair of one model are up. Conversations begin by chance (Poisson): each has one of a few system
prompts, and each turn's prompt is all that was said before, the model's own answers included, and some new tokens. That trace is
played at parts of a measured capacity: the turns a second that the server ends under `least_loaded` with CROWD conversations at
once that make no pauses.

In each round the policies take turns in the same server with the same trace, each time with other random tokens in it, so that
nobody finds in a cache what another one's run left there. Before a run each system prompt is asked for once, and that isn't
counted. What steps cost is learnt from all runs; the heat map begins each run as the stored profile has it, or empty. Of a
round's means the difference is taken, against each of the two usual policies, and "better" and "worse" are beyond the 95 %
confidence interval of its mean over rounds (Student's t). Client, server and TEs share this machine's cores.

The result goes into `bench/results/placing.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from bench.cpu import machine
from bench.cpu_report import tidy
from bench.profile import arrival_times
from bench.scale_figures import percentile
from bench.simulate import interval
from engine.types import SamplingParams
from sched.baselines import RoundRobin, least_loaded
from sched.heatmap import HeatMap, Traffic
from sched.placing import Placing
from sched.policy import Choice
from sched.service import AsyncLLM
from sched.stream import Submission
from tests import tiny
from tests.assets import DEFAULT_MODEL, default_model

OUT = Path(__file__).parent / "results" / "placing.json"
MODELS = ("tiny", DEFAULT_MODEL)
MIX = "2c+1p1d"
SETTINGS: dict[str, Any] = {"pd": MIX, "max_num_seqs": 32, "max_num_batched_tokens": 256, "max_model_len": 2048, "seed": 0}

Policy = Literal["round_robin", "least_loaded", "paper", "cost"]
POLICIES: tuple[Policy, ...] = ("round_robin", "least_loaded", "paper", "cost")
USUAL: tuple[Policy, ...] = ("round_robin", "least_loaded")
COMPARED = ("ttft_mean_ms", "jct_mean_ms")

# A conversation, in tokens. Its system prompt is one of SYSTEMS; a turn brings between SHORTEST and LONGEST new ones.
SYSTEMS, SYSTEM = 2, 400
SHORTEST, LONGEST = 16, 96
ANSWER = 24
TURNS = 4
# From an answer to the next turn, in the mean: as long as the server at its capacity takes for so many turns.
PAUSE = 2.0
CROWD = 12  # conversations at once that the capacity is measured with
CAPACITY_SECONDS = 4.0  # for so long at least
FEWEST, MOST = 4, 96  # conversations of a run


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- the trace ------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    new: int  # tokens that it adds to what was said before
    pause: float  # seconds after the answer before it; of the first turn 0


class Conversation(NamedTuple):
    at: float  # seconds from the start
    system: int  # which of SYSTEMS it begins with
    turns: tuple[Turn, ...]


class Said(NamedTuple):
    """The tokens of one run."""

    systems: list[list[int]]
    new: list[list[list[int]]]  # of each conversation and turn


def conversations(count: int, rate: float, pause: float, seed: Sequence[int]) -> list[Conversation]:
    """So many, of which together `rate` turns a second begin while none has to wait. `pause`: seconds, in the mean."""
    rng = np.random.default_rng(seed)
    begins = arrival_times(count, rate / TURNS, rng)
    return [
        Conversation(
            at,
            int(rng.integers(SYSTEMS)),
            tuple(
                Turn(int(rng.integers(SHORTEST, LONGEST + 1)), float(rng.exponential(pause)) if n else 0.0) for n in range(TURNS)
            ),
        )
        for at in begins
    ]


def tokens_of(trace: Sequence[Conversation], vocab: int, seed: Sequence[int]) -> Said:
    """Random ones, away from the ends of the vocabulary, where special tokens are: no two runs' prompts begin alike."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> list[int]:
        ids: list[int] = rng.integers(vocab // 4, vocab // 2, count).tolist()
        return ids

    return Said([some(SYSTEM) for _ in range(SYSTEMS)], [[some(turn.new) for turn in one.turns] for one in trace])


# ---- a run ----------------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A turn as its caller saw it, and where it ran."""

    prompt: int  # tokens
    cached: int  # ... of them, found in a cache
    ttft: float  # seconds
    jct: float
    choice: Choice


class Asker:
    """Sends turns to an engine of one model."""

    def __init__(self, engine: AsyncLLM):
        je = engine.deployments[0].je
        assert je is not None
        self.engine, self.je, self.names = engine, je, itertools.count()

    async def ask(self, ids: list[int]) -> tuple[Done, list[int]]:
        """One turn, and the answer's tokens."""
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ANSWER)
        submission = Submission(
            id=f"turn-{next(self.names)}", model="", prompts=[array("i", ids)], params=params, kind="embedded"
        )
        answer: list[int] = []
        began, first = time.monotonic(), 0.0
        async with self.engine.submit(submission) as stream:
            [task] = [entry for entry in self.je.live.values() if entry.request.stream is stream]
            async for deltas in stream:
                first = first or time.monotonic()
                answer += itertools.chain.from_iterable(delta.ids for delta in deltas)
        ended = time.monotonic()
        if len(answer) != ANSWER or task.choice is None:
            raise RuntimeError(f"{ANSWER} tokens were asked for and {len(answer)} came")
        return Done(len(ids), task.task.cached_tokens, first - began, ended - began, task.choice), answer

    async def converse(self, begin: float, one: Conversation, system: list[int], new: list[list[int]]) -> list[Done]:
        await asyncio.sleep(begin + one.at - time.monotonic())
        done, text = [], list(system)
        for turn, words in zip(one.turns, new, strict=True):
            await asyncio.sleep(turn.pause)
            text += words
            each, answer = await self.ask(text)
            text += answer
            done.append(each)
        return done

    async def play(self, trace: Sequence[Conversation], said: Said) -> tuple[list[Done], float]:
        """All turns of a trace, and the seconds that they took together. The system prompts are asked for before that."""
        for system in said.systems:
            await self.ask(system)
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.converse(begin, one, said.systems[one.system], new))
                for one, new in zip(trace, said.new, strict=True)
            ]
        return [each for task in tasks for each in task.result()], time.monotonic() - begin


def place_by(placing: Placing, policy: Policy) -> None:
    """From the next task on."""
    if policy == "round_robin":
        placing.pick = RoundRobin()
    elif policy == "least_loaded":
        placing.pick = least_loaded
    else:
        placing.config = msgspec.structs.replace(placing.config, sched=policy)
        placing.pick = placing.choose_by_policy


def begin_with(placing: Placing, heat: bytes) -> None:
    """The heat map of a snapshot, without what was learnt since."""
    placing.knowledge.heat = HeatMap.drawn(heat)
    placing.traffic = Traffic(placing.knowledge.heat)


# ---- figures --------------------------------------------------------------------------------------------------------


def figures(done: Sequence[Done]) -> dict[str, float]:
    """Of the turns of one run, or of several."""
    ttft, jct = [1e3 * each.ttft for each in done], [1e3 * each.jct for each in done]
    return {
        "turns": len(done),
        "ttft_mean_ms": float(np.mean(ttft)),
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p99_ms": percentile(ttft, 99),
        "jct_mean_ms": float(np.mean(jct)),
        "jct_p99_ms": percentile(jct, 99),
        "cached": sum(each.cached for each in done) / sum(each.prompt for each in done),
    }


def choices(done: Sequence[Done]) -> dict[str, Any]:
    """Where turns went, and how true it was what the policy expected there. The usual policies expect nothing."""
    kinds, places = Counter[str](), Counter[str]()
    for each in done:
        choice = each.choice
        kinds[choice.kind] += 1
        places[f"TE {choice.prefill}" if choice.prefill == choice.decode else f"TE {choice.prefill} > {choice.decode}"] += 1
    found: dict[str, Any] = {
        "kinds": {kind: count / len(done) for kind, count in sorted(kinds.items())},
        "places": dict(sorted(places.items())),
    }
    if told := [each for each in done if each.choice.predicted_ttft_ms]:
        found["expected"] = {
            "ttft_mean_ms": float(np.mean([each.choice.predicted_ttft_ms for each in told])),
            "cached": sum(each.choice.cached_tokens for each in told) / sum(each.prompt for each in told),
        }
    return found


def versus(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How a figure differs, round by round, where less of it is better, and what that means."""
    mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    verdict = "better" if mean < -half else "worse" if mean > half else "equal"
    return {
        "difference": mean,
        "ci": half if np.isfinite(half) else None,
        "percent": 100 * mean / float(np.mean(theirs)),
        "verdict": verdict,
    }


def summary(rounds: dict[Policy, list[list[Done]]]) -> dict[str, Any]:
    """Of all rounds at one load, by policy."""
    means = {policy: [figures(done) for done in runs] for policy, runs in rounds.items()}
    found: dict[str, Any] = {}
    for policy, runs in rounds.items():
        every = [each for done in runs for each in done]
        found[policy] = (
            figures(every) | choices(every) | {"rounds": [{name: one[name] for name in COMPARED} for one in means[policy]]}
        )
        for other in USUAL:
            if policy not in USUAL:
                found[policy][f"against_{other}"] = {
                    name: versus([one[name] for one in means[policy]], [one[name] for one in means[other]]) for name in COMPARED
                }
    return found


# ---- a model --------------------------------------------------------------------------------------------------------


async def capacity(asker: Asker, vocab: int, seed: int) -> float:
    """Turns a second, with CROWD conversations at once that make no pauses."""
    turns, spent = 0, 0.0  # seeds: 0 stands where runs have their round's number
    for number in itertools.count():
        trace = [one._replace(at=0.0) for one in conversations(CROWD, 1.0, 0.0, (seed, 0, number))]
        done, seconds = await asker.play(trace, tokens_of(trace, vocab, (seed, 0, number)))
        if number:  # the first ones warm up
            turns, spent = turns + len(done), spent + seconds
        if spent >= CAPACITY_SECONDS:
            break
    return turns / spent


async def measure(name: str, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    async with AsyncLLM(path, **SETTINGS) as engine:
        asker = Asker(engine)
        placing = asker.je.placing
        vocab, found = (await engine.model("")).tokenizer.vocab_size, placing.knowledge.found
        place_by(placing, "least_loaded")
        heat = placing.knowledge.heat.snapshot()
        most = await capacity(asker, vocab, args.seed)
        say(f"{name}: {most:.1f} turns a second; {'a heat map was found' if found else 'no heat map'}")
        done: dict[float, dict[Policy, list[list[Done]]]] = {load: {policy: [] for policy in POLICIES} for load in args.loads}
        for number, (at, load) in itertools.product(range(1, args.rounds + 1), enumerate(args.loads)):
            rate = load * most
            count = min(MOST, max(FEWEST, round(args.seconds * rate / TURNS)))
            trace = conversations(count, rate, PAUSE / most, (args.seed, number, at))
            first = (number + at) % len(POLICIES)
            for policy in POLICIES[first:] + POLICIES[:first]:
                begin_with(placing, heat)
                place_by(placing, policy)
                said = tokens_of(trace, vocab, (args.seed, number, at, POLICIES.index(policy)))
                turns, seconds = await asker.play(trace, said)
                done[load][policy].append(turns)
                say(
                    f"{name}, round {number}, load {load:g}, {policy}: {len(turns)} turns in {seconds:.1f} s,"
                    f" TTFT {1e3 * np.mean([t.ttft for t in turns]):.0f} ms, JCT {1e3 * np.mean([t.jct for t in turns]):.0f} ms"
                )
        assert placing.learner is not None
        costs = msgspec.to_builtins(placing.learner.costs)
        placing.knowledge.found = None  # what a bench's requests have taught the map isn't left to servers
    rows = [{"load": load, "turns_s": load * most, "policies": summary(rounds)} for load, rounds in done.items()]
    profile = {"model": found.profile.model, "cells": found.profile.cells, "foreign": found.foreign} if found else None
    return {"model": name, "turns_s": most, "profile": profile, "costs": costs, "rows": rows}


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['model']}: {row['turns_s']:.1f} turns a second at most; {'with' if row['profile'] else 'without'} a heat map")
    print("  load policy       TTFT P50    P99   mean  JCT mean   P99  cached  pairs   (ms)")
    for one in row["rows"]:
        for policy, told in one["policies"].items():
            ttft = "".join(f"{told[f'ttft_{name}_ms']:7.0f}" for name in ("p50", "p99", "mean"))
            jct = "".join(f"{told[f'jct_{name}_ms']:7.0f}" for name in ("mean", "p99"))
            print(f"  {one['load']:4.0%} {policy:12} {ttft}  {jct}  {told['cached']:6.0%}  {told['kinds'].get('pair', 0):5.0%}")
        for policy, other, figure in itertools.product(one["policies"], USUAL, COMPARED):
            if (against := one["policies"][policy].get(f"against_{other}")) is not None:
                its = against[figure]
                half = f" ± {its['ci']:.0f}" if its["ci"] is not None else ""
                print(
                    f"       {policy} against {other}: {figure.partition('_')[0].upper()} {its['difference']:+.0f}{half} ms"
                    f" ({its['percent']:+.0f} %): {its['verdict']}"
                )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.placing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="M", help=", ".join(MODELS))
    parser.add_argument("--loads", nargs="+", type=float, default=[0.5, 1.0], metavar="L", help="parts of what the server can do")
    parser.add_argument("--rounds", type=int, default=4, help="(default: 4)")
    parser.add_argument(
        "--seconds", type=float, default=6.0, metavar="S", help="in which a run's conversations begin (default: 6)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"default: {OUT.name} in bench/results")
    args = parser.parse_args(argv)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        small = tiny.make(Path(folder) / "tiny", max_position_embeddings=SETTINGS["max_model_len"])
        rows = [asyncio.run(measure(name, small if name == "tiny" else default_model(), args)) for name in args.models]
    report = {
        "what": __doc__.splitlines()[0].partition(": ")[2],
        "machine": machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python -m bench.placing", *(sys.argv[1:] if argv is None else argv)]),
        "load_average": busy,  # before it; about 0 where nothing else runs
        "settings": SETTINGS,
        "conversation": {"systems": SYSTEMS, "system": SYSTEM, "new": [SHORTEST, LONGEST], "answer": ANSWER, "turns": TURNS},
        "rounds": args.rounds,
        "seconds": args.seconds,
        "models": rows,
    }
    args.out.write_text(json.dumps(tidy(report), indent=1) + "\n")
    for row in rows:
        show(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
