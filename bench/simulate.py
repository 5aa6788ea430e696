"""`deepserve.py simulate`: policies beside each other on a cluster that nobody here has, in virtual time.

    deepserve.py simulate --roles 2c+1p1d --trace code --rate 4 8 12
    deepserve.py simulate --tes 64 --roles 1c --trace multiturn --rate 200 --policy cost paper --out result.json --png result.png

Every policy gets the same requests, `--seeds` times with others. Figures are means over seeds, after the first part of each run
(caches fill, batches grow) and before the last; behind ± is the half width of the 95 % confidence interval (Student's t).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from bench.canvas import BLACK, GREY, Canvas, Colour
from engine.types import UserError
from scale.autoscale import Bounds
from sched import traces
from sched.costs import Costs
from sched.heatmap import HeatMap, MapData
from sched.profile_store import Profile
from sched.simulate import POLICIES, Cluster, Figures, Policy, Scaling, Simulation, Slo, figures, heat_map, roles_of
from sched.simulate_te import Spec
from sched.stated_costs import STATED, stated
from sched.tenants import read as read_keys
from sched.traces import Arrival

Say = Callable[[str], None]

OF_KEYS = ("requests", "ttft_mean", "ttft_p99", "tpot_mean", "jct_mean", "good")

# Of a run's time, where its figures begin and end.
SINCE, UNTIL = 0.4, 0.95

# 97.5 % quantiles of Student's t, for 1 degree of freedom and on.
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110)
STUDENT += (2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)


class Load(msgspec.Struct, frozen=True):
    """Requests of a made-up trace, or of a file."""

    trace: str
    rate: float | None  # a second; None: as recorded
    requests: int | None  # None: all that a file has


class Run(msgspec.Struct, frozen=True):
    """One policy, one trace."""

    cluster: Cluster
    load: Load
    policy: Policy
    seed: int
    heat: MapData


class Found(msgspec.Struct, frozen=True):
    figures: Figures
    busy: float
    te_seconds: float
    preemptions: int
    refused: dict[str, int]  # by why
    keys: dict[str, Figures]  # of each key, where there are several
    wall: float  # seconds it took us
    targets: list[tuple[float, int, int]]


# ---- runs -----------------------------------------------------------------------------------------------------------


def requests_of(load: Load, seed: int) -> Iterator[Arrival]:
    """Raises `UserError`."""
    if (made_up := traces.MADE_UP.get(load.trace)) is not None:
        if load.rate is None or load.requests is None:
            raise UserError(f"--trace {load.trace}: say how many with --rate and --requests, for example 8 and 10000", "rate")
        return itertools.islice(made_up(load.rate, seed), load.requests)
    if not Path(load.trace).exists():
        known = ", ".join(traces.MADE_UP)
        raise UserError(f"--trace {load.trace}: neither a file nor one of {known}", "trace")
    recorded = traces.read(Path(load.trace))[: load.requests]
    return iter(recorded if load.rate is None else traces.at_rate(recorded, load.rate))


def simulate(run: Run) -> Found:
    """Raises `UserError`."""
    began = time.perf_counter()
    slo = run.cluster.slo
    simulation = Simulation(run.cluster, run.policy, HeatMap(run.heat), run.seed)
    last = 0.0

    def watched() -> Iterator[Arrival]:
        nonlocal last
        for arrival in requests_of(run.load, run.seed):
            last = arrival.at
            yield arrival

    gc.disable()  # it would look through all that is simulated, again and again, for next to nothing: a tenth of the time
    try:
        done = simulation.run(watched())
    finally:
        gc.enable()
    seen = figures(done, SINCE * last, UNTIL * last, slo)
    wall = time.perf_counter() - began
    refused: Counter[str] = Counter()
    for (_, why), count in done.refused.items():
        refused[why] += count
    names = set(done.key)
    keys = {key: figures(done, 0.0, math.inf, slo, key) for key in sorted(names)} if len(names) > 1 else {}
    return Found(seen, done.busy, simulation.te_seconds, done.preemptions, dict(refused), keys, wall, done.targets)


def simulate_all(runs: Sequence[Run], say: Say) -> list[Found]:
    """Side by side on the cores there are."""
    cores = min(len(os.sched_getaffinity(0)), len(runs))
    if cores == 1:
        return [simulate(run) for run in runs]
    found: list[Found] = []
    with ProcessPoolExecutor(cores) as pool:
        for n, one in enumerate(pool.map(simulate, runs), 1):
            found.append(one)
            run = runs[n - 1]
            at = f" at {run.load.rate:g} a second" if run.load.rate is not None else ""
            say(f"{n} of {len(runs)}: {run.policy}{at}, seed {run.seed}: {one.wall:.1f} s")
    return found


# ---- figures --------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % confidence interval); infinite with one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return mean, t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def summary(found: Sequence[Found]) -> dict[str, Any]:
    """Means over seeds with their confidence intervals."""
    columns: dict[str, Any] = {}
    for name in Figures.__struct_fields__:
        mean, half = interval([getattr(one.figures, name) for one in found])
        columns[name] = round(mean, 4)
        if name not in ("requests", "rate"):
            columns[f"{name}_ci"] = round(half, 4) if math.isfinite(half) else None
    columns["busy"] = round(float(np.mean([one.busy for one in found])), 4)
    columns["te_seconds"] = round(float(np.mean([one.te_seconds for one in found])), 1)
    columns["preemptions"] = sum(one.preemptions for one in found)
    columns["refused"] = dict(sum((Counter(one.refused) for one in found), Counter()))
    for key in found[0].keys:
        mean = {name: float(np.mean([getattr(one.keys[key], name) for one in found])) for name in OF_KEYS}
        columns.setdefault("keys", {})[key] = {name: round(value, 4) for name, value in mean.items()}
    columns["wall_s"] = round(sum(one.wall for one in found), 1)
    return columns


def compare(
    cluster: Cluster,
    loads: Sequence[Load],
    policies: Sequence[Policy],
    seeds: Sequence[int],
    heat: HeatMap,
    say: Say,
) -> dict[tuple[int, Policy], list[Found]]:
    """(index of the load, policy) -> what each seed brought."""
    runs = [Run(cluster, load, policy, seed, heat.data) for load in loads for policy in policies for seed in seeds]
    found = iter(simulate_all(runs, say))
    return {(n, policy): [next(found) for _ in seeds] for n in range(len(loads)) for policy in policies}


# ---- the picture ----------------------------------------------------------------------------------------------------

COLOURS: dict[Policy, Colour] = {
    "round_robin": (140, 140, 140),
    "random": (200, 170, 90),
    "least_loaded": (60, 140, 60),
    "prefix_only": (150, 90, 170),
    "paper": (40, 90, 200),
    "cost": (210, 50, 40),
}
PANELS = {"jct_mean": "JCT, s", "ttft_mean": "TTFT, s", "tpot_mean": "TPOT, ms", "good": "both promises kept, %"}
FACTORS = {"jct_mean": 1e-3, "ttft_mean": 1e-3, "tpot_mean": 1.0, "good": 100.0}
WIDTH, HEIGHT, LEFT, TOP = 420, 300, 70, 46


def picture(rows: Sequence[dict[str, Any]], title: str) -> Canvas:
    """A panel for each figure: over the rate, a line for each policy, with its confidence interval."""
    canvas = Canvas(2 * WIDTH, 2 * HEIGHT + 40)
    canvas.text(10, 8, title)
    policies = [policy for policy in POLICIES if any(row["policy"] == policy for row in rows)]
    for n, policy in enumerate(policies):
        canvas.text(10 + 140 * n, 28, policy, COLOURS[policy], size=1)
    for n, (name, label) in enumerate(PANELS.items()):
        panel(canvas, n % 2 * WIDTH, 40 + n // 2 * HEIGHT, rows, name, label, policies)
    return canvas


def panel(
    canvas: Canvas, x: int, y: int, rows: Sequence[dict[str, Any]], name: str, label: str, policies: Sequence[Policy]
) -> None:
    width, height = WIDTH - LEFT - 20, HEIGHT - TOP - 30
    rates = sorted({row["rate"] for row in rows})
    most = max(row[name] * FACTORS[name] for row in rows) * 1.05 or 1.0
    low, high = rates[0], rates[-1] if len(rates) > 1 else rates[0] + 1

    def place(rate: float, value: float) -> tuple[float, float]:
        return x + LEFT + width * (rate - low) / (high - low), y + TOP + height * (1 - min(value, most) / most)

    canvas.text(x + LEFT, y + TOP - 22, label, size=1)
    canvas.line(x + LEFT, y + TOP + height, x + LEFT + width, y + TOP + height, GREY, 1)
    canvas.line(x + LEFT, y + TOP, x + LEFT, y + TOP + height, GREY, 1)
    for part in (0.0, 0.5, 1.0):
        canvas.text(x + LEFT - 6, round(y + TOP + height * (1 - part)) - 4, f"{part * most:.3g}", GREY, 1, align=1.0)
    for rate in rates:
        canvas.text(round(place(rate, 0)[0]), y + TOP + height + 8, f"{rate:.3g}", BLACK, 1, align=0.5)
    for policy in policies:
        own = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["rate"])
        points = [place(row["rate"], row[name] * FACTORS[name]) for row in own]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            canvas.line(x0, y0, x1, y1, COLOURS[policy])
        for row, (px, py) in zip(own, points, strict=True):
            canvas.box(round(px) - 2, round(py) - 2, 5, 5, COLOURS[policy])
            if (half := row[f"{name}_ci"]) is not None:
                top, bottom = (place(row["rate"], (row[name] + sign * half) * FACTORS[name])[1] for sign in (1, -1))
                canvas.line(px, top, px, bottom, COLOURS[policy], 1)


# ---- the command ----------------------------------------------------------------------------------------------------


class Report(msgspec.Struct):
    """A file of `profile --out`, as far as it is of use here."""

    profile: dict[str, Any] | None = None


def costs_of(args: argparse.Namespace) -> tuple[Costs, Spec, HeatMap | None]:
    """Of a name in the table of stated figures, or a profile. Raises `UserError`."""
    if args.costs in STATED:
        costs, spec = stated(args.costs)
        heat = None
    else:
        path = Path(args.costs)
        try:
            data = path.read_bytes()
            report = msgspec.json.decode(data, type=Report)  # what `profile --out` writes, or the stored file
            profile = msgspec.convert(report.profile, Profile) if report.profile else msgspec.json.decode(data, type=Profile)
        except OSError as e:
            known = ", ".join(STATED)
            raise UserError(f"--costs {path}: {e.strerror}; use {known}, or a file of `deepserve.py profile`", "costs") from None
        except msgspec.MsgspecError as e:
            raise UserError(f"--costs {path}: it is no profile ({e}); make one with `deepserve.py profile`", "costs") from None
        if not profile.costs:
            raise UserError(f"--costs {path}: it has no costs yet; run `deepserve.py profile` for longer", "costs")
        block = msgspec.json.decode(profile.key.settings)["block_size"]
        costs, spec, heat = profile.costs[0].costs, Spec(block=block), HeatMap(profile.heat)
    given = {"seats": args.max_num_seqs, "kv_tokens": args.kv_tokens, "block": args.block_size}
    return costs, msgspec.structs.replace(spec, **{k: v for k, v in given.items() if v is not None}), heat


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="deepserve simulate", description=__doc__.splitlines()[0].partition(": ")[2])
    add = made.add_argument
    add("--roles", default="2c+1p1d", metavar="MIX", help="colocated (c), prefill (p), decode (d) TEs and semi pairs (s)")
    add("--tes", type=int, metavar="N", help="so many TEs in all, of the same mix (default: the mix once)")
    known = ", ".join(STATED)
    add("--costs", default=next(iter(STATED)), metavar="X", help=f"what steps take: {known}, or a file of `profile`")
    made_up = ", ".join(traces.MADE_UP)
    add("--trace", default="code", metavar="X", help=f"{made_up}, or a file: JSONL (ours, Mooncake's) or Azure's CSV")
    add("--rate", type=float, nargs="+", metavar="R", help="requests a second, one run each (default: as a file has them; 8)")
    add("--requests", type=int, metavar="N", help="of each run (default: all that a file has; 5000)")
    add("--policy", nargs="+", default=["all"], choices=["all", *POLICIES], metavar="P", help=f"all, or: {', '.join(POLICIES)}")
    add("--seeds", type=int, default=3, metavar="N", help="runs with other requests, for the confidence intervals (default: 3)")
    add("--slo-ttft-ms", type=float, default=2000, metavar="MS", help="what a good request keeps (default: 2000)")
    add("--slo-tpot-ms", type=float, default=50, metavar="MS", help="(default: 50)")
    add("--max-num-seqs", type=int, metavar="N", help="sequences a TE runs at once")
    add("--kv-tokens", type=int, metavar="N", help="tokens of KV a TE has")
    add("--block-size", type=int, metavar="N", help="tokens of a KV block")
    add("--max-te", type=int, metavar="N", help="let the autoscaler have so many; TEs are colocated then")
    add("--startup", type=float, default=2.0, metavar="S", help="seconds until a TE that it starts takes requests (default: 2)")
    add("--api-keys-file", type=Path, metavar="FILE", help="limits and weights of the keys that a trace names, as for `serve`")
    add("--max-num-queued-reqs", type=int, metavar="N", help="refuse more, as `serve` does (default: none are refused)")
    add("--out", type=Path, metavar="FILE", help="the result as JSON")
    add("--png", type=Path, metavar="FILE", help="the result as a picture")
    return made


def main(argv: Sequence[str], say: Say) -> int:
    """Raises `UserError`."""
    args = parser().parse_args(argv)
    costs, spec, heat = costs_of(args)
    for name in ("requests", "seeds", "max_num_seqs", "kv_tokens", "block_size", "max_te"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be 1 or more", name)
    if args.rate is not None and min(args.rate) <= 0:
        raise UserError(f"--rate {min(args.rate):g}: it must be more than 0", "rate")
    roles = roles_of(args.roles, args.tes)
    scaling = None
    if args.max_te is not None:
        if any(role != "colocated" for role, _ in roles) or args.max_te < len(roles):
            raise UserError(f"--max-te {args.max_te}: it is for colocated TEs, no fewer than --roles; use --roles 1c", "max_te")
        scaling = Scaling(Bounds(len(roles), args.max_te, None), args.startup)
    slo = Slo(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3)
    tenants = {key.tenant.name: key.tenant for key in read_keys(args.api_keys_file)} if args.api_keys_file else {}
    cluster = Cluster(
        roles=roles,
        costs=costs,
        spec=spec,
        slo=slo,
        scaling=scaling,
        tenants=tenants,
        max_queued=args.max_num_queued_reqs,
    )
    made_up = args.trace in traces.MADE_UP
    rates: list[float | None] = args.rate or [8.0 if made_up else None]
    loads = [Load(args.trace, rate, args.requests or (5000 if made_up else None)) for rate in rates]
    for load in loads:
        requests_of(load, 0)  # what is wrong with them is said before anything is begun
    kinds = {role for role, _ in roles}
    if heat is None:
        split: list[Literal["disaggregated", "semi"]] = ["semi"] * ("semi" in kinds) + ["disaggregated"] * ("prefill" in kinds)
        if split and "colocated" in kinds:
            say("the heat map of such TEs, simulated")
        heat = heat_map(costs, spec, split) if split and "colocated" in kinds else HeatMap()
    policies: list[Policy] = list(POLICIES) if "all" in args.policy else list(dict.fromkeys(args.policy))
    found = compare(cluster, loads, policies, range(args.seeds), heat, say)
    rows = [{"policy": policy, **summary(several)} for (_, policy), several in found.items()]
    for row, (n, _) in zip(rows, found, strict=True):
        row["rate"] = loads[n].rate or row["rate"]
    print(table(rows))
    command = "deepserve.py simulate " + " ".join(argv)
    if args.out is not None:
        scaled = {f"{p} {n}": several[0].targets for (n, p), several in found.items()} if scaling is not None else None
        report = {"command": command, "costs": msgspec.to_builtins(costs), "te": msgspec.to_builtins(spec), "rows": rows}
        write("out", args.out, (json.dumps(report | ({"targets": scaled} if scaled else {}), indent=1) + "\n").encode())
    if args.png is not None:
        write("png", args.png, picture(rows, f"{len(roles)} TEs ({args.roles}), {Path(args.trace).name}").png())
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    wide = "".join(f" {name:>14}" for name in ("TTFT ms", "TPOT ms", "JCT s", "good %"))
    lines = [f"{'a second':>9} {'policy':13}{wide} {'cached %':>8} {'busy %':>6}"]

    def plus(row: dict[str, Any], name: str, factor: float, digits: int) -> str:
        half = row[f"{name}_ci"]
        return f"{factor * row[name]:.{digits}f}" + (f" ±{factor * half:.{digits}f}" if half is not None else "")

    for row in rows:
        lines.append(
            f"{row['rate']:9.4g} {row['policy']:13} {plus(row, 'ttft_mean', 1, 0):>14} {plus(row, 'tpot_mean', 1, 1):>14}"
            f" {plus(row, 'jct_mean', 1e-3, 2):>14} {plus(row, 'good', 100, 1):>14} {100 * row['cached']:8.1f}"
            f" {100 * row['busy']:6.0f}"
        )
    return "\n".join(lines)


def write(flag: str, path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as e:
        raise UserError(f"--{flag} {path}: {e.strerror}", flag) from None
