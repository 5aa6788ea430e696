"""How fast TEs come to be on a cluster that nobody here has: the real plans and decisions, on stated links.

    python -m bench.scale_simulation [--out FILE]

1. One TE's weights, by path, beside the readings of the paper's figure 10, and one source to 31 beside figure 11.
2. From 1 TE to 64, 128, 256, 512 and 1000, by path. The trees are those of `scale.fork.schedule`.
3. The same with TEs that die while they send.
4. A tenfold jump of the load: what `scale.autoscale.decide` does about it, and when P95 TTFT is what was promised again.
5. Weights in host memory: how often they are there, with and without `scale.preload.Predictor`.

Modelled: bytes over wires, wires that several share (PCIe switches, a host's memory, its SSDs), tensor initialisation, the time
to set up a transfer. Not modelled: congestion inside the networks, what serving and sending cost each other, what differs between
two equal devices, processes (they are warm), HCCL's own algorithms. docs/scaling.md says which figures the constants were fitted
to.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from scale.autoscale import Bounds, Memory, Resident, Signals, decide, leaving
from scale.fork import ANYWHERE, SAME_HOST, Holder, Plan, Taker, Way, nearness, schedule
from scale.preload import Entry, Predictor, make_room, what_to_load
from sched.shares import percentile

GB = 1e9

# ---- the cluster ----------------------------------------------------------------------------------------------------

NPUS = 8  # a host
# Stated by the issue, bytes a second and NPU.
HCCS = 100 * GB
ROCE = 200e9 / 8
# Seconds that a new TE's tensors take to be initialised (stated in the paper's text, for loads from DRAM). All TEs do it at once.
INIT = 0.3
# Fitted to figure 10's DRAM-hit row, three values to three figures. A port is what one NPU gets alone; two share a switch; all
# share what the host's memory gives to PCIe.
PCIE_PORT = 20 * GB
PCIE_SWITCH = 20 * GB
PCIE_HOST = 50 * GB
# Fitted to figure 10's DRAM-miss row: what one reading process gets, and what the SSDs of a host give at most.
SSD_READER = 5.3 * GB
SSD_HOST = 6.2 * GB
# Seconds to set up one transfer. RoCE: fitted to figure 10, 8B. A source's share of setting up one taker of a broadcast: fitted
# to figure 11, 31 takers; copies over HCCS are given the same.
ROCE_SETUP = 0.07
CONNECT = 0.0045
# Figure 9, 8B: a process that is not warm. (The paper's other steps were never read off; none is assumed in parts 1 to 3.)
PRE_LOAD = 26.45
# Assumed, for part 4: KV blocks and the dummy request.
POST_LOAD = 0.3


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    ranks: int

    @property
    def nbytes(self) -> float:
        return 2 * self.parameters  # bfloat16

    @property
    def rank_bytes(self) -> float:
        return self.nbytes / self.ranks

    @property
    def tes_a_host(self) -> int:
        return NPUS // self.ranks


MODELS = (Model("8B TP1", 8.03e9, 1), Model("34B TP4", 33.74e9, 4), Model("72B TP8", 72.71e9, 8))
# Hosts whose NPUs reach each other by HCCS: a server of its own, and a SuperPod of 48.
DOMAINS = {"servers": 1, "SuperPods": 48}

# PAPER.md 4.4, seconds.
FIGURE_10 = {
    "disk": (3.3, 11.0, 24.0),
    "dram": (1.1, 2.1, 3.2),
    "fork RoCE": (0.71, 0.76, 0.91),
    "fork HCCS": (0.15, 0.16, 0.19),
}
FIGURE_11 = {1: 0.44, 31: 0.58}


def pcie(npus: int) -> float:
    """Bytes a second that each of `npus` NPUs of a host gets when all load at once. They are neighbours."""
    return min(PCIE_PORT, PCIE_SWITCH / min(2, npus), PCIE_HOST / npus)


def from_dram(model: Model, tes: int) -> float:
    """Seconds until `tes` TEs of one host have their weights from its memory."""
    return INIT + model.rank_bytes / pcie(tes * model.ranks)


def from_disk(model: Model, tes: int) -> float:
    """The file is read once, by the ranks of all TEs together, and goes on to the NPUs as it comes."""
    read = model.nbytes / min(SSD_HOST, SSD_READER * model.ranks * tes)
    return max(INIT + read, from_dram(model, tes))


def send(model: Model, level: int) -> float:
    """Seconds of one copy from TE to TE, each rank to the same rank of the other."""
    if level == ANYWHERE:
        return ROCE_SETUP + model.rank_bytes / ROCE
    return CONNECT + model.rank_bytes / HCCS


def broadcast(model: Model, takers: int, level: int) -> float:
    """All at once from one source, as the paper does it: each hands on what it has while it gets the rest, so the slowest link
    counts once, and the source sets up each of them."""
    link = ROCE if level == ANYWHERE else HCCS
    return INIT + (ROCE_SETUP if level == ANYWHERE else 0.0) + takers * CONNECT + model.rank_bytes / link


def tes_of(model: Model, count: int, hosts_a_domain: int) -> list[Taker]:
    """TEs 0 to `count` - 1, host by host."""
    places = [(te // model.tes_a_host, te % model.tes_a_host * model.ranks) for te in range(count)]
    return [Taker(te, "npu", index, host, host // hosts_a_domain) for te, (host, index) in enumerate(places)]


def holder(taker: Taker) -> Holder:
    return Holder(taker.te, taker.device, taker.index, True, taker.host, taker.domain)


def tree(model: Model, sources: int, count: int, hosts_a_domain: int, deaths: dict[int, float] | None = None) -> Plan:
    """From the first `sources` TEs to the others. The seconds are those of the transfers: initialisation comes before."""
    tes = tes_of(model, count, hosts_a_domain)

    def seconds(source: Holder, taker: Taker, way: Way) -> float:
        return send(model, nearness(source, taker)) if way == "copy" else 0.0

    return schedule([holder(te) for te in tes[:sources]], tes[sources:], seconds, deaths)


# ---- 1. figures 10 and 11 -------------------------------------------------------------------------------------------


def figure_10() -> list[dict[str, Any]]:
    rows = []
    for n, model in enumerate(MODELS):
        ours = {
            "disk": from_disk(model, 1),
            "dram": from_dram(model, 1),
            "fork RoCE": send(model, ANYWHERE),
            "fork HCCS": send(model, SAME_HOST),
        }
        for path, seconds in ours.items():
            paper = FIGURE_10[path][n]
            rows.append({"model": model.name, "path": path, **beside(seconds, paper)})
    return rows


def figure_11() -> list[dict[str, Any]]:
    return [{"takers": n, **beside(broadcast(MODELS[0], n, SAME_HOST), paper)} for n, paper in FIGURE_11.items()]


def beside(seconds: float, paper: float) -> dict[str, float]:
    return {"seconds": round(seconds, 3), "paper": paper, "error_percent": round(100 * (seconds / paper - 1), 1)}


# ---- 2. to a thousand -----------------------------------------------------------------------------------------------


def growth(counts: Sequence[int] = (64, 128, 256, 512, 1000)) -> list[dict[str, Any]]:
    rows = []
    for cluster, hosts_a_domain in DOMAINS.items():
        for model in MODELS:
            for count in counts:
                tes = tes_of(model, count, hosts_a_domain)
                level = max(nearness(holder(tes[0]), te) for te in tes[1:])
                plan = tree(model, 1, count, hosts_a_domain)
                assert not plan.left
                rows.append(
                    {
                        "cluster": cluster,
                        "model": model.name,
                        "te": count,
                        "disk": round(from_disk(model, model.tes_a_host), 2),
                        "dram": round(from_dram(model, model.tes_a_host), 2),
                        "one by one": round(INIT + sum(send(model, nearness(holder(tes[0]), te)) for te in tes[1:]), 2),
                        "broadcast": round(broadcast(model, count - 1, level), 2),
                        "tree": round(INIT + plan.seconds, 2),
                        "depth": plan.depth,
                    }
                )
    return rows


# ---- 3. sources that die --------------------------------------------------------------------------------------------


def with_deaths(share: float, seeds: int = 5) -> list[dict[str, Any]]:
    """64 TEs, of which `share` die at a random moment of the tree, the first source never."""
    rows = []
    for cluster, hosts_a_domain in DOMAINS.items():
        for model in MODELS:
            whole = tree(model, 1, 64, hosts_a_domain)
            seconds, again = [], []
            for seed in range(seeds):
                rng = random.Random(seed)
                dead = rng.sample(range(1, 64), round(share * 64))
                plan = tree(model, 1, 64, hosts_a_domain, {te: rng.uniform(0, whole.seconds) for te in dead})
                assert not plan.left
                seconds.append(INIT + plan.seconds)
                again.append(sum(not move.done and move.taker not in dead for move in plan.moves))
            rows.append(
                {
                    "cluster": cluster,
                    "model": model.name,
                    "dead": round(share * 64),
                    "tree": round(INIT + whole.seconds, 2),
                    "with_deaths": [round(s, 2) for s in sorted(seconds)],
                    "sent_again": again,
                }
            )
    return rows


# ---- 4. a burst -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Requests come at random (Poisson) at `rate(t)` a second. Each takes `prefill` seconds of a TE by itself, and a slot for
    `decode` seconds after that."""

    rate: Callable[[float], float]
    most: float  # the largest rate
    prefill: float = 0.1
    decode: float = 3.0
    slots: int = 64
    promise: float = 1.0  # seconds to the first token


@dataclass(eq=False)
class Server:
    te: int
    ready: float
    sequences: int = 0
    computing: bool = False
    draining: bool = False


@dataclass
class Look:
    now: float
    target: int
    ready: int
    queued: int
    reason: str


@dataclass
class Course:
    """What came of it."""

    looks: list[Look] = field(default_factory=list)
    # (arrival, seconds), by arrival; infinite where a request waits yet
    ttft: list[tuple[float, float]] = field(default_factory=list)
    lost: int = 0  # requests of TEs that ended before them

    def changes(self, since: float = 0.0) -> tuple[int, int]:
        """Times the target went up, and down."""
        steps = [(a.target, b.target) for a, b in itertools.pairwise(self.looks) if b.now > since]
        return sum(b > a for a, b in steps), sum(b < a for a, b in steps)

    def p95(self, since: float, until: float) -> float | None:
        return percentile([seconds for arrival, seconds in self.ttft if since <= arrival < until], 95.0)

    def restored(self, since: float, until: float, promise: float, window: float = 1.0) -> float | None:
        """Seconds from `since` until requests keep the promise at P95 in every window up to `until`. None: they don't."""
        last = None
        for n in range(math.floor((until - since) / window)):
            p95 = self.p95(since + n * window, since + (n + 1) * window)
            if p95 is not None and p95 > promise:
                last = n
        kept = 0.0 if last is None else (last + 1) * window
        return kept if since + kept + window <= until else None


class Plant:
    """TEs, requests and looks in one line of events. Requests wait in one queue, and a TE that is free takes the first."""

    def __init__(
        self,
        load: Load,
        te: int,
        bounds: Bounds | None,
        startup: Callable[[list[int], list[int]], list[float]],
        seed: int = 0,
        look: float = 0.5,
    ):
        """`startup(ready, new)`: seconds that each of the new TEs takes; `bounds` None: nobody decides, the TEs stay."""
        self.load, self.bounds, self.startup, self.look_every = load, bounds, startup, look
        self.rng = random.Random(seed)
        self.servers = {n: Server(n, 0.0) for n in range(te)}
        self.queue: deque[float] = deque()  # arrivals
        self.idle = deque(self.servers.values())
        self.memory = Memory()
        self.course = Course()
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.order = itertools.count()
        self.last_request = 0.0
        self.firsts: list[float] = []  # since the last look

    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), what))

    def run(self, until: float) -> Course:
        self.at(self.rng.expovariate(self.load.most), self.arrive)
        self.at(0.0, self.look)
        while self.events and self.events[0][0] <= until:
            now, _, what = heapq.heappop(self.events)
            what(now)
        self.course.ttft += [(arrival, math.inf) for arrival in self.queue]
        self.course.ttft.sort()
        return self.course

    def arrive(self, now: float) -> None:
        # Thinning: candidates come at the largest rate, and count with the present one.
        if self.rng.random() < self.load.rate(now) / self.load.most:
            self.queue.append(now)
            self.last_request = now
            self.dispatch(now)
        self.at(now + self.rng.expovariate(self.load.most), self.arrive)

    def dispatch(self, now: float) -> None:
        while self.queue and self.idle:
            server = self.idle.popleft()
            if server.draining or server.ready > now:
                continue
            server.computing = True
            server.sequences += 1
            arrival = self.queue.popleft()
            self.at(now + self.load.prefill, partial(self.first_token, server, arrival))

    def first_token(self, server: Server, arrival: float, now: float) -> None:
        server.computing = False
        self.firsts.append(now - arrival)
        self.course.ttft.append((arrival, now - arrival))
        self.course.lost += server.te not in self.servers
        self.at(now + self.load.decode, partial(self.finish, server))
        self.free(server, now)

    def finish(self, server: Server, now: float) -> None:
        server.sequences -= 1
        self.last_request = now
        self.course.lost += server.te not in self.servers
        if server.draining and not server.sequences:
            del self.servers[server.te]
        elif server.sequences == self.load.slots - 1 and not server.computing:
            self.free(server, now)

    def free(self, server: Server, now: float) -> None:
        if server.sequences < self.load.slots and not server.draining:
            self.idle.append(server)
            self.dispatch(now)

    def look(self, now: float) -> None:
        self.at(now + self.look_every, self.look)
        staying = [s for s in self.servers.values() if not s.draining]
        ready = [s for s in staying if s.ready <= now]
        starting = len(staying) - len(ready)
        wait = len(self.queue) * self.load.prefill / len(ready) if ready else 0.0
        target, reason = len(staying), ""
        if self.bounds is not None:
            signals = Signals(
                now=now,
                ready=len(ready),
                starting=starting,
                queued=len(self.queue),
                running=sum(s.sequences for s in staying),
                slots=self.load.slots,
                predicted_wait_s=wait,
                ttft_misses=sum(seconds > self.load.promise for seconds in self.firsts),
                ttft_total=len(self.firsts),
                idle_s=0.0 if self.queue or any(s.sequences for s in staying) else now - self.last_request,
                draining=len(self.servers) - len(staying),
            )
            decision = decide(signals, self.bounds, self.memory)
            self.memory, target, reason = decision.memory, decision.target, decision.reason
            self.bring_to(now, target, staying, ready)
        self.firsts.clear()
        self.course.looks.append(Look(now, target, len(ready), len(self.queue), reason))

    def bring_to(self, now: float, target: int, staying: list[Server], ready: list[Server]) -> None:
        if target > len(staying):
            new = list(itertools.islice((n for n in itertools.count() if n not in self.servers), target - len(staying)))
            for te, seconds in zip(new, self.startup([s.te for s in ready], new), strict=True):
                server = self.servers[te] = Server(te, now + seconds)
                self.at(server.ready, partial(self.free, server))
        for te in leaving([Resident(s.te, s.sequences) for s in ready], len(staying) - target):
            self.servers[te].draining = True
            if not self.servers[te].sequences:
                del self.servers[te]


def burst() -> dict[str, Any]:
    """8B on SuperPods: 6 TEs at three quarters of what they can, then ten times the load for 60 s."""
    model, before, jump, lasts = MODELS[0], 45.0, 30.0, 60.0

    def rate(t: float) -> float:
        return before * (10 if jump <= t < jump + lasts else 1)

    def forked(ready: list[int], new: list[int]) -> list[float]:
        tes = tes_of(model, max(ready + new) + 1, DOMAINS["SuperPods"])
        plan = schedule([holder(tes[te]) for te in ready], [tes[te] for te in new], lambda s, t, way: send(model, nearness(s, t)))
        arrives = {move.taker: move.ended for move in plan.moves}
        return [INIT + arrives[te] + POST_LOAD for te in new]

    startups: dict[str, Callable[[list[int], list[int]], list[float]]] = {
        "fork": forked,
        "dram": lambda ready, new: [from_dram(model, model.tes_a_host) + POST_LOAD] * len(new),
        "disk": lambda ready, new: [from_disk(model, model.tes_a_host) + POST_LOAD] * len(new),
        "cold processes, disk": lambda ready, new: [PRE_LOAD + from_disk(model, model.tes_a_host) + POST_LOAD] * len(new),
        "no scaling": lambda ready, new: [],
    }
    rows = []
    for name, startup in startups.items():
        bounds = None if name == "no scaling" else Bounds(1, 64, None)
        load = Load(rate, 10 * before)
        course = Plant(load, 6, bounds, startup, seed=1).run(jump + lasts + 240)
        p95 = course.p95(jump, jump + lasts)
        restored = course.restored(jump, jump + lasts, load.promise)
        rows.append(
            {
                "start by": name,
                "restored_s": restored,
                "p95_ttft_in_burst_s": None if p95 is None or math.isinf(p95) else round(p95, 2),
                "most_te": max(look.target for look in course.looks),
                "te_at_end": course.looks[-1].target,
                "ups_downs": course.changes(),
                "lost": course.lost,
            }
        )
    return {"requests_a_second": [before, 10 * before], "prefill_s": 0.1, "promise_s": 1.0, "rows": rows}


# ---- 5. weights in host memory --------------------------------------------------------------------------------------

DAY = 86400.0


def trace(models: int, days: int, seed: int, requests_a_day: int = 6000) -> list[tuple[float, int]]:
    """(time, model) of requests: Zipf popularity, most models used in some hours of the day only, one request in twenty at any
    time of the day."""
    rng = random.Random(seed)
    weights = [1 / (n + 1) for n in range(models)]
    starts = [rng.uniform(0, 24) for _ in range(models)]
    lasts = [rng.choice([2, 4, 8, 24]) for _ in range(models)]
    asked = []
    for day in range(days):
        for model in rng.choices(range(models), weights, k=requests_a_day):
            hour = rng.uniform(0, 24) if rng.random() < 0.05 else (starts[model] + rng.uniform(0, lasts[model])) % 24
            asked.append((day * DAY + hour * 3600, model))
    return sorted(asked)


def hit_rate(
    requests: Sequence[tuple[float, int]], sizes: dict[str, int], budget: int, ahead: bool, since: float
) -> dict[str, Any]:
    """Requests from `since` on that found their model's weights in memory; weights read from disk, whoever asked for it.
    `ahead`: the predictor says what to drop and what to load before it is asked for. Else the least recently used is dropped."""
    there: dict[str, Entry] = {}
    predictor = Predictor()
    hits = asked = loads = 0
    look = 0.0
    for now, number in requests:
        while ahead and look <= now:
            for step in what_to_load(predictor.predict(look), there.values(), sizes, budget):
                for key in step.drop:
                    del there[key]
                there[step.key] = Entry(step.key, sizes[step.key], look)
                loads += look >= since
            look += 300.0
        key = str(number)
        predictor.asked(key, now)
        if now >= since:
            asked += 1
            hits += key in there
        if key not in there:
            drop = make_room(there.values(), budget, sizes[key], predictor.expected(now) if ahead else None)
            if drop is None:
                continue
            for other in drop:
                del there[other]
            loads += now >= since
        there[key] = Entry(key, sizes[key], now)
        assert sum(entry.nbytes for entry in there.values()) <= budget
    return {"hit_percent": round(100 * hits / asked, 1), "loads": loads}


def preloading(models: int = 40, days: int = 5, learned: int = 3, seeds: int = 3) -> list[dict[str, Any]]:
    """Models of 16 to 145 GB over budgets that hold some of them; the first `learned` days are not counted."""
    rows = []
    for share in (0.1, 0.2, 0.4):
        for seed in range(seeds):
            rng = random.Random(100 + seed)
            sizes = {str(n): int(rng.choice([16, 16, 28, 67, 145]) * GB) for n in range(models)}
            budget = int(share * sum(sizes.values()))
            requests = trace(models, days, seed)
            row: dict[str, Any] = {"budget_percent": round(100 * share), "seed": seed}
            for name in ("lru", "predicted"):
                found = hit_rate(requests, sizes, budget, name == "predicted", learned * DAY)
                row |= {f"{name}_{what}": value for what, value in found.items()}
            rows.append(row)
    return rows


# ---- the report -----------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    cells = [names] + [[str(row[name]) for name in names] for row in rows]
    widths = [max(len(line[n]) for line in cells) for n in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale_simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale_simulation.json")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m bench.scale_simulation " + " ".join(sys.argv[1:] if argv is None else argv),
        "links": {
            "hccs_gb_s": HCCS / GB,
            "roce_gb_s": ROCE / GB,
            "pcie_gb_s": {"port": PCIE_PORT / GB, "switch of two": PCIE_SWITCH / GB, "host": PCIE_HOST / GB},
            "ssd_gb_s": {"reader": SSD_READER / GB, "host": SSD_HOST / GB},
            "init_s": INIT,
            "roce_setup_s": ROCE_SETUP,
            "connect_s": CONNECT,
        },
    }
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "figure_10": ("One TE's weights, seconds", figure_10),
        "figure_11": ("8B over HCCS, one source to many, seconds", figure_11),
        "growth": ("From one TE to many, seconds", growth),
        "deaths": ("64 TEs, some of which die before all are there, seconds", lambda: with_deaths(0.1)),
        "burst": ("Load times ten for 60 s, 8B", burst),
        "preload": ("Requests that found the weights in memory", preloading),
    }
    for name, (title, part) in parts.items():
        result[name] = part()
        rows = result[name]["rows"] if isinstance(result[name], dict) else result[name]
        print(f"\n{title}\n{table(rows)}")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
