"""`python -m bench.simulation`: Algorithm 1 beside the usual policies on clusters that this machine isn't: 34B at TP4 on 910B.

    map     the paper's heat map, as it comes out on the stated figures
    paper   the paper's experiment: 2 colocated TEs and one 1P1D, code completion of about 2K in and 200 out, against round robin
    scale   64 and 1000 TEs: conversations, code completion, bursts; at the load where the best of the other policies still
            keeps both promises for 90 % of requests, below it and above
    million 1000 TEs and a million requests: how long that takes us

Policies get the same requests, and what is compared is the difference for each seed: "better" and "worse" are beyond the 95 %
confidence interval of its mean (Student's t). The result goes into `bench/results/simulation.json`, each part as soon as it is
there; parts that this run leaves out keep what an earlier one found. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.cpu import machine
from bench.simulate import Found, Load, Run, compare, interval, simulate_all, summary
from sched.heatmap import HeatMap
from sched.simulate import POLICIES, Cluster, Figures, Policy, Slo, heat_map, roles_of
from sched.stated_costs import DEVICES, MODELS, stated

OUT = Path(__file__).parent / "results" / "simulation.json"
COSTS = "34b-910b"
MIX = "2c+1p1d"
# Seconds to the first token and a token after it: ten times a 2K prompt alone, and the paper's 50 ms.
SLO = Slo(2.0, 0.05)
GOOD = 0.9
# What "better" means of a figure: whether more of it is.
COMPARED = {"good": True, "jct_mean": False, "ttft_mean": False, "tpot_mean": False}
# The bars are on these. (TTFT alone, or TPOT alone, can always be had at the other's expense.)
BARRED = ("good", "jct_mean")


class Sizes(NamedTuple):
    """How much is simulated."""

    paper_rates: Sequence[float] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    paper_requests: int = 2500
    paper_seeds: int = 6
    tes: Sequence[tuple[int, float, int, Sequence[float]]] = (  # TEs, seconds, seeds, loads beside the one where GOOD ends
        (64, 36.0, 8, (1.0,)),  # where one hot prefix decides how a policy fares, seeds differ much
        (64, 36.0, 3, (0.7, 1.1)),
        (256, 36.0, 3, (1.0,)),
        (1000, 36.0, 3, (1.0,)),
    )
    search_seconds: float = 30.0
    million: int = 1_000_000


QUICK = Sizes((4, 10), 1500, 3, ((8, 60.0, 3, (0.7, 1.0)),), 40.0, 20_000)
TRACES = ("multiturn", "code", "gamma")
# Loads that a TE could at most have, requests a second: where the search begins.
HIGHEST = {"multiturn": 6.0, "code": 6.0, "gamma": 8.0}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def quietly(text: str) -> None:
    """For runs that need no line each."""


# ---- differences ----------------------------------------------------------------------------------------------------


def versus(ours: Sequence[Found], theirs: Sequence[Found], name: str) -> dict[str, Any]:
    """How a figure differs, seed by seed, and what that means."""
    pairs = [(getattr(a.figures, name), getattr(b.figures, name)) for a, b in zip(ours, theirs, strict=True)]
    mean, half = interval([a - b for a, b in pairs])
    beyond = abs(mean) > half
    verdict = "equal" if not beyond else "better" if (mean > 0) == COMPARED[name] else "worse"
    return {"difference": round(mean, 4), "ci": round(half, 4), "verdict": verdict}


def beside(found: dict[tuple[int, Policy], list[Found]], load: int, policy: Policy, others: Sequence[Policy]) -> dict[str, Any]:
    return {
        other: {name: versus(found[load, policy], found[load, other], name) for name in COMPARED}
        for other in others
        if other != policy
    }


# ---- parts ----------------------------------------------------------------------------------------------------------


def cluster_of(tes: int | None) -> Cluster:
    costs, spec = stated(COSTS)
    return Cluster(roles=roles_of(MIX, tes), costs=costs, spec=spec, slo=SLO)


def the_map(heat: HeatMap, sizes: Sizes) -> dict[str, Any]:
    cells = [
        {"prefill": cell.prefill, "decode": cell.decode, "value": round(heat.value(cell.prefill, cell.decode).value, 3)}
        for cell in heat.cells()[:: heat.loads]
    ]
    return {"cells": cells, "same_sign_at_all_loads": heat.same_sign("disaggregated")}


def paper(heat: HeatMap, sizes: Sizes) -> dict[str, Any]:
    policies: list[Policy] = ["round_robin", "least_loaded", "paper", "cost"]
    loads = [Load("completion", rate, sizes.paper_requests) for rate in sizes.paper_rates]
    found = compare(cluster_of(None), loads, policies, range(sizes.paper_seeds), heat, quietly)
    rows = []
    for n, load in enumerate(loads):
        row: dict[str, Any] = {"rate": load.rate}
        row["policies"] = {policy: summary(found[n, policy]) for policy in policies}
        row["against_round_robin"] = {p: beside(found, n, p, ["round_robin"])["round_robin"] for p in policies[1:]}
        rows.append(row)
    return {"roles": MIX, "trace": "completion", "rows": rows}


def scale(heat: HeatMap, sizes: Sizes) -> dict[str, Any]:
    rows = []
    for trace in TRACES:
        smallest = sizes.tes[0][0]
        rate = critical(trace, smallest, heat, sizes)
        say(f"{trace}: the best other policy keeps {GOOD:.0%} at {rate / smallest:.2f} requests a second and TE")
        for tes, seconds, seeds, parts in sizes.tes:
            rates = [part * rate * tes / smallest for part in parts]
            loads = [Load(trace, r, round(r * seconds)) for r in rates]
            began = time.monotonic()
            found = compare(cluster_of(tes // 4 * 4), loads, POLICIES, range(seeds), heat, quietly)
            for n, (part, load) in enumerate(zip(parts, loads, strict=True)):
                rows.append(
                    {
                        "trace": trace,
                        "te": tes // 4 * 4,
                        "load": part,
                        "rate": round(load.rate or 0.0, 2),
                        "seeds": seeds,
                        "policies": {policy: summary(found[n, policy]) for policy in POLICIES},
                        "cost_against": beside(found, n, "cost", POLICIES),
                    }
                )
            say(f"{trace}, {tes} TEs: {time.monotonic() - began:.0f} s")
    return {"roles": MIX, "good": {"ttft_s": SLO.ttft, "tpot_s": SLO.tpot}, "rows": rows}


def critical(trace: str, tes: int, heat: HeatMap, sizes: Sizes) -> float:
    """The rate at which the best policy but ours still keeps GOOD."""
    others: list[Policy] = ["prefix_only", "paper", "least_loaded", "round_robin", "random"]  # those that are likely to, first

    def keeps(policy: Policy, rate: float) -> bool:
        load = Load(trace, rate, round(rate * sizes.search_seconds))
        runs = [Run(cluster_of(tes), load, policy, seed, heat.data) for seed in (100, 101)]
        return sum(one.figures.good for one in simulate_all(runs, quietly)) / len(runs) >= GOOD

    low, high = 0.4 * HIGHEST[trace] * tes, HIGHEST[trace] * tes
    for _ in range(5):
        middle = (low + high) / 2
        if any(keeps(policy, middle) for policy in others):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def million(heat: HeatMap, sizes: Sizes) -> dict[str, Any]:
    run = Run(cluster_of(1000), Load("multiturn", 2500.0, sizes.million), "cost", 0, heat.data)
    found = simulate_all([run], say)[0]
    return {
        "te": 1000,
        "requests": sizes.million,
        "wall_s": round(found.wall, 1),
        "microseconds_a_request": round(1e6 * found.wall / sizes.million, 1),
        "figures": msgspec.to_builtins(found.figures),
    }


PARTS: dict[str, Callable[[HeatMap, Sizes], dict[str, Any]]] = {
    "map": the_map,
    "paper": paper,
    "scale": scale,
    "million": million,
}

# ---- bars -----------------------------------------------------------------------------------------------------------


def bars(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised of the results, and whether it holds."""
    held: list[dict[str, Any]] = []

    def bar(what: str, reached: bool, but: Sequence[str] = ()) -> None:
        held.append({"what": what, "reached": reached, "but": list(but)})

    if rows := parts.get("paper", {}).get("rows"):
        low = rows[0]
        against = [row["against_round_robin"]["paper"]["jct_mean"]["verdict"] for row in rows]
        relative = abs(low["against_round_robin"]["paper"]["jct_mean"]["difference"]) / low["policies"]["round_robin"]["jct_mean"]
        bar(f"paper at the lowest rate: JCT within 5 % of round robin's ({relative:.1%})", relative <= 0.05)
        bar("paper in the middle: JCT better than round robin's at some rate", "better" in against[1:-1])
        bar(f"paper at the highest rate: JCT not better than round robin's ({against[-1]})", against[-1] != "better")
        worse = [f"{r['rate']}: {n}" for r in rows for n in BARRED if r["against_round_robin"]["cost"][n]["verdict"] == "worse"]
        bar("cost never worse than round robin", not worse, worse)
    if rows := parts.get("scale", {}).get("rows"):
        worse = [
            f"{r['trace']}, {r['te']} TEs, load {r['load']}: {name} than {other}"
            for r in rows
            for other, figures in r["cost_against"].items()
            for name in BARRED
            if figures[name]["verdict"] == "worse"
        ]
        bar("cost nowhere worse than any other policy", not worse, worse)
        missing = [
            f"{r['trace']}, {r['te']} TEs: than {other}"
            for r in rows
            for other, figures in r["cost_against"].items()
            if r["load"] == 1.0 and not any(figures[name]["verdict"] == "better" for name in BARRED)
        ]
        bar(f"cost better than every other policy where the best of them keeps {GOOD:.0%}", not missing, missing)
    return held


def table(parts: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for row in parts.get("paper", {}).get("rows", []):
        cells = [
            f"{policy} JCT {f['jct_mean'] / 1e3:.2f} TPOT {f['tpot_mean']:.1f} TTFT {f['ttft_mean']:.0f}"
            for policy, f in row["policies"].items()
        ]
        lines.append(f"{row['rate']:5g}/s  " + " | ".join(cells))
    for row in parts.get("scale", {}).get("rows", []):
        cells = [f"{policy} {f['good']:.0%} {f['jct_mean'] / 1e3:.2f}s" for policy, f in row["policies"].items()]
        lines.append(f"{row['trace']:9} {row['te']:4} TEs load {row['load']:.1f}  " + " | ".join(cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.simulation", description=__doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few TEs and requests: to see that it works")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"default: {OUT.name} in bench/results")
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else Sizes()
    report = json.loads(args.out.read_bytes()) if args.out.exists() else {}
    costs, spec = stated(COSTS)
    report |= {
        "what": __doc__.splitlines()[0].partition(": ")[2],
        "machine": machine(),
        "stated": {"model": msgspec.to_builtins(MODELS["34b"]), "devices": msgspec.to_builtins(DEVICES["910b"])},
        "costs": msgspec.to_builtins(costs),
        "te": msgspec.to_builtins(spec),
        "figures": list(Figures.__struct_fields__),
    }
    parts = report.setdefault("parts", {})
    say("the heat map")
    heat = heat_map(costs, spec)
    for name in args.parts:
        say(f"part {name}")
        began = time.monotonic()
        parts[name] = PARTS[name](heat, sizes)
        parts[name]["took_s"] = round(time.monotonic() - began, 1)
        parts[name]["command"] = f"python -m bench.simulation --parts {name}" + " --quick" * args.quick
        report["parts"] = parts = {known: parts[known] for known in PARTS if known in parts}
        report["bars"] = bars(parts)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(parts))
    for one in report["bars"]:
        print(("reached: " if one["reached"] else "MISSED:  ") + one["what"] + "".join(f"\n    but {b}" for b in one["but"]))
    return 0 if all(one["reached"] for one in report["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
