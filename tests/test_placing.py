"""`Placing`: that its columns are always those of the TEs, which TEs it never takes, and what its choices go by."""

from __future__ import annotations

import asyncio
import random
from array import array
from itertools import pairwise

import msgspec
import pytest

from engine.config import Config
from engine.rtc.keys import block_keys, root_key
from engine.types import (
    Abort,
    BlockNews,
    Finish,
    Load,
    PromptDone,
    Recount,
    Reserved,
    SamplingParams,
    Start,
    Tokens,
    pack_ids,
    sequence_id,
)
from sched.cluster import takes_tasks
from sched.costs import Costs, Learner, Step
from sched.heatmap import HeatMap
from sched.job_executor import JobExecutor
from sched.knowledge import Knowledge
from sched.live import LiveTask
from sched.metrics import Families, Metrics
from sched.placing import LEARN_EVERY, Placing, first_costs
from sched.policy import Ask, Choice, Expected
from sched.predict import Predicted
from sched.profile_store import Found, Key, Profile, TeCosts
from sched.stream import Delta, Submission
from sched.tenants import ANYONE, Tenant
from tests import books
from tests.test_job_executor import Letters, PlayedTE, Scene, run
from tests.test_pd_simulation import ALL_SORTS, CLUSTERS, Simulation, Trouble

BLOCK = 16
COSTS = Costs(p0=0.002, p1=0.001, d0=0.01, d1=0.0005, chunk=256)


class Town(Scene):
    """TEs of any roles, and callers of any kind. `asks`: what the policy was asked."""

    def __init__(self, *roles: str, knowledge: Knowledge | None = None, ups: bool = True, **settings):
        self.now = 100.0
        config = Config(max_model_len=256, block_size=BLOCK, max_num_batched_tokens=256, te=max(len(roles), 1), **settings)
        self.je = JobExecutor(config, Metrics(Families(), "m"), random.Random(1), lambda: self.now, knowledge=knowledge)
        self.je.tokenizer = Letters()  # type: ignore[assignment]
        self.asks: list[Ask] = []
        pick = self.je.placing.pick

        def asked(ask, view, tree):
            self.asks.append(ask)
            return pick(ask, view, tree)

        self.je.placing.pick = asked
        self.tes = []
        for number, role in enumerate(roles):
            te = PlayedTE(number)
            te.role = role
            self.tes.append(te)
            if ups:
                self.up(te)

    def ask(self, name: str = "r", prompt=(65, 66), params=None, **more):
        keys = block_keys(root_key(b""), pack_ids(array("i", prompt))[: (len(prompt) - 1) // BLOCK * BLOCK * 4], BLOCK)
        live = self.je.admit(
            Submission(
                id=name,
                model="m",
                prompts=[array("i", prompt)],
                params=SamplingParams(**{"max_tokens": 99} | (params or {})),
                keys=[list(keys)],
                **more,
            )
        )
        got: list[Delta] = []
        live.stream.sink = got.extend
        return live, got

    def of(self, live) -> LiveTask:
        (entry,) = live.tasks
        return entry

    def step(self, te: PlayedTE, entry: LiveTask | None = None, token: int = 65, finish: int = 0, load: Load | None = None):
        """A TE's step, in which one sequence spoke."""
        seqs = [] if entry is None else [sequence_id(entry.wire, 0)]
        first = [PromptDone(s, 0, self.now) for s in seqs] if entry is not None and not entry.begun else None
        rows = [token] * len(seqs), [finish] * len(seqs)
        self.je.message(te, Tokens(seqs, *rows, load or te.load, None, first))  # type: ignore[arg-type]

    def end(self, live) -> None:
        entry = self.of(live)
        self.step(entry.te, entry, finish=Finish.LENGTH)  # type: ignore[arg-type]

    def tell(self, te: PlayedTE, news: BlockNews) -> None:
        self.je.message(te, news)  # type: ignore[arg-type]

    def die(self, te: PlayedTE) -> None:
        te.state = "dead"
        self.je.lost(te, "killed")  # type: ignore[arg-type]

    def back(self, number: int) -> PlayedTE:
        te = PlayedTE(number)
        te.role = self.tes[number].role
        self.tes[number] = te
        self.up(te)
        return te


def keys_of(prompt) -> bytes:
    """Of its full blocks."""
    return b"".join(block_keys(root_key(b""), pack_ids(array("i", prompt))[: len(prompt) // BLOCK * BLOCK * 4], BLOCK))


# ---- whatever happens ---------------------------------------------------------------------------------------------------


class Walk(Simulation):
    """The simulation with several keys, contexts, TEs that drain and are full; every choice is looked at."""

    def __init__(self, roles: tuple[str, ...], trouble: Trouble, rng: random.Random):
        self.keys = [Tenant(name=name, weight=weight) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 0.5))]
        self.keys = rng.choice([[ANYONE], self.keys])
        self.contexts = [f"ctx{i}" for i in range(3)]
        self.choices: list[Choice] = []
        super().__init__(roles, [2, 3, 8], trouble, rng)
        # The JE may give TEs about as many as they run, or all; a fair line is of use only where seats are few.
        self.je.config = self.je.placing.config = self.je.held.config = msgspec.structs.replace(
            self.je.config, max_num_seqs=self.sizes.max_seqs, sched=rng.choice(["cost", "paper"])
        )
        for te in self.table.values():
            self.je.placing.view.update(te.id, seats=self.sizes.max_seqs)
        self.je.placing.ahead = rng.choice([None, None, 0, 1])
        pick = self.je.placing.pick

        def picked(ask, view, tree):
            choice = pick(ask, view, tree)
            if choice is not None:
                self.check_choice(choice)
            return choice

        self.je.placing.pick = picked

    def submit(self, name: str = "r", prompts=((65, 66),), **params):
        rng, context = self.rng, self.rng.choice([*self.contexts, "", "", ""])
        live = self.je.admit(
            Submission(
                id=name,
                model="m",
                prompts=[array("i", p) for p in prompts],
                params=SamplingParams(**params),
                priority=rng.choice([0, 0, 1]),
                tenant=rng.choice(self.keys),
                context=context,
                context_tokens=min(map(len, prompts)) // 2 if context else 0,
            )
        )
        got: list[Delta] = []
        live.stream.sink = got.extend
        return live, got

    def check_choice(self, choice: Choice) -> None:
        """Neither a TE that is dead or draining nor one with tasks of its role before has been taken."""
        live = self.je.live.values()
        for number in {choice.prefill, choice.decode}:
            te = self.table[number]
            assert te.state == "ready" and not te.draining and self.je.tes[number] is te
            if te.role == "prefill":
                assert not any(e.te is te and e.prefill is not None for e in live)
            elif te.role == "decode":
                assert not any(e.prefill is te for e in live)
        roles = self.table[choice.prefill].role, self.table[choice.decode].role
        assert roles in {("prefill", "decode"), ("semi", "semi")} or (choice.prefill == choice.decode and roles[0] == "colocated")
        self.choices.append(choice)

    def drain(self, te) -> None:
        """As `Deployment.retire` does."""
        if takes_tasks([other for other in self.alive() if other is not te and not other.draining]):  # type: ignore[misc]
            te.draining = True
            self.je.move_away(te)
            self.je.place()

    def make_trouble(self) -> None:
        super().make_trouble()
        rng, te = self.rng, self.rng.choice(list(self.table.values()))
        if te.state == "ready" and te.role != "semi" and not te.draining and rng.random() < 0.03:
            self.drain(te)
        if rng.random() < 0.01:
            self.je.forget_context(rng.choice(self.contexts))
        books.check(self.je)

    def turn(self) -> None:
        super().turn()
        for te in self.alive():
            if te.draining and not (te.sequences or te.expecting or te.computing or te.busy):
                self.kill(te)


@pytest.fixture
def never_given_up(monkeypatch):
    """TEs die often here, and by no task's fault."""
    monkeypatch.setattr("sched.job_executor.MAX_ATTEMPTS", 10**6)


@pytest.mark.usefixtures("never_given_up")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("roles", CLUSTERS, ids="-".join)
def test_whatever_happens_what_is_kept_is_what_there_is(roles, seed):
    async def inside() -> None:
        s = Walk(roles, ALL_SORTS, random.Random(f"walk {roles} {seed}"))
        s.run(turns=300)
        s.check_nothing_is_left()
        s.check_texts()
        books.check(s.je)
        assert s.choices
        turns = s.je.held
        assert not turns.sequences and not turns.unread and not turns.outstanding
        assert set(turns.line.flows) <= {key.name for key in s.keys}

    asyncio.run(inside())


# ---- TEs that can't be chosen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["starting", "loading", "stopping", "dead"])
def test_a_te_that_is_not_ready_gets_nothing(state):
    def body() -> None:
        s = Town("colocated", "colocated")
        s.tes[0].state = state
        for i in range(4):
            s.ask(str(i))
        assert not s.tes[0].sent and s.tes[1].sequences == 4
        books.check(s.je)

    run_body(body)


def run_body(body) -> None:
    async def inside() -> None:
        body()

    asyncio.run(inside())


@run
def test_one_that_drains_gets_nothing_and_takes_again_when_it_stays():
    s = Town("colocated")
    s.tes[0].draining = True
    s.ask()
    assert len(s.je.held) == 1 and not s.tes[0].sent
    s.tes[0].draining = False
    s.je.place()
    assert not s.je.held and s.tes[0].sequences == 1


@run
def test_one_with_tasks_of_its_old_role_in_between_gets_nothing_until_they_are_through():
    s = Town("prefill", "decode", "prefill", "decode")
    live, _ = s.ask("first")
    entry = s.of(live)
    decode, prefill = entry.te, entry.prefill
    assert decode.expecting == prefill.computing == 1
    decode.role, prefill.role = "prefill", "decode"
    for i in range(4):
        s.ask(str(i))
    placed = [e for e in s.je.live.values() if e is not entry and e.te is not None]
    assert len(placed) == 4 and not {decode, prefill} & {te for e in placed for te in (e.te, e.prefill)}
    s.je.leave(live)
    assert not decode.expecting and not prefill.computing
    s.ask("later")
    books.check(s.je)
    assert s.je.placing.takes(decode) and s.je.placing.takes(prefill)


@run
def test_what_nobody_has_spoken_for_does_not_exist():
    s = Town("colocated", "colocated", ups=False)
    ghost, prompt = s.tes[0], range(40)
    s.up(s.tes[1])
    s.tell(ghost, BlockNews(1, stored=keys_of(prompt)))
    s.step(ghost, load=Load(steps=1, step_seconds=1.0, decodes=1))
    s.je.changed(ghost)  # type: ignore[arg-type]
    s.ask(prompt=list(prompt))
    assert not ghost.sent and list(s.je.placing.view.slots) == [1] and not s.je.placing.tree.match(s.asks[-1].keys).tes.size
    s.up(ghost)
    s.tell(ghost, BlockNews(2))
    assert isinstance(ghost.sent[-1], Recount), "it is asked for what it told before it was known"
    s.tell(ghost, BlockNews(3, stored=keys_of(prompt), whole=True))
    assert list(s.je.placing.tree.match(s.asks[-1].keys).tes) == [0]


@run
def test_where_more_tes_may_come_one_that_is_full_gets_no_more():
    s = Town("colocated", "colocated", max_num_seqs=4)
    s.je.placing.ahead = 1
    lives = [s.ask(str(i))[0] for i in range(12)]
    assert [te.sequences for te in s.tes] == [5, 5] and len(s.je.held) == 2
    s.end(lives[0])
    assert [te.sequences for te in s.tes] == [5, 5] and len(s.je.held) == 1
    books.check(s.je)


@run
def test_a_te_that_is_left_out_of_a_choice_takes_the_next_one():
    s = Town("colocated", "colocated")
    live, _ = s.ask()
    entry, placing = s.of(live), s.je.placing
    for out in ([0], [1]):
        choice = placing.choose(entry, s.now, out)
        assert choice is not None and choice.decode not in out
    assert placing.choose(entry, s.now, [0, 1]) is None
    s.tes[0].draining = True
    assert placing.choose(entry, s.now, [0, 1]) is None
    books.check(s.je)  # the one that drains doesn't take again by that


# ---- what steps cost ----------------------------------------------------------------------------------------------------


def learnt(s: Town) -> list[Step]:
    """The steps that costs are learnt from, from now on."""
    steps: list[Step] = []
    learner = s.je.placing.learner
    assert learner is not None
    learn = learner.learn
    learner.learn = lambda step: (steps.append(step), learn(step))[1]  # type: ignore[method-assign]
    return steps


@run
def test_costs_are_learnt_from_the_differences_of_one_step():
    s = Town("colocated", "colocated")
    steps = learnt(s)
    one = Load(steps=5, step_seconds=2.0, chunk_tokens=100, chunk_context=1000, decodes=40, decode_context=4000)
    two = Load(steps=6, step_seconds=2.5, chunk_tokens=110, chunk_context=1050, decodes=47, decode_context=4500)
    s.step(s.tes[0], load=one)
    assert not steps, "several steps: whose times, nobody knows"
    s.now += 1.0
    s.step(s.tes[0], load=two)
    assert steps == [Step(prompt=10, context=5.0, sequences=7, kv=500, seconds=0.5)]
    s.now += 1.0
    s.step(s.tes[0], load=two)  # a word that isn't of a step
    s.now += 1.0
    s.step(s.tes[0], load=msgspec.structs.replace(two, steps=8, step_seconds=3.0))
    assert len(steps) == 1
    s.step(s.tes[1], load=Load(steps=1, step_seconds=0.1, decodes=1, decode_context=10))
    assert steps[1:] == [Step(0, 0.0, 1, 10, 0.1)]


@run
def test_costs_are_not_learnt_too_often_nor_for_a_te_alone():
    s = Town("colocated", "colocated")
    steps = learnt(s)
    rng, when = random.Random(3), {te.id: [] for te in s.tes}
    for _ in range(600):
        s.now += rng.choice([0.001, 0.01, 0.03])
        te, before = rng.choice(s.tes), len(steps)
        load = msgspec.structs.replace(te.load, steps=te.load.steps + 1, step_seconds=te.load.step_seconds + 0.01)
        s.step(te, load=load)
        if len(steps) > before:
            when[te.id].append(s.now)
    for times in when.values():
        assert len(times) > 10 and all(b - a >= LEARN_EVERY for a, b in pairwise(times))
    s.die(s.tes[1])
    count = len(steps)
    s.now += 1.0
    s.step(s.tes[0], load=msgspec.structs.replace(s.tes[0].load, steps=s.tes[0].load.steps + 1))
    assert len(steps) == count, "there is no choice that costs would matter for"
    books.check(s.je)


@run
def test_a_slow_te_is_avoided_in_time_and_forgiven_when_it_is_another_one():
    s = Town("colocated", "colocated", knowledge=known())
    where = []
    for i in range(80):
        live, _ = s.ask(str(i))
        where.append(s.of(live).te.id)  # type: ignore[union-attr]
        s.end(live)
        for te, times in zip(s.tes, (4.0, 1.0), strict=True):
            seconds = times * COSTS.step(0, 0, 4, 400)
            more = {"steps": 1, "step_seconds": seconds, "decodes": 4, "decode_context": 400}
            load = msgspec.structs.replace(te.load, **{name: getattr(te.load, name) + n for name, n in more.items()})
            s.step(te, load=load)
        s.now += 1.0
    view = s.je.placing.view
    assert set(where[:4]) == {0, 1} and set(where[40:]) == {1}
    assert view.slow[view.slots[0]] > 1.5 * view.slow[view.slots[1]]
    s.die(s.tes[0])
    s.back(0)
    assert view.slow[view.slots[0]] == 1.0 and 0 not in s.je.placing.paces.heard


def known(foreign: bool = False, heat: HeatMap | None = None, cores: int = 4) -> Knowledge:
    """From a profile of TEs with 2 and with 4 cores."""
    data = (heat or HeatMap()).data
    twice = msgspec.structs.replace(COSTS, p1=2 * COSTS.p1, d0=2 * COSTS.d0)
    profile = Profile(Key("model", "machine", "settings"), "m", [TeCosts(2, twice), TeCosts(4, COSTS)], data)
    return Knowledge("model", found=Found(profile, "nowhere", foreign), cores=cores)  # type: ignore[arg-type]


@run
def test_a_profiles_costs_are_the_start():
    s = Town("colocated", "colocated", knowledge=known())
    learner = s.je.placing.learner
    assert learner is not None and learner.costs == COSTS
    assert Placing(s.je.config, known(cores=2)).learner.costs.p1 == 2 * COSTS.p1  # type: ignore[union-attr]


@run
def test_without_one_the_start_is_what_the_first_te_tells_of_its_sizes():
    s = Town("colocated", ups=False)
    assert s.je.placing.learner is None
    te = s.tes[0]
    te.memory, te.blocks = {"weights": 10**9, "kv": 10**8}, 100
    s.up(te)
    learner = s.je.placing.learner
    assert learner is not None and learner.costs == first_costs(s.je.config, te)  # type: ignore[arg-type]
    costs = learner.costs
    assert 0.001 < costs.d0 + costs.d1 < 1.0 and 0 < costs.p1 < costs.d0 and costs.peer > 0 and costs.chunk == 256
    assert min(getattr(costs, name) for name in ("p0", "p1", "p2", "p3", "d0", "d1", "d2")) >= 0
    te = PlayedTE(1)
    te.memory, te.blocks = {"weights": 10**6, "kv": 10**8}, 100
    s.up(te)
    assert s.je.placing.learner is learner, "what was learnt is not thrown away for each new TE"


@run
def test_sizes_that_a_te_does_not_tell_make_costs_all_the_same():
    s = Town("colocated", "colocated")
    live, _ = s.ask()
    choice = s.of(live).choice
    assert choice is not None and 0 < choice.predicted_ttft_ms < float("inf")


@run
def test_another_models_profile_gives_its_map_only():
    heat = HeatMap()
    for point in range(heat.points):
        heat.add("disaggregated", point, 0.3, 0.001)
    s = Town("colocated", ups=False, knowledge=known(foreign=True, heat=heat))
    placing = s.je.placing
    assert placing.learner is None and placing.knowledge.heat.value(512, 64) == (0.0, 0.0)
    s.up(s.tes[0])
    learner = placing.learner
    assert isinstance(learner, Learner) and learner.costs.p1 != COSTS.p1
    own = known(heat=heat).heat.value(512, 64)
    theirs = placing.knowledge.heat.value(512, 64)
    assert 0 < theirs.confidence < own.confidence and placing.traffic.heat is placing.knowledge.heat


# ---- what choices go by -------------------------------------------------------------------------------------------------


@run
def test_news_of_prefixes_moves_choices_and_the_longer_one_wins():
    rng = random.Random(5)
    s = Town(*["colocated"] * 4, knowledge=known())
    said = {te.id: 0 for te in s.tes}
    for round in range(12):
        prompt = [rng.randrange(99) for _ in range(6 * BLOCK + 1)]
        few, many = rng.sample(s.tes, 2)
        for te, blocks in ((few, 2), (many, 5)):
            said[te.id] += 1
            s.tell(te, BlockNews(said[te.id], stored=keys_of(prompt)[: 16 * blocks]))
        live, _ = s.ask(f"a{round}", prompt)
        assert s.of(live).te is many and s.of(live).choice.cached_tokens == 5 * BLOCK  # type: ignore[union-attr]
        assert many.prompt_tokens == len(prompt) - 5 * BLOCK
        s.end(live)
        said[many.id] += 1
        s.tell(many, BlockNews(said[many.id], evicted=keys_of(prompt)))
        live, _ = s.ask(f"b{round}", prompt)
        assert s.of(live).te is few
        s.end(live)
        books.check(s.je)


@run
def test_a_prefix_goes_with_its_te():
    prompt = list(range(5 * BLOCK))
    s = Town("colocated", "colocated", "colocated", knowledge=known())
    s.tell(s.tes[2], BlockNews(1, stored=keys_of(prompt)))
    live, _ = s.ask(prompt=prompt)
    assert s.of(live).te is s.tes[2]
    s.die(s.tes[2])
    assert s.of(live).te in s.tes[:2] and s.of(live).choice.cached_tokens == 0  # type: ignore[union-attr]
    s.end(live)
    s.back(2)
    live, _ = s.ask("again", prompt)
    assert s.of(live).choice.cached_tokens == 0  # type: ignore[union-attr]


@run
def test_tiers_are_anybodys_until_their_keeper_dies():
    prompt = list(range(5 * BLOCK))
    costs = msgspec.structs.replace(COSTS, tier0=0.0, dram=1e-6)
    s = Town("colocated", "colocated", knowledge=known())
    s.je.placing.learner = Learner(costs)
    s.tell(s.tes[0], BlockNews(1, dram=keys_of(prompt)))
    live, _ = s.ask(prompt=prompt)
    assert s.of(live).choice.cached_tokens == 4 * BLOCK  # type: ignore[union-attr]
    s.end(live)
    s.step(s.tes[1], load=msgspec.structs.replace(s.tes[1].load, tiers_gone=1))
    live, _ = s.ask("later", prompt)
    assert s.of(live).choice.cached_tokens == 0  # type: ignore[union-attr]


@run
def test_a_context_is_at_home_where_it_was_computed():
    s = Town("colocated", "colocated", "colocated", knowledge=known())
    prompt = list(range(4 * BLOCK))
    made, _ = s.ask("make", prompt, context="ctx", preserve=True)
    home = s.of(made).te
    s.end(made)
    for i in range(4):
        live, _ = s.ask(f"use{i}", [*prompt, i], context="ctx", context_tokens=len(prompt))
        assert s.asks[-1].home == home.id and s.asks[-1].home_tokens == len(prompt)  # type: ignore[union-attr]
        assert s.of(live).te is home
        s.end(live)
    s.ask("other", [*prompt, 9])
    assert s.asks[-1].home == -1
    s.je.forget_context("ctx")
    s.ask("later", [*prompt, 9], context="ctx2", context_tokens=len(prompt))
    assert s.asks[-1].home == -1 and list(s.je.placing.homes) == ["ctx2"]


@run
def test_a_context_has_no_home_on_a_te_that_took_the_place_of_its_own():
    s = Town("colocated", "colocated", knowledge=known())
    live, _ = s.ask("make", range(33), context="ctx", preserve=True)
    home = s.of(live).te
    s.end(live)
    s.die(home)  # type: ignore[arg-type]
    s.back(home.id)  # type: ignore[union-attr]
    s.ask("use", range(40), context="ctx", context_tokens=32)
    assert s.asks[-1].home == -1


@run
def test_a_context_that_is_forgotten_while_it_is_waited_for_leaves_nothing():
    s = Town("colocated", ups=False)
    s.ask("held", range(33), context="ctx", context_tokens=32)
    s.ask("other", range(33), context="kept", context_tokens=32)
    s.je.forget_context("ctx")
    s.up(s.tes[0])
    s.die(s.tes[0])
    s.back(0)
    assert list(s.je.placing.homes) == ["kept"] and not s.je.held
    assert [m.context for m in s.tes[0].sent if isinstance(m, Start)] == ["", "kept"]


@run
def test_a_task_that_starts_again_asks_with_what_it_has():
    s = Town("colocated", "colocated", "colocated", knowledge=known())
    live, _ = s.ask(params={"max_tokens": 40, "ignore_eos": True}, slo_ttft_ms=500.0, slo_tpot_ms=50.0)
    entry = s.of(live)
    first = s.asks[-1]
    assert (first.prompt_tokens, first.answer.mean, first.answer.confidence) == (2, 40.0, 1.0)
    assert first.ttft_slo == 0.5 and first.tpot_slo == 0.05
    for _ in range(7):
        s.now += 0.1
        s.step(entry.te, entry)  # type: ignore[arg-type]
    s.die(entry.te)  # type: ignore[arg-type]
    again = s.asks[-1]
    assert (again.prompt_tokens, again.answer.mean, again.answer.low) == (9, 33.0, 33.0)
    assert again.ttft_slo is None and again.tpot_slo == 0.05, "its first token was in time"


@run
def test_what_is_promised_runs_out_while_it_waits():
    s = Town("colocated", "colocated", ups=False, slo_ttft_ms=800.0)
    s.ask()
    s.now += 0.3
    s.up(s.tes[0])
    assert s.asks[-1].ttft_slo == pytest.approx(0.5)


@run
def test_lengths_are_predicted_once_and_only_where_there_is_a_choice():
    s = Town("colocated", ups=False)
    lengths, asked = s.je.placing.knowledge.lengths, []
    predict = lengths.predict
    lengths.predict = lambda clues: (asked.append(clues), predict(clues))[1]  # type: ignore[method-assign]
    s.up(s.tes[0])
    alone, _ = s.ask("alone")
    entry = s.of(alone)
    s.step(s.tes[0], entry)
    s.die(s.tes[0])
    s.back(0)
    assert not asked and entry.te is s.tes[0] and entry.answer is None
    s.end(alone)
    for number in (1, 2):
        s.tes.append(PlayedTE(number))
        s.up(s.tes[number])
    live, _ = s.ask("two")
    entry = s.of(live)
    for _ in range(3):
        te = entry.te
        assert te is not None
        s.die(te)  # type: ignore[arg-type]
        s.back(te.id)
    assert len(asked) == 1 and isinstance(entry.answer, Predicted)


@run
def test_of_an_answer_that_is_longer_than_thought_one_token_is_to_come():
    s = Town("colocated", "colocated", "colocated", knowledge=known())
    live, _ = s.ask(params={"max_tokens": 90})
    entry = s.of(live)
    entry.answer = Predicted(5.0, 2, 8, 0.5, 0, "key")
    for _ in range(6):
        s.step(entry.te, entry)  # type: ignore[arg-type]
    s.die(entry.te)  # type: ignore[arg-type]
    assert s.asks[-1].answer == Expected(1.0, 1.0, 2.0, 0.5)


@run
def test_a_prompt_with_its_probabilities_is_one_tes_work():
    s = Town("prefill", "decode", knowledge=known())
    live, _ = s.ask(params={"prompt_logprobs": 1})
    assert s.asks[-1].together and s.of(live).te is s.tes[0] and s.of(live).prefill is None


# ---- what ended texts tell ----------------------------------------------------------------------------------------------


@run
def test_ended_texts_are_told_whole_or_cut():
    s = Town("colocated", "colocated")
    known = s.je.placing.knowledge

    def told() -> list[tuple[int, bool]]:
        known.learn_some(len(known.to_learn))
        return [(one.length, one.ended) for one in known.lengths.history]

    lives = [s.ask(str(i), params={"max_tokens": 5, "n": n, "seed": 1})[0] for i, n in enumerate((1, 1, 1, 1, 2))]
    stops, cut, leaves, silent, two = lives

    def speak(live, index=0, finish=0):
        entry = s.of(live)
        seq = sequence_id(entry.wire, index)
        message = Tokens([seq], [65], [finish], Load(), None, None)
        s.je.message(entry.te, message)  # type: ignore[arg-type]

    speak(stops)
    speak(stops, finish=Finish.STOP)
    assert told() == [(2, True)]
    speak(cut, finish=Finish.LENGTH)
    speak(leaves)
    s.je.leave(leaves)
    s.je.leave(leaves)
    s.je.leave(silent)  # of a text that never began nobody can tell how long it would have been
    assert told() == [(2, True), (1, False), (1, False)]
    speak(two, 0)
    speak(two, 0)
    speak(two, 1, Finish.STOP)
    s.je.leave(two)
    assert told()[3:] == [(1, True), (2, False)]
    failed, _ = s.ask("failed")
    speak(failed)
    s.je.fail(failed, RuntimeError("no"))
    s.je.leave(failed)
    s.je.leave(stops)
    assert len(told()) == 5 and s.je.outstanding == 0
    books.check(s.je)


@run
def test_requests_tell_the_heat_map_only_where_both_kinds_are():
    seen = {}
    for roles in (("colocated",) * 2, ("prefill", "decode"), ("colocated", "prefill", "decode"), ("colocated", "semi", "lent")):
        s = Town(*("semi" if role == "lent" else role for role in roles), knowledge=known(), ups=False)
        if "lent" in roles:
            s.tes[2].lender = 1
        for te in s.tes:
            s.up(te)
        live, _ = s.ask(prompt=range(130))
        entry = s.of(live)
        te = entry.prefill or entry.te
        s.now += 1.0
        entry.prefill_task = None
        entry.begun = True
        sample = entry.samples[0]
        sample.ids.extend(range(32))
        s.je.placing.sample_over(entry, sample, "length", s.now)
        seen[roles] = list(s.je.placing.knowledge.heat.live)
        assert te is not None
        assert s.je.placing.learner.costs.answer < COSTS.answer, "lengths are learnt anyway"  # type: ignore[union-attr]
    assert [len(found) for found in seen.values()] == [0, 0, 1, 1]


@run
def test_what_started_again_or_has_several_texts_or_was_left_tells_the_heat_map_nothing():
    s = Town("colocated", "colocated", "prefill", "decode", knowledge=known())
    s.je.placing.learner = Learner(msgspec.structs.replace(COSTS, peer0=1e3))  # so that all of them stay on one TE
    heat = s.je.placing.knowledge.heat
    two, _ = s.ask("two", range(130), params={"n": 2})
    entry = s.of(two)
    for index in range(2):
        rows = [65] * 32, [0] * 31 + [Finish.LENGTH]
        s.je.message(entry.te, Tokens([sequence_id(entry.wire, index)] * 32, *rows, Load(), None, None))  # type: ignore[arg-type]
    for name in ("again", "left"):
        live, _ = s.ask(name, range(130))
        assert s.of(live).prefill is None
        te = s.of(live).te
        for _ in range(31):
            s.step(te, s.of(live))  # type: ignore[arg-type]
        if name == "again":
            s.die(te)  # type: ignore[arg-type]
            s.back(te.id)  # type: ignore[union-attr]
            s.end(live)
        s.je.leave(live)
    assert not heat.unseen
    once, _ = s.ask("once", range(130))
    s.now += 0.5
    for _ in range(31):
        s.step(s.of(once).te, s.of(once))  # type: ignore[arg-type]
    s.end(once)
    assert heat.unseen == 1 and [kind for kind, _ in heat.live] == ["colocated"]


# ---- sequences that leave a TE ------------------------------------------------------------------------------------------


@run
def test_several_sequences_that_leave_spread_over_the_others():
    s = Town("colocated", ups=False, knowledge=known())
    s.up(s.tes[0])
    lives = [s.ask(str(i))[0] for i in range(9)]
    for live in lives:
        s.step(s.tes[0], s.of(live))
    for number in (1, 2, 3):
        s.tes.append(PlayedTE(number))
        s.up(s.tes[number])
    s.tes[0].role = "prefill"
    assert s.je.move_away(s.tes[0]) == (9, 0)  # type: ignore[arg-type]
    asked = [[m for m in te.sent if isinstance(m, Start)] for te in s.tes[1:]]
    assert [len(starts) for starts in asked] == [3, 3, 3] and all(m.expect for starts in asked for m in starts)
    books.check(s.je)  # until they come they count where they are
    for te in s.tes[1:]:
        for start in [m for m in te.sent if isinstance(m, Start)]:
            s.je.message(te, Reserved(sequence_id(start.task, 0), b"", 0))  # type: ignore[arg-type]
    books.check(s.je)
    assert s.je.move_away(s.tes[0]) == (0, 9)  # type: ignore[arg-type]  # all are under way


@run
def test_what_leaves_goes_to_nobody_who_drains_or_only_computes_prompts():
    s = Town("colocated", "prefill", "colocated", knowledge=known())
    s.tes[2].draining = True
    live, _ = s.ask()
    s.step(s.tes[0], s.of(live))
    s.tes[0].draining = True
    assert s.je.move_away(s.tes[0]) == (0, 1)  # type: ignore[arg-type]
    s.tes[2].draining = False
    assert s.je.move_away(s.tes[0]) == (1, 0)  # type: ignore[arg-type]
    assert any(isinstance(m, Start) for m in s.tes[2].sent) and not s.tes[1].sent
    s.je.leave(live)
    assert isinstance(s.tes[2].sent[-1], Abort) and not s.je.moves
    books.check(s.je)


# ---- the files are read again -------------------------------------------------------------------------------------------


@run
def test_other_files_mean_other_blocks_costs_and_lengths():
    s = Town("colocated", "colocated", knowledge=known())
    prompt = list(range(40))
    s.tell(s.tes[0], BlockNews(1, stored=keys_of(prompt)))
    s.ask(prompt=prompt)
    s.je.give_up("replaced")
    for te in s.tes:
        s.die(te)
    new = Knowledge("other")
    s.je.follow(msgspec.structs.replace(s.je.config, block_size=8), new)
    placing = s.je.placing
    assert placing.learner is None and placing.tree.block_size == 8 and placing.knowledge is new
    assert placing.traffic.heat is new.heat and not placing.view.slots and not placing.homes
    s.back(0)
    assert placing.learner is not None
    s.ask("again", prompt)
    books.check(s.je)
