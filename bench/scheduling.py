"""`python -m bench.scheduling`: what it costs to decide where a task runs, and how that grows with TEs and cached blocks.

The policy, the columns, the prompt tree and the heat map are the server's; the TEs and the conversations that they hold are
made up (bench/prompt_tree.py): every TE has the system prompts, so every prompt matches on every TE. A decision is `choose`, the
tree's match in it; the prompt's keys and its answer's predicted length are there before, since both are made once when it is
tokenised. After each decision it is booked, and some TEs' facts change as their messages would have it; now and then one is full
or takes tasks again. Times are of the processor, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from bench.prompt_tree import ASKED, World
from bench.queue import cpu_model
from engine.config import Role
from sched.costs import Costs
from sched.heatmap import HeatMap
from sched.policy import Ask, Expected, Order, choose
from sched.prompt_tree import PromptTree
from sched.view import View

RESULTS = Path(__file__).parent / "results" / "scheduling.json"
BAR_US = 100.0  # of a decision with 1000 TEs and a million blocks
BLOCK = 16
DECISIONS = 2000  # of each measurement
ORDERS: tuple[Order, ...] = ("paper", "cost")
# (role, lender) of TEs one after the other, again and again; -2: the TE before it.
FLEETS: dict[str, list[tuple[Role, int]]] = {
    "colocated": [("colocated", -1)],
    "colocated and pairs": [("colocated", -1), ("colocated", -1), ("prefill", -1), ("decode", -1)],
    "all types": [("colocated", -1), ("colocated", -1), ("prefill", -1), ("decode", -1), ("semi", -1), ("semi", -2)],
}
SIZES = ((10, 10**6), (100, 10**6), (1000, 10**4), (1000, 10**5), (1000, 10**6))  # TEs, blocks
# A model of some 30 B parameters on four NPUs. Decisions take as long whatever the numbers are.
COSTS = Costs(p0=3e-3, p1=1e-4, p2=1e-9, p3=2e-9, d0=2e-2, d1=2e-4, d2=1e-7, chunk=2048, peer0=5e-3, peer=1e-7)


def fleet(name: str, tes: int, rng: Random) -> View:
    """TEs with something to do, most of them with room."""
    view, roles = View(), FLEETS[name]
    for te in range(tes):
        role, lender = roles[te % len(roles)]
        view.add(te, role, te - 1 if lender == -2 else -1, kv_total=200_000.0, seats=256.0, **load(rng))
    return view


def load(rng: Random) -> dict[str, float]:
    sequences = rng.randrange(60)
    return {
        "sequences": float(sequences),
        "running": float(sequences * 3 // 4),
        "queued_tokens": float(rng.choice((0, 0, rng.randrange(6000)))),
        "kv_used": float(sequences * 1500),
        "takes": rng.random() < 0.98,
    }


def heat_map() -> HeatMap:
    """Of the paper's shape: pairs win where prompts are long and answers short."""
    heat = HeatMap()
    for cell in heat.cells():
        heat.add("disaggregated", cell.point, float(np.log(cell.prefill / cell.decode)) / 20, 0.001)
    heat.refit()
    return heat


def spent(what: Callable[[], object]) -> float:
    """Processor microseconds."""
    began = time.thread_time_ns()
    what()
    return (time.thread_time_ns() - began) / 1e3


def measure(world: World, tree: PromptTree, kind: str, order: Order, rng: Random) -> dict[str, float | str]:
    view, heat, tes = fleet(kind, world.tes, rng), heat_map(), world.tes
    decisions, matches, updates = [], [], []
    cached = 0
    for number in range(DECISIONS):
        keys, answer = world.prompt(), float(rng.randrange(20, 800))
        ask = Ask(
            prompt_tokens=ASKED * BLOCK + 1,
            answer=Expected(answer, answer / 2, answer * 2, 0.4),
            keys=keys,
            ttft_slo=1.0,
            tpot_slo=0.05,
        )
        other = world.prompt()  # the decision's own match is to find its keys as cold as any
        matches.append(spent(lambda keys=other: tree.match(keys)))  # type: ignore[misc]
        began = time.thread_time_ns()
        choice = choose(ask, view, tree, heat, COSTS, order)
        decisions.append((time.thread_time_ns() - began) / 1e3)
        assert choice is not None
        cached += choice.cached_tokens
        slot = view.slots[choice.decode]
        booking = {"sequences": view.sequences[slot] + 1.0, "last": float(number)}
        updates.append(spent(lambda choice=choice, booking=booking: view.update(choice.decode, **booking)))  # type: ignore[misc]
        for te in rng.sample(range(tes), min(tes, 4)):
            view.update(te, **load(rng))
    percentiles = statistics.quantiles(decisions, n=100)
    return {
        "fleet": kind,
        "order": order,
        "tes": tes,
        "blocks": tree.size,
        "decision_mean_us": round(statistics.fmean(decisions), 1),
        "decision_p50_us": round(percentiles[49], 1),
        "decision_p99_us": round(percentiles[98], 1),
        "match_p50_us": round(statistics.median(matches), 1),
        "update_p50_us": round(statistics.median(updates), 2),
        "cached_tokens": round(cached / DECISIONS, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduling", description="Deciding where a task runs")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up TEs and conversations (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()

    rows = []
    print("microseconds; of a decision the median, the mean and the 99th percentile; of a match and an update the median")
    print(f"{'TEs':>5} {'blocks':>10} {'fleet':>20} {'order':>6} {'median':>7} {'mean':>7} {'p99':>7} {'match':>6} {'update':>7}")
    for tes, blocks in SIZES:
        world, tree = World(Random(options.seed), tes, blocks, 3), PromptTree(BLOCK)
        world.fill(tree)
        for kind in FLEETS:
            for order in ORDERS:
                row = measure(world, tree, kind, order, Random(options.seed))
                rows.append(row)
                print(
                    f"{tes:>5} {row['blocks']:>10,} {kind:>20} {order:>6} {row['decision_p50_us']:>7}"
                    f" {row['decision_mean_us']:>7} {row['decision_p99_us']:>7} {row['match_p50_us']:>6}"
                    f" {row['update_p50_us']:>7}"
                )
    worst = max(float(row["decision_p50_us"]) for row in rows)
    print(f"the slowest median is {worst}; wanted: under {BAR_US:.0f}")
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", "bench.scheduling", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "what": "processor time of a decision with the tree's match; the prompt's keys and predicted answer are there before",
        "prompt_blocks": ASKED,
        "decisions": DECISIONS,
        "wanted_us": BAR_US,
        "slowest_median_us": worst,
        "results": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if worst < BAR_US else 1


if __name__ == "__main__":
    sys.exit(main())
