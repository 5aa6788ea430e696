"""A cluster that nobody here has, in virtual time: the server's own decisions about simulated TEs.

Which TE a request goes to (`sched.policy`), what the scheduler knows of TEs and prompts (`View`, `PromptTree`, `HeatMap`,
`Learner`), who is let in and is next (`sched.admission`, `sched.fairness`) and how many TEs there are (`scale.autoscale`) are the
objects that the server uses. What is simulated is the rest: TEs (`sched.simulate_te`), and the users (`sched.traces`).

Not modelled: the time that messages, tokenising and deciding take; that news of TEs is some milliseconds old; what KV moves cost
those who compute meanwhile; TEs that die; DRAM and SSD tiers. Answers' lengths are predicted as often as the paper's predictor
gets them right. What an answer costs its key is charged when it begins, as predicted, and put right at its end.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Literal

import msgspec
import numpy as np

from engine.config import Role
from engine.types import UserError
from scale.autoscale import Bounds, Memory, Resident, Signals, decide, leaving
from sched.admission import Claim, Quota, Refusal, queue_is_full
from sched.baselines import Chance, RoundRobin, least_loaded, prefix_only
from sched.costs import Costs, Learner
from sched.fairness import OUTPUT, Flow, Line, Room, beyond_share, takes
from sched.heatmap import HeatMap, Kind, MapData
from sched.policy import Ask, Choice, Expected, Pick, choose
from sched.predict import BUCKET
from sched.prompt_tree import PromptTree
from sched.simulate_te import TE, Job, Spec
from sched.tenants import Tenant
from sched.traces import Arrival, keys_of
from sched.view import View

Policy = Literal["round_robin", "random", "least_loaded", "prefix_only", "paper", "cost"]
POLICIES: tuple[Policy, ...] = ("round_robin", "random", "least_loaded", "prefix_only", "paper", "cost")

# The paper's predictor tells the right bucket of 128 tokens so often; else, here, one beside it.
PREDICTED_RIGHT = 0.849
LOOK = 0.5  # seconds between two looks of the autoscaler, as in sched/deployment.py

# ---- the cluster --------------------------------------------------------------------------------------------------------


def roles_of(mix: str, tes: int | None) -> list[tuple[Role, int]]:
    """(role, lender) of each TE. `mix` is such as 2c+1p1d, 4c, 3p2d or 1c+2s: colocated TEs, prefill TEs, decode TEs, semi pairs
    (two TEs each). It is repeated until there are `tes`. Raises `UserError`."""
    parts = mix.split("+")
    if not mix or not all(re.fullmatch(r"(\d+[cpds])+", part) for part in parts):
        raise UserError(f"--roles {mix}: write counts of c, p, d and s (semi pairs), such as 2c+1p1d or 4c", "roles")
    counts = dict.fromkeys("cpds", 0)
    for count, letter in re.findall(r"(\d+)([cpds])", mix):
        counts[letter] += int(count)
    if bool(counts["p"]) != bool(counts["d"]):
        raise UserError(f"--roles {mix}: prefill and decode TEs need each other, for example 1p1d", "roles")
    made: dict[str, list[tuple[Role, bool]]] = {
        "c": [("colocated", False)],
        "p": [("prefill", False)],
        "d": [("decode", False)],
        "s": [("semi", False), ("semi", True)],
    }
    once = [te for letter, tes_of_it in made.items() for te in tes_of_it * counts[letter]]
    if not once:
        raise UserError(f"--roles {mix}: there is no TE in it; use 1c", "roles")
    times, rest = divmod(len(once) if tes is None else tes, len(once))
    if rest or not times:
        fits = max(1, round((tes or 0) / len(once))) * len(once)
        raise UserError(f"--tes {tes}: --roles {mix} are {len(once)} TEs, and whole times that; use {fits}", "tes")
    return [(role, at - 1 if borrows else -1) for at, (role, borrows) in enumerate(once * times)]


class Slo(msgspec.Struct, frozen=True):
    """Seconds; what a request must keep to count as good."""

    ttft: float
    tpot: float


class Scaling(msgspec.Struct, frozen=True):
    """Colocated TEs come and go."""

    bounds: Bounds
    startup: float  # seconds until a new TE takes tasks


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated, but for the load and the policy."""

    roles: Sequence[tuple[Role, int]]
    costs: Costs
    spec: Spec = Spec()
    slo: Slo | None = None
    promised: bool = True  # the policy knows of `slo`
    scaling: Scaling | None = None
    tenants: Mapping[str, Tenant] = {}  # by the names of their keys; a key that isn't there has no limits
    max_queued: int | None = None  # sequences beyond the TEs' seats; None: any number


def predicted(output: int, rng: Random) -> Expected:
    """Of an answer that will have so many tokens."""
    bucket = (output - 1) // BUCKET
    if rng.random() > PREDICTED_RIGHT:
        bucket += 1 if bucket == 0 or rng.random() < 0.5 else -1
    return Expected((bucket + 0.5) * BUCKET, bucket * BUCKET + 1, (bucket + 1) * BUCKET, PREDICTED_RIGHT)


# ---- the run ------------------------------------------------------------------------------------------------------------


class Simulation:
    """One policy, one trace. `run` once."""

    def __init__(self, cluster: Cluster, policy: Policy, heat: HeatMap, seed: int = 0):
        self.cluster, self.heat = cluster, heat
        self.view = View()
        self.tree = PromptTree(cluster.spec.block)
        self.learner = Learner(cluster.costs)
        self.pick = self.picker(policy, seed)
        self.rng = Random(seed)
        self.tes: dict[int, TE] = {}
        self.events: list[
            tuple[float, int, int, TE | Callable[[float], None]]
        ] = []  # (when, order, version of its TE's run, who)
        self.orders = itertools.count()
        self.versions: dict[int, int] = {}  # TE -> of its newest wish to be woken
        self.held: Line[Job] = Line()  # nothing takes them now
        self.quotas: dict[str, Quota] = {}
        self.claims: dict[Job, Claim] = {}
        self.mine: Counter[tuple[int, str]] = Counter()  # (TE, key) -> its sequences there
        self.mine_unread: Counter[tuple[int, str]] = Counter()  # ... and prompt tokens that are not computed
        self.jobs = 0  # given a number
        self.live = 0
        self.over = False  # the trace
        self.done = Done()
        self.memory = Memory()
        self.starting: set[int] = set()
        self.draining: set[int] = set()
        self.looked = Looked()
        self.te_seconds = 0.0  # of TEs that were there
        self.counted = 0.0  # ... up to then
        for number, (role, lender) in enumerate(cluster.roles):
            self.add(number, role, lender)

    def picker(self, policy: Policy, seed: int) -> Pick:
        if policy in ("paper", "cost"):
            return lambda ask, view, tree: choose(ask, view, tree, self.heat, self.learner.costs, policy)
        baselines: dict[str, Pick] = {
            "round_robin": RoundRobin(),
            "random": Chance(seed),
            "least_loaded": least_loaded,
            "prefix_only": prefix_only,
        }
        return baselines[policy]

    def add(self, number: int, role: Role, lender: int = -1) -> None:
        te = TE(number, role, self.cluster.costs, self.cluster.spec, self)
        spec = self.cluster.spec
        self.tes[number], self.versions[number] = te, 0
        if lender >= 0:
            owner = self.tes[lender]
            te.lender, te.partner, owner.partner = owner, owner, te
        self.view.add(number, role, lender, kv_total=spec.kv_tokens, seats=spec.seats)

    # ---- the clock ----
    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (when, next(self.orders), -1, what))

    def wake(self, te: TE, when: float) -> None:
        version = self.versions[te.number] + 1
        self.versions[te.number] = version
        heapq.heappush(self.events, (when, next(self.orders), version, te))

    def run(self, trace: Iterable[Arrival]) -> Done:
        """Everything that the trace asks for, to the end."""
        events, versions = self.events, self.versions
        if self.cluster.scaling is not None:
            self.at(0.0, self.look)
        now = 0.0
        for arrival in trace:
            while events and events[0][0] <= arrival.at:
                now, _, version, who = heapq.heappop(events)
                if not isinstance(who, TE):
                    who(now)
                elif version == versions.get(who.number):
                    who.boundary(now)
            now = arrival.at
            self.arrive(arrival)
        self.over = True
        while self.live:
            now, _, version, who = heapq.heappop(events)
            if not isinstance(who, TE):
                who(now)
            elif version == versions.get(who.number):
                who.boundary(now)
        self.count_tes(now)
        self.done.seconds = now
        self.done.busy = sum(te.busy_seconds for te in self.tes.values()) / max(self.te_seconds, 1e-9)
        self.done.preemptions = sum(te.preemptions for te in self.tes.values())
        return self.done

    # ---- requests ----
    def arrive(self, arrival: Arrival) -> None:
        spec = self.cluster.spec
        self.jobs += 1
        if arrival.prompt + arrival.output + spec.block > spec.kv_tokens:
            self.done.refused[arrival.key, "length"] += 1
            return
        most = self.cluster.max_queued
        if most is not None and queue_is_full(self.live, 1, len(self.tes), spec.seats, most):
            self.done.refused[arrival.key, "queue"] += 1
            return
        tenant = self.cluster.tenants.get(arrival.key) or Tenant(name=arrival.key)
        quota = self.quotas.get(tenant.name)
        if quota is None:
            quota = self.quotas[tenant.name] = Quota(tenant.rpm, tenant.tpm, arrival.at)
        claim = quota.claim(arrival.prompt, None, 1, arrival.at)
        if isinstance(claim, Refusal):
            self.done.refused[arrival.key, claim.cause] += 1
            return
        keys = keys_of(arrival.spans, arrival.prompt + arrival.output - 1, spec.block) if arrival.spans else []
        job = Job(self.jobs, arrival, predicted(arrival.output, self.rng), keys, spec.block)
        self.live += 1
        self.claims[job] = claim
        self.held.add(job, self.held.flow(tenant), arrival.priority, arrival.at)
        self.place(arrival.at)

    def place(self, now: float) -> None:
        """Give those who wait to TEs, while there are any that take them."""
        while any(self.placed(job, now) for job in self.held.heads(now)):
            pass

    def placed(self, job: Job, now: float) -> bool:
        flow, view = self.held.owner[job], self.view
        several = self.held.others(flow, now)
        share = self.held.share(flow, now) if several else 1.0
        full = [te for te in self.tes if not takes(self.room(te, flow, share), 1)] if several else []
        for te in full:
            view.update(te, takes=False)
        choice = self.pick(self.ask(job, now), view, self.tree)
        for te in full:
            view.update(te, takes=te not in self.draining)
        if choice is None:
            return False
        if several:  # what is within a key's share goes first on the TE too
            job.priority = int(beyond_share(self.room(choice.prefill, flow, share), 1))
        self.held.sent(job, job.arrival.prompt - choice.cached_tokens, now)
        self.dispatch(job, choice, now)
        return True

    def room(self, number: int, flow: Flow[Job], share: float) -> Room:
        spec, te, slot = self.cluster.spec, self.tes[number], self.view.slots[number]
        name = flow.tenant.name
        return Room(
            seats=spec.seats,
            taken=int(self.view.sequences[slot]),
            mine=self.mine[number, name],
            budget=self.cluster.costs.chunk,
            unread=int(self.view.queued_tokens[slot]),
            mine_unread=self.mine_unread[number, name],
            blocks=spec.kv_tokens // spec.block,
            blocks_used=int(te.used / spec.block),
            share=share,
        )

    def ask(self, job: Job, now: float) -> Ask:
        slo = self.cluster.slo if self.cluster.promised else None
        arrival = job.arrival
        return Ask(
            prompt_tokens=arrival.prompt,
            answer=job.answer,
            keys=job.prompt_keys,
            ttft_slo=slo.ttft - (now - arrival.at) if slo is not None else None,
            tpot_slo=slo.tpot if slo is not None else None,
        )

    def dispatch(self, job: Job, choice: Choice, now: float) -> None:
        prefill, decode = self.tes[choice.prefill], self.tes[choice.decode]
        job.prefill, job.decode, view = prefill, decode, self.view
        job.charged = job.arrival.prompt - choice.cached_tokens
        last = float(job.number)
        at, to = view.slots[prefill.number], view.slots[decode.number]
        view.update(prefill.number, queued_tokens=view.queued_tokens[at] + job.charged, last=last)
        view.update(decode.number, sequences=view.sequences[to] + 1.0, last=last)
        self.mine[decode.number, job.arrival.key] += 1
        self.mine_unread[prefill.number, job.arrival.key] += job.charged
        if prefill is decode:
            decode.give(job, now)
        else:
            decode.give(job, now, expected=True)

    # ---- what TEs tell ----
    def reserved(self, te: TE, job: Job, now: float) -> None:
        assert job.prefill is not None
        # After what goes on now: it may be a TE whose own step is just being looked at.
        self.at(now, lambda when: job.prefill.give(job, when) if job.prefill is not None else None)

    def first_token(self, te: TE, job: Job, now: float) -> None:
        job.first = now
        self.looked.first(now - job.arrival.at, self.cluster.slo)
        view = self.view
        self.mine_unread[te.number, job.arrival.key] -= job.charged
        self.held.flows[job.arrival.key].charge(OUTPUT * job.answer.mean)
        if te.number in view.slots:
            view.update(te.number, queued_tokens=view.queued_tokens[view.slots[te.number]] - job.charged)
        decode = job.decode
        assert decode is not None
        if decode is te:
            return
        if job.arrival.output == 1:
            self.at(now, lambda when: self.through(te, decode, job, when))
        elif te.lender is decode:
            self.at(now, lambda when: decode.join(job, when))
        else:
            carried = job.arrival.prompt - job.held[decode.number] * self.cluster.spec.block
            self.at(now + self.cluster.costs.transfer(float(carried)), lambda when: self.carried(te, decode, job, when))

    def carried(self, te: TE, decode: TE, job: Job, now: float) -> None:
        te.let_go(job)
        te.stir(now)
        decode.join(job, now)

    def through(self, te: TE, decode: TE, job: Job, now: float) -> None:
        """Its only token came from the prefill TE."""
        if te.lender is None:
            te.let_go(job)
            te.stir(now)
        decode.let_go(job)
        decode.stir(now)
        self.ended(decode, job, now)

    def ended(self, te: TE, job: Job, now: float) -> None:
        arrival, view = job.arrival, self.view
        self.live -= 1
        if te.number in view.slots:
            view.update(
                te.number,
                sequences=view.sequences[view.slots[te.number]] - 1.0,
                running=float(te.decoding),
                kv_used=te.kv_read,
            )
        self.learner.ended(arrival.prompt, arrival.output, job.cached, view.crowd)
        self.mine[te.number, arrival.key] -= 1
        self.quotas[arrival.key].settle(self.claims.pop(job), arrival.output, 1, now)
        self.held.flows[arrival.key].charge(OUTPUT * (arrival.output - job.answer.mean))
        done = self.done
        done.key.append(arrival.key)
        done.at.append(arrival.at)
        done.prompt.append(arrival.prompt)
        done.output.append(arrival.output)
        done.ttft.append(job.first - arrival.at)
        done.jct.append(now - arrival.at)
        done.tpot.append((now - job.first) / (arrival.output - 1) if arrival.output > 1 else 0.0)
        done.cached.append(job.cached)
        done.split.append(job.prefill is not job.decode)
        self.looked.tokens(done.tpot[-1], arrival.output - 1, self.cluster.slo)
        if te.number in self.draining and not te.seated and not te.waiting:
            self.remove(te, now)
        if self.held:
            self.at(now, self.place)

    def news(self, te: TE, stored: Sequence[bytes], evicted: Sequence[bytes]) -> None:
        if te.number in self.view.slots:
            if stored:
                self.tree.stored(te.number, stored)
            if evicted:
                self.tree.evicted(te.number, evicted)

    def changed(self, te: TE) -> None:
        if te.number in self.view.slots:
            self.view.update(te.number, running=float(te.decoding), kv_used=te.kv_read)

    # ---- how many TEs ----
    def look(self, now: float) -> None:
        """The autoscaler's."""
        scaling = self.cluster.scaling
        assert scaling is not None
        if self.live or not self.over:
            self.at(now + LOOK, self.look)
        staying = [te for n, te in self.tes.items() if n not in self.draining]
        running = sum(len(te.seated) for te in staying)
        waiting = len(self.held) + sum(len(te.waiting) for te in staying)
        wait = 0.0
        if staying:
            queued = sum(job.left or job.known for te in staying for _, _, job in te.waiting)
            wait = self.cluster.costs.prefill(max(1.0, queued / len(staying)))
        signals = self.looked.signals(now, len(staying), len(self.starting), waiting, running, self.cluster.spec, staying, wait)
        self.looked = Looked(self.looked.last)
        decision = decide(signals, scaling.bounds, self.memory)
        self.memory = decision.memory
        self.done.targets.append((now, decision.target, len(staying)))
        there = len(staying) + len(self.starting)
        for _ in range(decision.target - there):
            number = max((*self.tes, *self.starting), default=-1) + 1
            self.starting.add(number)
            self.at(now + scaling.startup, partial(self.started, number))
        if decision.target < there:
            residents = [Resident(te.number, len(te.seated) + len(te.waiting)) for te in staying]
            for number in leaving(residents, min(there - decision.target, len(staying) - 1)):
                self.drain(self.tes[number], now)

    def started(self, number: int, now: float) -> None:
        self.count_tes(now)
        self.starting.discard(number)
        self.add(number, "colocated")
        self.place(now)

    def drain(self, te: TE, now: float) -> None:
        """It finishes what it has. Those who wait for a seat there are not moved."""
        self.view.update(te.number, takes=False)
        self.draining.add(te.number)
        if not te.seated and not te.waiting:
            self.remove(te, now)

    def remove(self, te: TE, now: float) -> None:
        self.count_tes(now)
        self.draining.discard(te.number)
        self.view.remove(te.number)
        self.tree.gone(te.number)
        del self.tes[te.number], self.versions[te.number]

    def count_tes(self, now: float) -> None:
        self.te_seconds += len(self.tes) * (now - self.counted)
        self.counted = now


class Looked:
    """What the autoscaler is told of since its last look."""

    def __init__(self, last: float = 0.0):
        self.last = last  # seconds: when a request came or ended last
        self.counts = [0, 0, 0, 0]  # TTFT misses and total, TPOT misses and total

    def first(self, seconds: float, slo: Slo | None) -> None:
        self.counts[0] += slo is not None and seconds > slo.ttft
        self.counts[1] += 1

    def tokens(self, tpot: float, count: int, slo: Slo | None) -> None:
        self.counts[2] += count if slo is not None and tpot > slo.tpot else 0
        self.counts[3] += count

    def signals(
        self, now: float, ready: int, starting: int, queued: int, running: int, spec: Spec, tes: Sequence[TE], wait: float
    ) -> Signals:
        if queued or running:
            self.last = now
        return Signals(
            now=now,
            ready=ready,
            starting=starting,
            queued=queued,
            running=running,
            slots=spec.seats,
            predicted_wait_s=wait,
            kv_usage=sum(te.used for te in tes) / (spec.kv_tokens * len(tes)) if tes else 0.0,
            ttft_misses=self.counts[0],
            ttft_total=self.counts[1],
            tpot_misses=self.counts[2],
            tpot_total=self.counts[3],
            idle_s=now - self.last,
        )


# ---- what came of it ----------------------------------------------------------------------------------------------------


class Done:
    """Columns, a request each, in the order in which they ended. Seconds and tokens."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.ttft: list[float] = []
        self.tpot: list[float] = []  # 0 where there was one token only
        self.jct: list[float] = []
        self.prompt: list[int] = []
        self.output: list[int] = []
        self.cached: list[int] = []  # tokens of the prompt
        self.split: list[bool] = []  # two TEs had it
        self.key: list[str] = []
        self.refused: Counter[tuple[str, str]] = Counter()  # (key, why) -> requests that were not let in
        self.targets: list[tuple[float, int, int]] = []  # the autoscaler's: when, how many there should be, how many there were
        self.seconds = 0.0  # when the last one ended
        self.busy = 0.0  # of the TEs' time, the part in which they computed
        self.preemptions = 0


class Figures(msgspec.Struct, frozen=True):
    """Of the requests that came between two moments. Milliseconds, but for what is named otherwise."""

    requests: int
    rate: float  # requests a second
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float
    jct_mean: float
    jct_p99: float
    good: float  # the part of all requests that kept both promises; 1 where there are none
    cached: float  # the part of prompt tokens that was found
    split: float  # the part of requests that two TEs had


def figures(done: Done, since: float, until: float, slo: Slo | None, key: str | None = None) -> Figures:
    """`key`: of one key's requests alone. Raises `UserError` where there are none."""
    at = np.asarray(done.at)
    within = (at >= since) & (at < until)
    if key is not None:
        within &= np.asarray(done.key) == key
    if not within.any():
        raise UserError(f"no request came between {since:.0f} and {until:.0f} s; ask for more with --requests", "requests")
    ttft, tpot, jct = (1e3 * np.asarray(column)[within] for column in (done.ttft, done.tpot, done.jct))
    good = np.ones(len(ttft), bool) if slo is None else (ttft <= 1e3 * slo.ttft) & (tpot <= 1e3 * slo.tpot)
    several = np.asarray(done.output)[within] > 1
    spoken = tpot[several] if several.any() else np.zeros(1)
    return Figures(
        requests=len(ttft),
        rate=len(ttft) / (until - since),
        ttft_mean=float(ttft.mean()),
        ttft_p50=float(np.quantile(ttft, 0.5)),
        ttft_p99=float(np.quantile(ttft, 0.99)),
        tpot_mean=float(spoken.mean()),
        tpot_p99=float(np.quantile(spoken, 0.99)),
        jct_mean=float(jct.mean()),
        jct_p99=float(np.quantile(jct, 0.99)),
        good=float(good.mean()),
        cached=float(np.asarray(done.cached)[within].sum() / np.asarray(done.prompt)[within].sum()),
        split=float(np.asarray(done.split)[within].mean()),
    )


# ---- the heat map -------------------------------------------------------------------------------------------------------

# Requests of a batch, and sequences that share a step's base cost where a TE is said to be full.
BATCH, STREAMS = 100, 64


def heat_map(costs: Costs, spec: Spec, kinds: Sequence[Kind] = ("disaggregated",)) -> HeatMap:
    """The map as `deepserve.py profile` would measure it on such TEs: two of them, batches of equal requests at a fixed rate."""
    ways: dict[Kind, str] = {"colocated": "2c", "disaggregated": "1p1d", "semi": "2s"}
    heat = HeatMap(MapData(kinds=tuple(kinds)))
    for cell in heat.cells():
        if cell.prefill + cell.decode + spec.block > spec.kv_tokens:
            continue
        kv = cell.prefill + cell.decode / 2
        work = (costs.prefill(float(cell.prefill)) + cell.decode * costs.step(0, 0, STREAMS, STREAMS * kv) / STREAMS) / 2
        rng = np.random.default_rng(cell.point)
        times = np.cumsum(rng.exponential(work / cell.load, BATCH)).tolist()
        jct = {}
        for kind in ("colocated", *kinds):
            cluster = Cluster(roles=roles_of(ways[kind], None), costs=costs, spec=spec)
            simulation = Simulation(cluster, "least_loaded", heat)
            jct[kind] = simulation.run(Arrival(at, cell.prefill, cell.decode) for at in times).jct
        for kind in kinds:
            pairs = np.log(np.sort(jct["colocated"]) / np.sort(jct[kind]))
            ratio = float(np.log(np.sum(jct["colocated"]) / np.sum(jct[kind])))
            heat.add(kind, cell.point, ratio, float(pairs.var(ddof=1)) / len(pairs))
    heat.refit()
    return heat
