"""The job executor and whole engines over the fake device, with every role there is, under whatever can happen: mail that comes
late, callers that leave, TEs that die and come back, transfers that fail, roles that change under running work. Each text must be
the plain oracle's, every request must end, and nothing may be left behind on either side.

All chance comes from one generator, seeded by what the test's name tells: what fails once fails again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import msgspec
import pytest

from engine.config import Speculation
from engine.types import FromWorker, Link, SamplingParams, ToWorker, Unlink
from sched.cluster import takes_tasks
from sched.live import LiveRequest
from sched.stream import Delta
from tests import books
from tests.fake_device import VOCAB, Engine, SlowOutbound, text_of
from tests.test_job_executor import PlayedTE, Scene

# The roles of the TEs; "lent" computes in the KV pool of the one before it, the other half of its semi pair.
PAIR, TRIO = ("prefill", "decode"), ("prefill", "decode", "decode")
CLUSTERS = [
    PAIR,
    (*PAIR, "colocated"),
    (*PAIR, *PAIR),
    (*TRIO, "colocated"),
    ("colocated",) * 2,
    ("colocated",) * 3,
    ("semi", "lent"),
    ("semi", "lent", "colocated"),
]


@dataclass(frozen=True)
class Trouble:
    """Chances, in each turn."""

    kill: float
    leave: float
    change_role: float
    break_transfer: float  # a TE's next, if it has one queued


ALL_SORTS = Trouble(kill=0.006, leave=0.01, change_role=0.02, break_transfer=0.03)
MANY_ROLES = Trouble(kill=0.0005, leave=0.01, change_role=0.1, break_transfer=0.0)


@dataclass(frozen=True)
class Sizes:
    """Of each TE."""

    blocks: int
    max_seqs: int
    max_tokens: int
    overlapped: bool
    speculation: Speculation | None


@dataclass(frozen=True)
class Asked:
    """A request, and what its caller has heard."""

    live: LiveRequest
    got: list[Delta]
    prompt: list[int]
    params: SamplingParams


class LinkedOutbound(SlowOutbound):
    """Is linked by mail."""

    def link(self, peer) -> None:
        self.there[peer.id] = peer.engine

    def unlink(self, te: int) -> None:
        self.there.pop(te, None)


class WholeTE(PlayedTE):
    """A TE with an engine: `sent` is its mail, `said` is what the job executor hasn't heard of it yet."""

    def __init__(self, number: int, role: str, lender: WholeTE | None, sizes: Sizes):
        super().__init__(number)
        self.role, self.lender = role, -1 if lender is None else lender.id
        self.overlapped = sizes.overlapped
        self.engine = Engine(
            blocks=sizes.blocks if lender is None else 0,
            max_seqs=sizes.max_seqs,
            max_tokens=sizes.max_tokens,
            speculation=sizes.speculation,
        )
        if lender is not None:
            self.engine.device.memory = lender.engine.device.memory
        self.engine.core.outbound = self.outbound = LinkedOutbound(self.engine, {})
        self.said: list[FromWorker] = []

    def send(self, message: ToWorker) -> None:
        self.sent.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToWorker))

    def say(self, message: FromWorker) -> None:
        self.said.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromWorker))

    def turn(self, letters: int, transfers: int, living: list[Engine]) -> None:
        """A step, after up to so many letters and transfers; none of these reaches an engine that isn't alive."""
        core, queue = self.engine.core, self.outbound.queue
        for message in self.sent[:letters]:
            core.obey(message)
        del self.sent[:letters]
        for _ in range(transfers):
            self.outbound.tick("it is gone" if queue and queue[0].target not in living else None)
        core.settle(core.drain())
        self.engine.step(self.overlapped, self.say)
        self.engine.batch.check()

    @property
    def busy(self) -> bool:
        core, batch = self.engine.core, self.engine.batch
        waits = self.sent or self.said or self.outbound.queue
        return bool(waits or self.engine.flying or core.ends or core.closing or batch.has_work())


class Simulation(Scene):
    def __init__(self, roles: tuple[str, ...], sizes: list[int], trouble: Trouble, rng: random.Random):
        """`sizes`: what a TE's number of sequences is drawn from."""
        super().__init__(0, kv_transfer=rng.choice(["layer", "request"]), max_num_queued_reqs=10**6)
        self.roles, self.trouble, self.rng = list(roles), trouble, rng
        self.asking = rng.choice([0.05, 0.1, 0.2])  # the chance of a request in a turn
        self.sizes = Sizes(
            blocks=rng.choice([18, 24, 40]),
            max_seqs=rng.choice(sizes),
            max_tokens=rng.choice([8, 32]),
            overlapped=rng.random() < 0.6,
            speculation=Speculation(method="ngram", num_speculative_tokens=4) if rng.random() < 0.3 else None,
        )
        self.common = [rng.randrange(VOCAB) for _ in range(20)]  # prompts begin alike
        self.table: dict[int, WholeTE] = {}
        self.dying: list[WholeTE] = []  # dead, and nobody has heard of it
        self.coming: dict[int, int] = {}  # turns until a dead TE's place is taken
        self.asked: dict[str, Asked] = {}
        self.left: set[str] = set()  # requests whose caller has gone
        for number in range(len(roles)):
            self.bring(number)

    def alive(self) -> list[WholeTE]:
        return [te for te in self.table.values() if te.state == "ready"]

    # ---- what happens -----------------------------------------------------------------------------------------------
    def bring(self, number: int) -> None:
        lent = self.roles[number] == "lent"
        te = WholeTE(number, "semi" if lent else self.roles[number], self.table[number - 1] if lent else None, self.sizes)
        for other in self.alive():
            if te.lender < 0 and other.lender < 0:
                other.sent.append(Link([te]))  # type: ignore[list-item]
                te.sent.append(Link([other]))  # type: ignore[list-item]
        self.table[number] = te
        self.up(te)

    def kill(self, te: WholeTE) -> None:
        """What it has said is still heard; that it is dead may be heard only later."""
        self.hear(te, len(te.said))
        te.state = "dead"
        self.dying.append(te)
        if self.rng.random() < 0.5:
            self.tell_of_deaths()

    def tell_of_deaths(self) -> None:
        while self.dying:
            te = self.dying.pop(0)
            for other in self.alive():
                if other.lender == te.id:
                    self.kill(other)
                elif other.lender < 0 and te.lender < 0:
                    other.sent.append(Unlink(te.id))
            self.je.lost(te, "killed")  # type: ignore[arg-type]
            self.coming[te.id] = self.rng.randrange(1, 40)

    def hear(self, te: WholeTE, count: int) -> None:
        for message in te.said[:count]:
            self.je.message(te, message)  # type: ignore[arg-type]
        del te.said[:count]

    def ask(self) -> None:
        rng, name = self.rng, f"r{len(self.asked)}"
        prompt = self.common[: rng.choice([0, 4, 9, 20])] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 16))]
        params = SamplingParams(
            max_tokens=rng.choice([0, 1, 2, 5, 9, 25]),
            n=rng.choice([1, 1, 1, 3]),
            seed=rng.randrange(99),
            stop=[chr(rng.randrange(VOCAB))] if rng.random() < 0.2 else [],
            ignore_eos=True,
        )
        live, got = self.submit(name, (prompt,), **msgspec.structs.asdict(params))
        self.asked[name] = Asked(live, got, prompt, params)

    def leave(self) -> None:
        name = self.rng.choice(list(self.asked)[-12:])  # mostly one that isn't over
        self.left.add(name)
        self.je.leave(self.asked[name].live)

    def change_role(self, te: WholeTE) -> None:
        """As `Cluster.give_role` and `Service.give_role` do."""
        before, te.role = te.role, self.rng.choice(["prefill", "decode", "colocated"])
        if not takes_tasks(self.alive()):  # type: ignore[arg-type]
            te.role = before
            return
        self.roles[te.id] = te.role
        if te.role == "prefill":
            self.je.move_away(te)  # type: ignore[arg-type]
        self.je.place()

    # ---- turns ------------------------------------------------------------------------------------------------------
    def turn(self) -> None:
        """One TE does something, and news of deaths and new TEs may come."""
        rng = self.rng
        self.now += 0.001
        te = rng.choice(list(self.table.values()))
        if te.state == "ready":
            te.turn(rng.randrange(4), rng.randrange(4), [t.engine for t in self.alive()])
            self.hear(te, rng.randrange(4))
        if rng.random() < 0.3:
            self.tell_of_deaths()
        for number in list(self.coming):
            self.coming[number] -= 1
            lent_by_the_dead = self.roles[number] == "lent" and self.table[number - 1].state == "dead"
            if self.coming[number] <= 0 and not lent_by_the_dead:
                del self.coming[number]
                self.bring(number)
        books.check(self.je)

    def make_trouble(self) -> None:
        rng, trouble = self.rng, self.trouble
        te = rng.choice(list(self.table.values()))
        if te.state == "ready" and rng.random() < trouble.kill:
            self.kill(te)
        if self.asked and rng.random() < trouble.leave:
            self.leave()
        te = rng.choice(list(self.table.values()))
        if te.state == "ready" and rng.random() < trouble.break_transfer:
            te.outbound.tick("the link is broken")
        te = rng.choice(list(self.table.values()))
        if te.state == "ready" and te.role != "semi" and rng.random() < trouble.change_role:
            self.change_role(te)

    def run(self, turns: int = 400, limit: int = 60000) -> None:
        """Requests and trouble for so many turns, then peace until nothing is on its way any more."""
        for _ in range(turns):
            if self.rng.random() < self.asking:
                self.ask()
            self.turn()
            self.make_trouble()
        while self.coming or self.dying or any(te.busy for te in self.table.values()):
            self.turn()
            limit -= 1
            assert limit, "no end"

    # ---- what must hold ---------------------------------------------------------------------------------------------
    def check_nothing_is_left(self) -> None:
        je = self.je
        waits = {te.id: (te.role, te.expecting, te.computing) for te in self.table.values() if te.expecting or te.computing}
        assert not je.held and not je.live, f"{len(je.held)} held, {len(je.live)} live, TEs that wait for others: {waits}"
        assert not je.passages.table and not je.moves and not je.outstanding
        for te in self.table.values():
            assert not te.engine.batch.sequences and not te.engine.rtc.used and not te.engine.core.awaited
            assert te.sequences == te.prompt_tokens == te.expecting == te.computing == 0

    def check_texts(self) -> None:
        for name, asked in self.asked.items():
            for index in range(asked.params.n):
                self.check_text(name, asked, index)

    def check_text(self, name: str, asked: Asked, index: int) -> None:
        params = asked.params
        stop = frozenset(map(ord, params.stop))
        want = text_of(asked.prompt, params.max_tokens, params.seed + index, stop)
        stopped = bool(want) and want[-1] in stop
        text = "".join(map(chr, want[:-1] if stopped else want))
        deltas = [d for d in asked.got if d.index == index]
        got, said = [i for d in deltas for i in d.ids], "".join(d.text for d in deltas)
        assert got == want[: len(got)] and text.startswith(said), f"request {name}, sample {index}"
        assert not any(d.finish for d in deltas[:-1]), f"request {name}, sample {index} spoke after its end"
        if name not in self.left:
            assert (got, said) == (want, text), f"request {name}, sample {index}"
            assert deltas[-1].finish == ("stop" if stopped else "length")


@pytest.fixture(autouse=True)
def never_given_up(monkeypatch):
    """TEs die often here, and by no task's fault."""
    monkeypatch.setattr("sched.job_executor.MAX_ATTEMPTS", 10**6)


def simulate(roles: tuple[str, ...], sizes: list[int], trouble: Trouble, seed: int) -> None:
    async def inside() -> None:  # streams make futures, so they want a loop
        s = Simulation(roles, sizes, trouble, random.Random(f"{roles} {seed}"))
        s.run()
        s.check_nothing_is_left()
        s.check_texts()

    asyncio.run(inside())


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("roles", CLUSTERS, ids="-".join)
def test_whatever_happens_every_text_is_whole(roles, seed):
    simulate(roles, [2, 3, 8], ALL_SORTS, seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("roles", [PAIR, TRIO], ids="-".join)
def test_roles_change_while_every_seat_is_taken(roles, seed):
    simulate(roles, [1, 2], MANY_ROLES, seed)
