"""A simulated TE: what FlowServe's batch does, with steps that take what the costs say. Pure.

Steps are those of engine/batch.py: decodes first, then the rest of the token budget shared by the prompts. A step that computes
prompts is one event. Steps that only decode are one event for as long as nobody comes or ends, since what any number of them
takes is known: each is longer than the one before by the KV that the batch has grown by. So steps are as exact as the costs are,
and what a request costs the simulator doesn't depend on how long its answer is.

What differs from the engine: KV is counted in tokens, with half a block for each sequence's last one; blocks that two sequences
compute at once become one; a prompt doesn't wait for another that is computing its prefix; there are no slower tiers, and nobody
speculates.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import msgspec

from engine.config import Role
from sched.costs import Costs
from sched.policy import Length
from sched.traces import Arrival

# Of a semi pair whose workers are both busy: so many times as long as alone a step takes. They share what the device can do.
SHARED = 2.0
# Room that is reserved for a sequence whose prompt another TE computes: as in engine/batch.py.
SPARE_TOKENS = 32


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What each TE has."""

    seats: int = 256  # sequences at once
    block: int = 128  # tokens of a KV block
    kv_tokens: int = 1 << 20  # tokens of KV
    overlapped: bool = True  # the next step is planned while this one runs, so without who comes meanwhile


class Job:
    """A request on its way through one TE or two."""

    __slots__ = (
        "answer",
        "arrival",
        "cached",
        "charged",
        "context",
        "decode",
        "finish",
        "first",
        "had",
        "held",
        "keys",
        "known",
        "left",
        "number",
        "orders",
        "prefill",
        "priority",
        "private",
        "prompt_keys",
        "since",
    )

    def __init__(self, number: int, arrival: Arrival, answer: Length, keys: list[bytes], block: int):
        self.number = number
        self.arrival = arrival
        self.answer = answer  # as it is predicted
        self.priority = arrival.priority  # on a TE: smaller goes first
        self.keys = keys  # of the full blocks of prompt and answer; none where nobody else has the like
        self.prompt_keys = keys[: (arrival.prompt - 1) // block]  # one token is always left to compute
        self.known = arrival.prompt  # tokens that must be computed before the next one comes
        self.had = 0  # tokens of the answer, when that was last counted
        self.left = 0  # of `known`: to be computed
        self.context = 0  # ... computed, or found
        self.cached = 0  # tokens of the prompt that were found
        self.first = -1.0  # seconds: its first token
        self.finish = -1.0  # the TE's step that it ends with, while it decodes
        self.since = 0.0  # seconds: when the TE that it waits for heard of it
        # On each TE that it is on: its place in the order there, how many of its first blocks are such as others can find, and
        # tokens of KV that are its own.
        self.orders: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.private: dict[int, float] = {}
        self.prefill: TE | None = None
        self.decode: TE | None = None
        self.charged = 0  # prompt tokens that its prefill TE is thought to have to compute


class Owner(Protocol):
    """Whoever drives TEs hears of this."""

    def wake(self, te: TE, when: float) -> None:
        """Call `te.boundary` then, and forget what was asked before."""

    def reserved(self, te: TE, job: Job, now: float) -> None:
        """There is room for a job whose prompt another TE is to compute."""

    def first_token(self, te: TE, job: Job, now: float) -> None: ...

    def ended(self, te: TE, job: Job, now: float) -> None: ...

    def changed(self, te: TE) -> None:
        """Others decode there than before."""

    def news(self, te: TE, stored: Sequence[bytes], evicted: Sequence[bytes]) -> None:
        """Keys of the blocks that it has got, and lost."""


class TE:
    """Whoever owns it calls `boundary` when it asked to be woken, and `give`, `join` and `let_go` as jobs come and go."""

    def __init__(self, number: int, role: Role, costs: Costs, spec: Spec, owner: Owner):
        self.number, self.role, self.costs, self.spec, self.owner = number, role, costs, spec, owner
        self.lender: TE | None = None  # of a semi pair's prefill worker: the TE in whose KV pool it computes
        self.partner: TE | None = None  # of a semi pair's workers: the other one
        self.refs: dict[bytes, int] = {}  # prefix blocks that sequences hold
        self.idle: OrderedDict[bytes, None] = OrderedDict()  # prefix blocks that nobody holds, by last use
        self.used = 0.0  # tokens of KV that are held
        self.waiting: list[tuple[int, int, Job]] = []  # heap by priority and order
        self.order = 0
        self.seated: dict[int, Job] = {}  # by order
        self.expected: set[int] = set()  # of these, orders of those whose prompts are computed elsewhere, or have been
        self.joining: list[tuple[float, Job]] = []  # whose KV has come, and when
        self.prefills: list[Job] = []
        self.fresh: list[Job] = []  # of these, those who have a seat only since the last step began
        self.decoding = 0
        self.kv_read = 0.0  # tokens of KV that a decode step reads
        self.finishing: list[tuple[float, int, Job]] = []  # heap by the step that they end with; some entries are stale
        # The run of steps that goes on.
        self.steps = 0.0  # that were done before it
        self.count = 0  # steps in it; 0: idle
        self.begin = self.end = self.last_begin = 0.0  # seconds; of its last step
        self.first = self.more = 0.0  # seconds of its first step, and what each takes more than the one before
        self.chunks: list[tuple[Job, int]] = []  # of its only step, where that computes prompts
        self.busy_seconds = 0.0
        self.preemptions = 0

    # ---- what comes -------------------------------------------------------------------------------------------------
    def give(self, job: Job, now: float, expected: bool = False) -> None:
        """A job to run; `expected`: another TE computes its prompt."""
        self.order += 1
        job.orders[self.number] = self.order
        job.since = now
        if expected:
            self.expected.add(self.order)
        heapq.heappush(self.waiting, (job.priority, self.order, job))
        self.stir(now)

    def join(self, job: Job, now: float) -> None:
        """The KV of an expected job is here: it decodes."""
        self.joining.append((now, job))
        self.stir(now)

    def let_go(self, job: Job) -> None:
        """The TE that decodes it has its KV."""
        self.leave(job, job.orders[self.number])

    def stir(self, now: float) -> None:
        """Something is new: look at it after the step that runs, and after the one that is planned already."""
        if not self.count:
            self.boundary(now)
        elif self.count > 1:
            steps = steps_by(now - self.begin, self.first, self.more) + self.spec.overlapped
            if steps < self.count:
                self.run(steps)

    # ---- steps ------------------------------------------------------------------------------------------------------
    def boundary(self, now: float) -> None:
        """A run of steps is over, or there was none: take in what it brought, and begin the next."""
        was_busy = self.count > 0
        horizon = self.last_begin if was_busy and self.spec.overlapped else now  # what came later isn't in the next step
        if was_busy:
            self.reap(now)
        self.take_in(now, horizon)
        if not self.prefills and not self.decoding:
            self.take_in(now, now)  # no step was planned, so who came meanwhile is in the next one
        self.plan(now)
        self.owner.changed(self)
        if self.partner is not None and was_busy != (self.count > 0):
            self.partner.shared(now)

    def take_in(self, now: float, horizon: float) -> None:
        """Those who came up to `horizon`."""
        if self.joining:
            late = [entry for entry in self.joining if entry[0] > horizon]
            for when, job in self.joining:
                if when <= horizon:
                    self.arrived(job)
            self.joining = late
        if self.waiting:
            self.admit(now, horizon)

    def reap(self, now: float) -> None:
        """What the steps of a run have brought."""
        self.busy_seconds += now - self.begin
        self.steps += self.count
        grown = self.decoding * self.count
        self.kv_read += grown
        self.used += grown
        self.count = 0
        finishing = self.finishing
        while finishing and finishing[0][0] <= self.steps:
            finish, order, job = heapq.heappop(finishing)
            if job.finish == finish and self.seated.get(order) is job:
                self.finish(job, order, now)
        chunks, self.chunks = self.chunks, []
        for job, tokens in chunks:
            job.left -= tokens
            job.context += tokens
            if not job.left:
                self.computed(job, now)
        self.evict()

    def finish(self, job: Job, order: int, now: float) -> None:
        """Its last token has come."""
        arrival = job.arrival
        tokens = arrival.prompt + arrival.output - 1
        self.decoding -= 1
        self.kv_read -= tokens
        job.private[self.number] += arrival.output - job.had
        self.commit(job, tokens)
        self.leave(job, order)
        self.owner.ended(self, job, now)

    def computed(self, job: Job, now: float) -> None:
        """The last chunk of its prompt is done, and with it comes a token."""
        order = job.orders[self.number]
        self.prefills.remove(job)
        if self.lender is None:
            self.commit(job, job.known)
        if job.decode is not self:
            if self.lender is not None:
                del self.seated[order]  # nothing else of it is here
            else:
                self.expected.add(order)  # kept until the other TE has it
            self.owner.first_token(self, job, now)
            return
        job.had += 1
        if job.first < 0:
            self.owner.first_token(self, job, now)
        if job.had >= job.arrival.output:
            self.leave(job, order)
            self.owner.ended(self, job, now)
        else:
            self.decode(job, order)

    def arrived(self, job: Job) -> None:
        """An expected job's KV is here."""
        order = job.orders[self.number]
        self.expected.discard(order)
        job.had = 1
        self.commit(job, job.arrival.prompt)
        self.decode(job, order)

    def decode(self, job: Job, order: int) -> None:
        """It decodes from the next step on."""
        job.finish = self.steps + job.arrival.output - job.had
        self.decoding += 1
        self.kv_read += job.arrival.prompt + job.had - 1
        heapq.heappush(self.finishing, (job.finish, order, job))

    # ---- planning ---------------------------------------------------------------------------------------------------
    def admit(self, now: float, horizon: float) -> None:
        """Give seats and KV to those who wait, while there are any."""
        spec, waiting = self.spec, self.waiting
        later: list[tuple[int, int, Job]] = []
        while waiting and len(self.seated) < spec.seats:
            entry = heapq.heappop(waiting)
            _, order, job = entry
            if job.since > horizon:
                later.append(entry)
                continue
            if self.lender is not None:
                self.seated[order] = job
                job.context = job.cached = job.held[self.lender.number] * spec.block
                job.left = job.known - job.context
                self.compute(job)
                continue
            expected = order in self.expected
            hits = self.match(job)
            own = job.known + (SPARE_TOKENS if expected else 0) - hits * spec.block + spec.block / 2
            idle = sum(key in self.idle for key in job.keys[:hits])
            if self.used + own + (idle + len(self.seated)) * spec.block > spec.kv_tokens and self.seated:
                later.append(entry)
                break
            self.seated[order] = job
            self.hold(job, hits)
            job.private[self.number] = own
            self.used += own
            if expected:
                self.owner.reserved(self, job, now)
            else:
                job.context = hits * spec.block
                job.left = job.known - job.context
                if job.had == 0:
                    job.cached = job.context
                self.compute(job)
        for entry in later:
            heapq.heappush(waiting, entry)
        self.evict()

    def compute(self, job: Job) -> None:
        """Its prompt is to be computed: those who go first stand first."""
        prefills, place = self.prefills, (job.priority, job.orders[self.number])
        at = len(prefills)
        while at and (prefills[at - 1].priority, prefills[at - 1].orders[self.number]) > place:
            at -= 1
        prefills.insert(at, job)
        self.fresh.append(job)

    def plan(self, now: float) -> None:
        """Begin the next run of steps, where there is something to do."""
        if self.decoding and self.used + self.decoding > self.spec.kv_tokens:
            self.preempt()
        costs = self.costs
        slow = SHARED if self.partner is not None and self.partner.count else 1.0
        decodes = costs.d1 * self.decoding + costs.d2 * self.kv_read
        if self.prefills:
            seconds = costs.p0 + decodes
            for job, tokens in self.shared_out(costs.chunk - self.decoding):
                seconds += (costs.p1 + costs.p2 * tokens + costs.p3 * job.context) * tokens
            self.first, self.more, steps = seconds * slow, 0.0, 1
        elif self.decoding:
            self.first, self.more = (costs.d0 + decodes) * slow, costs.d2 * self.decoding * slow
            finishing = self.finishing
            while finishing[0][2].finish != finishing[0][0] or self.seated.get(finishing[0][1]) is not finishing[0][2]:
                heapq.heappop(finishing)
            steps = int(finishing[0][0] - self.steps)
            steps = min(steps, max(1, int((self.spec.kv_tokens - self.used) / self.decoding)))
            if self.joining or (self.waiting and self.too_late()):
                steps = 1
        else:
            return
        self.begin = now
        self.run(steps)

    def shared_out(self, budget: int) -> list[tuple[Job, int]]:
        """What the next step computes of each prompt. One token that is left is taken for a decode, and so goes first, but where
        its job has only now got its seat."""
        last = [job for job in self.prefills if job.left == 1 and job not in self.fresh]
        others = [job for job in self.prefills if job not in last] if last else self.prefills
        self.fresh.clear()
        self.chunks = [(job, 1) for job in last]
        if others:
            asked = [(job.priority, job.orders[self.number], job.left) for job in others]
            counts = share(asked, max(0, budget - len(last)))
            self.chunks += [(job, tokens) for job, tokens in zip(others, counts, strict=True) if tokens]
        return self.chunks

    def too_late(self) -> bool:
        """Whether somebody came after the step that now begins was planned. (Others wait for room, which comes at a boundary.)"""
        return self.spec.overlapped and any(job.since > self.last_begin for _, _, job in self.waiting)

    def run(self, steps: int) -> None:
        """The run that goes on has so many steps."""
        self.count = steps
        self.last_begin = self.begin + run_seconds(steps - 1, self.first, self.more)
        self.end = self.begin + run_seconds(steps, self.first, self.more)
        self.owner.wake(self, self.end)

    def shared(self, now: float) -> None:
        """The other worker of the pair has begun to compute, or ceased to. The step that runs is not changed by that."""
        if self.count > 1:
            steps = steps_by(now - self.begin, self.first, self.more)
            if steps < self.count:
                self.run(steps)

    # ---- KV ---------------------------------------------------------------------------------------------------------
    def match(self, job: Job) -> int:
        """How many of the first blocks of its prompt are here."""
        refs, idle = self.refs, self.idle
        for n, key in enumerate(job.prompt_keys):
            if key not in refs and key not in idle:
                return n
        return len(job.prompt_keys)

    def hold(self, job: Job, blocks: int) -> None:
        """The first blocks of its prompt, which are here, are its too."""
        refs, idle = self.refs, self.idle
        for key in job.keys[:blocks]:
            if key in refs:
                refs[key] += 1
            else:
                del idle[key]
                refs[key] = 1
                self.used += self.spec.block
        job.held[self.number] = blocks

    def commit(self, job: Job, tokens: int) -> None:
        """Its first `tokens` tokens are computed: others can find the full blocks of them."""
        had, blocks = job.held[self.number], min(tokens // self.spec.block, len(job.keys))
        if blocks <= had:
            return
        refs, idle, new = self.refs, self.idle, []
        for key in job.keys[had:blocks]:
            if key in refs:
                refs[key] += 1
                self.used -= self.spec.block
                continue
            if key in idle:
                del idle[key]
            else:
                new.append(key)
            refs[key] = 1
        job.held[self.number] = blocks
        job.private[self.number] -= (blocks - had) * self.spec.block
        if new:
            self.owner.news(self, new, ())

    def leave(self, job: Job, order: int) -> None:
        """Give back seat and KV. What is known by a key is kept while there is room, the ends of texts least long."""
        del self.seated[order]
        self.expected.discard(order)
        refs, idle = self.refs, self.idle
        blocks = job.held.pop(self.number)
        for n in range(blocks - 1, -1, -1):
            key = job.keys[n]
            count = refs[key]
            if count > 1:
                refs[key] = count - 1
            else:
                del refs[key]
                idle[key] = None
                self.used -= self.spec.block
        self.used -= job.private.pop(self.number)
        self.evict()

    def evict(self) -> None:
        """Give up blocks that nobody holds until all fits."""
        over = self.used + len(self.idle) * self.spec.block - self.spec.kv_tokens
        if over > 0 and self.idle:
            count = min(len(self.idle), math.ceil(over / self.spec.block))
            self.owner.news(self, (), [self.idle.popitem(last=False)[0] for _ in range(count)])

    def preempt(self) -> None:
        """The newest sequences lose their seats and KV until the others can grow; they wait, and compute what they had again."""
        while self.used + self.decoding > self.spec.kv_tokens and len(self.seated) - len(self.expected) > 1:
            order = max((o for o in self.seated if o not in self.expected), key=lambda o: (self.seated[o].priority, o))
            job = self.seated[order]
            if job in self.prefills:
                self.prefills.remove(job)
            else:
                had = job.arrival.output - int(job.finish - self.steps)
                self.decoding -= 1
                self.kv_read -= job.arrival.prompt + had - 1
                job.private[self.number] += had - job.had
                job.had, job.finish = had, -1.0
            self.leave(job, order)
            job.known = job.arrival.prompt + job.had
            heapq.heappush(self.waiting, (job.priority, order, job))
            self.preemptions += 1


def share(jobs: list[tuple[int, int, int]], budget: int) -> list[int]:
    """A token budget split over prompts, given as (priority, when it came, tokens left): the rule of engine/sequence.py."""
    if len(jobs) == 1:
        return [min(jobs[0][2], budget)]
    out = [0] * len(jobs)
    first = min(range(len(jobs)), key=lambda i: jobs[i][1])
    out[first] = min(jobs[first][2], -(-budget // 4))
    budget -= out[first]
    for i in sorted(range(len(jobs)), key=lambda i: (jobs[i][0], jobs[i][2])):
        more = min(jobs[i][2] - out[i], budget)
        out[i] += more
        budget -= more
        if not budget:
            break
    return out


def run_seconds(steps: int, first: float, more: float) -> float:
    """Of so many steps, each of which takes `more` than the one before."""
    return steps * first + more * steps * (steps - 1) / 2


def steps_by(seconds: float, first: float, more: float) -> int:
    """How many steps it takes until at least so much time has passed."""
    half = first - more / 2
    steps = 2 * seconds / (half + math.sqrt(half * half + 2 * more * seconds))
    return max(1, math.ceil(steps - 1e-6))
