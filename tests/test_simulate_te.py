"""The simulated TE beside the engine's own batch, whose steps are given the same costs: every token at the same moment."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.devices import StepOutput
from engine.rtc import RTC
from engine.sequence import Plan
from engine.sequence import share as engine_share
from engine.types import Sample, SamplingParams, Start, pack_ids, split_sequence_id
from sched.costs import Costs
from sched.simulate import predicted
from sched.simulate_te import TE, Job, Spec, run_seconds, share, steps_by
from sched.traces import Arrival, keys_of

COSTS = Costs(p0=0.01, p1=1e-3, p2=2e-6, p3=3e-6, d0=0.02, d1=1e-3, d2=1e-5, chunk=64)
BLOCK = 8


class Played:
    """Drives one TE, or a pair of a prefill and a decode TE, and notes when what came."""

    def __init__(self, costs: Costs, spec: Spec, roles: Sequence[str] = ("colocated",), carry: float = 0.0):
        self.tes = [TE(n, role, costs, spec, self) for n, role in enumerate(roles)]
        self.spec, self.carry = spec, carry
        self.due: list[tuple[float, int, object, object]] = []
        self.orders = itertools.count()
        self.versions = dict.fromkeys(range(len(roles)), 0)
        self.first: dict[int, float] = {}
        self.end: dict[int, float] = {}
        self.cached: dict[int, int] = {}
        self.known: dict[int, set[bytes]] = {n: set() for n in range(len(roles))}

    def at(self, when, what) -> None:
        heapq.heappush(self.due, (when, next(self.orders), None, what))

    def wake(self, te, when) -> None:
        self.versions[te.number] += 1
        heapq.heappush(self.due, (when, next(self.orders), self.versions[te.number], te))

    def reserved(self, te, job, now) -> None:
        self.at(now, lambda when: job.prefill.give(job, when))

    def first_token(self, te, job, now) -> None:
        job.first = self.first[job.number] = now
        if job.decode is not te and te.lender is None:
            self.at(now + self.carry, lambda when: self.carried(te, job, when))
        elif job.decode is not te:
            self.at(now, lambda when: job.decode.join(job, when))

    def carried(self, te, job, now) -> None:
        te.let_go(job)
        te.stir(now)
        job.decode.join(job, now)

    def ended(self, te, job, now) -> None:
        assert job.number not in self.end
        self.end[job.number], self.cached[job.number] = now, job.cached

    def changed(self, te) -> None: ...

    def news(self, te, stored, evicted) -> None:
        known = self.known[te.number]
        assert not known.intersection(stored) and known.issuperset(evicted), "told twice, or never"
        known.update(stored)
        known.difference_update(evicted)
        assert known == te.refs.keys() | te.idle.keys()

    def run(self, arrivals: Sequence[Arrival]) -> None:
        for number, arrival in enumerate(arrivals):
            keys = keys_of(arrival.spans, arrival.prompt + arrival.output - 1, self.spec.block)
            job = Job(number, arrival, predicted(arrival.output, random.Random(0)), keys, BLOCK)
            self.at(arrival.at, lambda when, job=job: self.give(job, when))
        while self.due:
            now, _, version, who = heapq.heappop(self.due)
            if version is None:
                who(now)
            elif version == self.versions[who.number]:
                who.boundary(now)
            self.check()

    def give(self, job, now) -> None:
        job.prefill, job.decode = self.tes[0], self.tes[-1]
        job.decode.give(job, now, expected=len(self.tes) > 1)

    def check(self) -> None:
        for te in self.tes:
            assert len(te.seated) <= self.spec.seats
            if not te.expected:  # what is reserved for others can't be taken by those who grow
                assert te.used + len(te.idle) * self.spec.block <= self.spec.kv_tokens + self.spec.block * len(te.seated)
            assert te.decoding >= 0 and not te.refs.keys() & te.idle.keys()

    def done(self) -> None:
        """Nothing is left behind."""
        for te in self.tes:
            assert not te.seated and not te.waiting and not te.prefills and not te.refs and not te.expected and not te.joining
            assert te.decoding == 0 and te.kv_read == 0 and te.used == pytest.approx(0, abs=1e-6)


def token(spans, at: int) -> int:
    """The id at a place of a text."""
    source = next((source for source, end in spans if at < end), spans[-1][0] if spans else 0)
    return source * 4099 + at


def engine_times(arrivals: Sequence[Arrival], spec: Spec, overlapped: bool):
    """When the engine's own batch has each request's first and last token, and what it found cached, with steps that take what
    the costs say."""
    rtc = RTC(spec.kv_tokens // BLOCK, BLOCK, True)
    batch = Batch(rtc, max_seqs=spec.seats, max_tokens=COSTS.chunk, max_len=4096)
    first: dict[int, float] = {}
    end: dict[int, float] = {}
    coming = list(enumerate(arrivals))
    cached: dict[int, int] = {}
    ahead: tuple[Plan, float] | None = None
    now = busy_until = 0.0

    def seconds(plan: Plan) -> float:
        prompts = [w for w in plan if not (w.count == 1 and w.start >= w.seq.prompt)]
        decodes = [w for w in plan if w not in prompts]
        base = COSTS.p0 if prompts else COSTS.d0
        chunks = sum((COSTS.p1 + COSTS.p2 * w.count + COSTS.p3 * w.start) * w.count for w in prompts)
        return base + chunks + COSTS.d1 * len(decodes) + COSTS.d2 * sum(w.start for w in decodes)

    def finish(plan: Plan, at: float) -> None:
        rows = [w for w in plan if w.sample]
        ids = [token(arrivals[split_sequence_id(w.seq.id)[0]].spans, w.start + w.count) for w in rows]
        batch.apply(plan, StepOutput(np.array(ids, np.int32), None, None))
        report = batch.take_report()
        for seq, ended in zip(report.seqs, report.finish, strict=True) if report is not None else ():
            task, _ = split_sequence_id(seq)
            first.setdefault(task, at)
            if ended:
                end[task] = at
        for done in (report.prompts or []) if report is not None else ():
            cached.setdefault(split_sequence_id(done.seq)[0], done.cached)

    while coming or ahead is not None or batch.has_work():
        if ahead is None and not batch.has_work():
            now = max(now, coming[0][1].at)
        while coming and coming[0][1].at <= now:
            task, arrival = coming.pop(0)
            ids = [token(arrival.spans, n) for n in range(arrival.prompt)]
            params = SamplingParams(max_tokens=arrival.output)
            key = b"" if arrival.spans else task.to_bytes(4, "little")
            batch.start(Start(task, pack_ids(ids), [Sample(0, b"", 0)], params, arrival.output, [], key, arrival.priority))
        plan = batch.plan()
        if not overlapped:
            now += seconds(plan) if plan else 0.0
            if plan:
                finish(plan, now)
            continue
        launched = None
        if plan:
            busy_until = max(now, busy_until) + seconds(plan)
            launched = plan, busy_until
        if ahead is not None:
            now = ahead[1]
            finish(*ahead)
        ahead = launched
    return first, end, cached


def some_arrivals(rng: random.Random, count: int, gap: float) -> list[Arrival]:
    at, out = 0.0, []
    for _ in range(count):
        at += rng.expovariate(1 / gap)
        out.append(Arrival(at, rng.randint(1, 200), rng.randint(1, 60), priority=rng.choice([0, 0, 0, 1])))
    return out


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("gap", [0.02, 0.2, 1.0])
def test_every_token_comes_when_the_engine_says(overlapped, gap):
    for seed in range(4):
        arrivals = some_arrivals(random.Random(seed), 40, gap)
        spec = Spec(seats=64, block=BLOCK, kv_tokens=1 << 15, overlapped=overlapped)
        played = Played(COSTS, spec)
        played.run(arrivals)
        played.done()
        first, end, _ = engine_times(arrivals, spec, overlapped)
        assert played.first == pytest.approx(first)
        assert played.end == pytest.approx(end)


def test_seats_that_are_taken():
    """The plain loop: in the other one the engine sees a seat one step after it is free."""
    arrivals = some_arrivals(random.Random(3), 50, 0.05)
    spec = Spec(seats=4, block=BLOCK, kv_tokens=1 << 15, overlapped=False)
    played = Played(COSTS, spec)
    played.run(arrivals)
    first, end, _ = engine_times(arrivals, spec, False)
    assert played.first == pytest.approx(first) and played.end == pytest.approx(end)


@pytest.mark.parametrize("overlapped", [False, True])
def test_what_was_said_is_found_again(overlapped):
    rng = random.Random(5)
    arrivals, at = [], 0.0
    tokens = dict.fromkeys(range(1, 6), 0)
    for _ in range(40):
        at += 6.0  # the one before is over
        who = rng.choice(list(tokens))
        prompt, output = tokens[who] + rng.randint(1, 40), rng.randint(1, 30)
        arrivals.append(Arrival(at, prompt, output, ((who, 1 << 20),)))
        tokens[who] = prompt + output
    spec = Spec(seats=8, block=BLOCK, kv_tokens=1 << 14, overlapped=overlapped)
    played = Played(COSTS, spec)
    played.run(arrivals)
    first, end, cached = engine_times(arrivals, spec, overlapped)
    assert played.cached == cached and sum(cached.values()) > 1000
    assert played.first == pytest.approx(first) and played.end == pytest.approx(end)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["one", "pair", "semi"]))
def test_random_walks_leave_nothing_behind(seed, overlapped, kind):
    """Little KV: sequences are preempted, blocks given up, and everything ends all the same."""
    rng = random.Random(seed)
    arrivals = []
    for arrival in some_arrivals(rng, 40, 0.1):
        spans = ((rng.randint(1, 3), rng.randint(1, 60)), (rng.randint(4, 8), 1 << 20))
        arrivals.append(Arrival(arrival.at, arrival.prompt, max(2, arrival.output), spans))
    spec = Spec(seats=6, block=BLOCK, kv_tokens=500, overlapped=overlapped)
    roles = {"one": ("colocated",), "pair": ("prefill", "decode"), "semi": ("semi", "semi")}[kind]
    played = Played(COSTS, spec, roles, carry=0.05)
    if kind == "semi":
        prefill, owner = played.tes
        prefill.lender, prefill.partner, owner.partner = owner, owner, prefill
    played.run(arrivals)
    played.done()
    assert played.end.keys() == set(range(40))
    assert all(played.end[n] >= played.first[n] >= arrivals[n].at for n in range(40))


def test_preempted_sequences_compute_again_and_end():
    arrivals = [Arrival(0.0, 100, 150), Arrival(0.0, 100, 150), Arrival(0.0, 100, 150)]
    played = Played(COSTS, Spec(seats=8, block=BLOCK, kv_tokens=560, overlapped=False))
    played.run(arrivals)
    played.done()
    assert played.tes[0].preemptions > 0
    assert played.end[0] < played.end[2], "the newest gave way"


def test_workers_of_a_semi_pair_slow_each_other_down_only_while_both_compute():
    spec = Spec(seats=8, block=BLOCK, kv_tokens=1 << 14, overlapped=False)

    def ends(arrivals):
        played = Played(COSTS, spec, ("semi", "semi"))
        prefill, owner = played.tes
        prefill.lender, prefill.partner, owner.partner = owner, owner, prefill
        played.run(arrivals)
        return played.end

    alone = ends([Arrival(0.0, 20, 100)])[0]
    beside = ends([Arrival(0.0, 20, 100), Arrival(0.5, 200, 1 + 1)])[0]
    whole = Played(COSTS, spec)
    whole.run([Arrival(0.0, 20, 100)])
    assert alone == pytest.approx(whole.end[0]), "by itself a worker has all of the device"
    assert alone < beside < alone + 2 * COSTS.prefill(200.0) + 0.3


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 2)), min_size=1, max_size=12), st.integers(1, 700), st.randoms())
def test_share_is_the_engines(wants, budget, rng):
    class Fake:
        def __init__(self, want, order):
            self.target, self.done, self.scores, self.order = want, 0, None, order

    came = rng.sample(range(100), len(wants))
    jobs = sorted((priority, order, left) for (left, priority), order in zip(wants, came, strict=True))
    fakes = [Fake(left, (priority, order)) for priority, order, left in jobs]
    given_out = dict(zip(map(id, fakes), [0] * len(fakes), strict=True))
    given_out |= {id(fake): count for fake, count in engine_share(fakes, budget)}
    assert share(jobs, budget) == list(given_out.values())


@given(st.floats(1e-4, 1.0), st.floats(0, 1e-2), st.integers(1, 10_000))
def test_steps_by_is_the_inverse_of_run_seconds(first, more, steps):
    seconds = run_seconds(steps, first, more)
    assert steps_by(seconds, first, more) == steps
    assert steps_by(seconds * (1 + 1e-6) + 1e-6 * first, first, more) in (steps, steps + 1)
    assert run_seconds(steps_by(seconds * 0.7, first, more), first, more) >= seconds * 0.7 * (1 - 1e-6)
