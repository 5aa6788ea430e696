"""Models that come and go in one server, against keepers and TEs that are played: every way in which two things can cross."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from engine.types import UserError
from sched import cluster
from sched.service import AsyncLLM
from sched.stream import TaskFailed, Unavailable
from tests.played import World, ask, text

PROMPT = (65, 66)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(20):
            await scene()

    asyncio.run(within())


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110  # whatever it is, nothing tells of it
            await asyncio.sleep(0.001)


async def over(world: World, engine: AsyncLLM) -> None:
    async with asyncio.timeout(5):
        await engine.close()
    world.nothing_left(engine)


def test_models_come_up_when_they_are_asked_for(world):
    async def scene() -> None:
        engine = world.engine("a", "b")
        await engine.ready()
        assert [d.state for d in engine.deployments] == ["ready", "off"]
        assert await asyncio.gather(ask(engine, "a"), ask(engine, "b"), ask(engine, "b", (70,))) == [
            text(PROMPT, 5),
            text(PROMPT, 5),
            text((70,), 5),
        ]
        assert [len(world.of(m)) for m in "ab"] == [1, 1]
        await engine.sleep("b", 1)
        assert engine.deployments[1].state == "asleep" and not world.of("b")
        await engine.sleep("b", 2)
        assert engine.deployments[1].state == "off"
        assert await ask(engine, "b") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


# ---- the keeper -----------------------------------------------------------------------------------------------------


def test_a_keeper_that_dies_at_once_or_cannot_be_started_is_only_started_again(world):
    async def scene() -> None:
        engine = world.engine("a", warm_te=2)
        await engine.ready()
        await until(lambda: world.keepers[-1].sizes == [2])
        for _ in range(4):
            world.keepers[-1].die()
            await until(lambda: world.keepers[-1].sizes)
        world.keeper_fails = True
        world.keepers[-1].die()
        await asyncio.sleep(0.01)
        assert await ask(engine, "a") == text(PROMPT, 5)
        world.keeper_fails = False
        await engine.scale("a", 2, None)
        assert engine.failure is None and len(world.of("a")) == 2
        await over(world, engine)

    play(scene)


def test_a_keeper_that_is_gone_before_it_hears_of_the_pool(world, monkeypatch):
    async def scene() -> None:
        engine = world.engine("a", warm_te=2)
        await engine.ready()
        await until(lambda: engine.cluster.pool_size == 2)
        real, lost = cluster.KeeperClient, [3]

        def stillborn(on_exit, preload=()):  # type: ignore[no-untyped-def]
            keeper = real(on_exit, preload)
            if lost[0]:
                lost[0] -= 1
                keeper.die()
            return keeper

        monkeypatch.setattr("sched.cluster.KeeperClient", stillborn)
        world.keepers[-1].die()
        await until(lambda: not lost[0] and world.keepers[-1].sizes == [2])
        assert engine.failure is None and await ask(engine, "a") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_sleep_while_the_keeper_dies(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        sleeping = asyncio.create_task(engine.sleep("a", 2))
        await until(lambda: not world.of("a"))
        world.keepers[-1].die()
        assert (await sleeping)["state"] == "off"
        assert await ask(engine, "a") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


# ---- TEs that don't come up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "why", [UserError("no room"), OSError(24, "Too many open files"), AssertionError("a bug")], ids=["refused", "system", "bug"]
)
def test_one_te_too_many_does_not_end_those_that_run(world, why):
    async def scene() -> None:
        engine = world.engine("a", "b")
        await engine.ready()
        await engine.wake("b")
        running = asyncio.create_task(ask(engine, "a", count=100))
        await asyncio.sleep(0.005)
        world.unmade = [why]
        with pytest.raises(UserError, match=r"no room|Too many open files|a bug"):
            await engine.scale("a", 3, None)
        assert await running == text(PROMPT, 100)
        await until(lambda: len(engine.deployments[0].takers()) == 2)
        assert [d.state for d in engine.deployments] == ["ready", "ready"] and engine.failure is None
        assert await ask(engine, "b") == text(PROMPT, 5)
        assert engine.scale_state()["models"][0]["reason"]
        await over(world, engine)

    play(scene)


def test_a_model_whose_tes_die_before_they_are_ready_fails_and_tries_again(world, monkeypatch):
    monkeypatch.setattr("sched.deployment.RETRY", 0.05)

    async def scene() -> None:
        engine = world.engine("a", "b")
        await engine.ready()
        world.stillborn = cluster.STILLBORN
        with pytest.raises(Unavailable, match="b can't be served"):
            await ask(engine, "b")
        assert [d.state for d in engine.deployments] == ["ready", "failed"] and engine.residency.used == 110
        with pytest.raises(Unavailable):
            await ask(engine, "b")
        await asyncio.sleep(0.06)
        assert await ask(engine, "b") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_a_bug_while_it_comes_up_is_told_and_nobody_waits_for_ever(world, monkeypatch):
    async def scene() -> None:
        engine = world.engine("a", "b")
        await engine.ready()
        monkeypatch.setattr(engine.residency, "make", lambda *_: 1 / 0)
        with pytest.raises(Unavailable, match="ZeroDivisionError"):
            await ask(engine, "b")
        with pytest.raises(Unavailable):
            await engine.wake("b")
        assert engine.deployments[1].state == "failed"
        await over(world, engine)

    play(scene)


def test_what_is_told_of_a_te_may_fail(world):
    def broken(climb):  # type: ignore[no-untyped-def]
        raise BrokenPipeError("stderr is closed")

    async def scene() -> None:
        engine = world.engine("a")
        engine.cluster.on_climb = broken
        await engine.ready()
        assert await ask(engine, "a") == text(PROMPT, 5) and engine.failure is None
        await over(world, engine)

    play(scene)


# ---- files that come and go -----------------------------------------------------------------------------------------


def test_a_model_whose_file_vanished_while_it_slept(world):
    async def scene() -> None:
        engine = world.engine("a", "b")
        await engine.ready()
        await engine.wake("b")
        await engine.sleep("b", 2)
        del world.files["b"]
        with pytest.raises(Unavailable, match="b: there is no such file"):
            await ask(engine, "b")
        assert engine.deployments[1].state == "failed"
        with pytest.raises(Unavailable, match="b: there is no such file"):
            await engine.wake("b")
        world.files["b"] = "1"
        assert (await engine.wake("b"))["state"] == "ready"  # a person doesn't wait until it would be tried again
        assert await ask(engine, "b") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_a_model_whose_file_was_replaced_while_it_slept_comes_back_with_the_new_one(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        old = engine.deployments[0].plan.key
        await engine.sleep("a", 1)
        assert list(engine.cluster.packed) == [old]
        world.files["a"] = "2"
        await engine.wake("a")
        assert engine.deployments[0].plan.key == "a:2"
        await until(lambda: list(engine.cluster.packed) == ["a:2"])
        assert await ask(engine, "a") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_one_model_that_cannot_be_read_does_not_stop_the_others(world):
    async def scene() -> None:
        engine = world.engine("a", "b", "c")
        del world.files["b"]
        await engine.ready()
        await asyncio.shield(engine.start())
        assert [d.state for d in engine.deployments] == ["ready", "failed", "off"]
        assert "b" in [card.id for card in engine.models()]
        with pytest.raises(Unavailable, match="b: there is no such file"):
            await ask(engine, "b")
        assert await ask(engine, "c") == text(PROMPT, 5)
        assert engine.health()["status"] == "ok" and "no such file" in engine.health()["error"]
        world.files["b"] = "1"
        await engine.wake("b")
        assert await ask(engine, "b") == text(PROMPT, 5) and engine.health()["error"] is None
        await over(world, engine)

    play(scene)


def test_the_default_model_that_cannot_be_read_ends_the_server(world):
    async def scene() -> None:
        engine = world.engine("a", "b")
        del world.files["a"]
        with pytest.raises(UserError, match="a: there is no such file"):
            await engine.ready()
        assert engine.failed.is_set()
        await over(world, engine)

    play(scene)


# ---- sleeping, waking, draining at once -----------------------------------------------------------------------------


def test_two_requests_for_a_sleeping_model_bring_it_up_once(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        await engine.sleep("a", 1)
        got = await asyncio.gather(*(ask(engine, "a", (65 + i,)) for i in range(6)))
        assert got == [text((65 + i,), 5) for i in range(6)] and len(engine.cluster.climbs) == 2
        await over(world, engine)

    play(scene)


def test_a_queue_of_none_still_takes_what_wakes_a_model(world):
    async def scene() -> None:
        engine = world.engine("a", max_num_queued_reqs=0)
        await engine.ready()
        await engine.sleep("a", 1)
        assert await ask(engine, "a") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_a_person_who_waits_for_a_model_hears_when_it_is_put_to_sleep_instead(world):
    async def scene() -> None:
        engine = world.engine("a", "b")
        await engine.ready()
        world.load_s = None
        waking = asyncio.create_task(engine.wake("b"))
        await until(lambda: world.of("b"))
        await engine.sleep("b", 1)
        with pytest.raises(Unavailable, match="put to sleep"):
            await waking
        scaling = asyncio.create_task(engine.scale("b", 2, None))
        await until(lambda: world.of("b"))
        await engine.sleep("b", 1)
        with pytest.raises(Unavailable, match="put to sleep"):
            await scaling
        world.load_s = 0.001
        assert await ask(engine, "b") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_scaling_waits_for_tes_that_another_caller_has_asked_for(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        world.load_s = 0.05
        first = asyncio.create_task(engine.scale("a", 3, None))
        await until(lambda: len(world.of("a")) == 3)
        await engine.scale("a", 3, None)
        assert len(engine.deployments[0].takers()) == 3
        await first
        await over(world, engine)

    play(scene)


def test_a_caller_who_leaves_undoes_nothing_and_leaves_nothing(world):
    async def scene() -> None:
        engine = world.engine("a", "b")
        await engine.ready()
        world.load_s, world.deaf = 0.02, True
        for call in (engine.scale("a", 3, None), engine.wake("b"), engine.sleep("a", 1)):
            caller = asyncio.create_task(call)
            await asyncio.sleep(0.008)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
        await until(lambda: not world.of("a") and len(engine.deployments[1].takers()) == 1)
        assert await ask(engine, "a") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_a_request_that_comes_while_the_last_te_leaves(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        long = asyncio.create_task(ask(engine, "a", count=60))
        await asyncio.sleep(0.005)
        sleeping = asyncio.create_task(engine.sleep("a", 2))
        await until(lambda: engine.deployments[0].leaving)
        later = asyncio.create_task(ask(engine, "a", (67,)))
        assert await long == text(PROMPT, 60)
        await sleeping
        assert await later == text((67,), 5)
        await over(world, engine)

    play(scene)


def test_a_te_that_dies_while_it_drains(world):
    async def scene() -> None:
        engine = world.engine("a", te=2)
        await engine.ready()
        await until(lambda: len(engine.deployments[0].takers()) == 2)
        running = [asyncio.create_task(ask(engine, "a", (65 + i,), 80)) for i in range(4)]
        await asyncio.sleep(0.01)
        world.step_s = 0.005
        draining = asyncio.create_task(engine.drain(0))
        await asyncio.sleep(0.005)
        for te in world.of("a"):
            if te.number == 0:
                te.die()
        await draining
        assert [await r for r in running] == [text((65 + i,), 80) for i in range(4)]
        assert [te.number for te in world.of("a")] == [1]
        await over(world, engine)

    play(scene)


def test_the_last_te_can_be_drained_and_comes_back_when_asked_for(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        await engine.drain(0)
        assert engine.deployments[0].state == "asleep" and engine.health()["status"] == "ok"
        assert await ask(engine, "a") == text(PROMPT, 5)
        await over(world, engine)

    play(scene)


def test_a_te_that_others_need_is_not_drained(world):
    async def scene() -> None:
        engine = world.engine("a", pd="1p1d")
        await engine.ready()
        with pytest.raises(UserError, match="no task could run"):
            await engine.drain(0)
        assert len(world.of("a")) == 2
        await over(world, engine)

    play(scene)


# ---- keep-alive -----------------------------------------------------------------------------------------------------


def test_a_model_that_takes_longer_to_load_than_it_is_kept_alive(world):
    async def scene() -> None:
        world.load_s = 0.1
        engine = world.engine("a", keep_alive=0.01)
        await asyncio.wait_for(engine.ready(), 5)
        await until(lambda: engine.deployments[0].state == "asleep")
        assert await ask(engine, "a") == text(PROMPT, 5)
        await asyncio.wait_for(engine.ready(), 5)
        await over(world, engine)

    play(scene)


def test_kept_alive_for_no_time(world):
    async def scene() -> None:
        engine = world.engine("a", keep_alive=0)
        await asyncio.wait_for(engine.ready(), 5)
        for i in range(5):
            assert await ask(engine, "a", (65 + i,)) == text((65 + i,), 5)
        await until(lambda: engine.deployments[0].state == "asleep")
        assert (await engine.wake("a"))["model"] == "a"
        await over(world, engine)

    play(scene)


def test_nothing_is_looked_at_while_there_is_nothing_to_decide(world):
    async def scene() -> None:
        engine = world.engine("a", min_te=1, max_te=2, keep_alive=0.01)
        await engine.ready()
        await ask(engine, "a")
        looks = 0
        real = engine.deployments[0].autoscaler.look

        async def counted(role):  # type: ignore[no-untyped-def]
            nonlocal looks
            looks += 1
            await real(role)

        engine.deployments[0].autoscaler.look = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.1)
        assert looks <= 3 and engine.deployments[0].state == "ready"
        await over(world, engine)

    play(scene)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_a_model_that_loads_slowly_is_not_displaced_before_it_has_served(world, monkeypatch):
    monkeypatch.setattr("sched.residency.RESIDENCE", 0.01)

    async def scene() -> None:
        world.load_s = 0.05  # longer than a residence
        engine = world.engine("a", "b", "c", memory_budget=115)
        await engine.ready()
        got = await asyncio.gather(*(ask(engine, m, (65 + i,)) for i in range(3) for m in "abc"))
        assert got == [text((65 + i,), 5) for i in range(3) for _ in "abc"]
        assert len(engine.cluster.climbs) <= 12
        await over(world, engine)

    play(scene)


def test_no_more_is_displaced_than_makes_room(world):
    async def scene() -> None:
        engine = world.engine("a", "b", "c", memory_budget=225)
        await engine.ready()
        await ask(engine, "b")
        world.step_s = 0.01
        long = asyncio.create_task(ask(engine, "a", count=30))  # the least recently used while it drains, and not afterwards
        await asyncio.sleep(0.02)
        engine.deployments[0].last_used, engine.deployments[0].up_since = 0.0, -100.0
        coming = asyncio.create_task(ask(engine, "c"))
        await until(lambda: engine.deployments[0].leaving)
        engine.deployments[0].used()
        engine.residency.look()
        assert await coming == text(PROMPT, 5) and await long == text(PROMPT, 30)
        assert engine.deployments[1].state == "ready"
        await over(world, engine)

    play(scene)


def test_growth_that_waited_is_not_carried_out_for_a_model_that_went_to_sleep(world):
    async def scene() -> None:
        engine = world.engine("a", "b", memory_budget=220)
        await engine.ready()
        await ask(engine, "b")
        await engine.residency.lock.acquire()
        scaling = asyncio.create_task(engine.scale("a", 2, None))
        await asyncio.sleep(0.01)
        await engine.sleep("a", 1)
        engine.residency.lock.release()
        with pytest.raises(Unavailable, match="put to sleep"):
            await scaling
        assert [d.state for d in engine.deployments] == ["asleep", "ready"]
        await over(world, engine)

    play(scene)


def test_what_a_person_asks_for_in_vain_is_not_tried_for_ever(world):
    async def scene() -> None:
        engine = world.engine("a", max_te=2, memory_budget=125)
        await engine.ready()
        with pytest.raises(UserError, match="memory-budget"):
            await engine.scale("a", 5, None)
        await ask(engine, "a")
        await asyncio.sleep(0.05)
        assert not engine.deployments[0].decisions and len(world.of("a")) == 1
        await over(world, engine)

    play(scene)


# ---- health ---------------------------------------------------------------------------------------------------------


def test_growing_is_no_fault_and_a_te_that_died_is(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        assert engine.health()["status"] == "ok"
        world.load_s = 0.05
        scaling = asyncio.create_task(engine.scale("a", 3, None))
        await until(lambda: len(world.of("a")) == 3)
        assert engine.health()["status"] == "ok"
        await scaling
        world.of("a")[2].die()
        await until(lambda: engine.health()["status"] == "degraded")
        await until(lambda: engine.health()["status"] == "ok")
        await over(world, engine)

    play(scene)


# ---- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.0, 0.001, 0.004, 0.01, 0.03])
def test_closing_while_everything_is_half_way(world, after):
    async def scene() -> None:
        world.load_s, world.pack_s, world.step_s = 0.01, 0.004, 0.002
        engine = world.engine("a", "b", "c", memory_budget=400, keep_alive=0.02, max_te=4)
        await engine.ready()
        callers = [
            asyncio.create_task(call)
            for call in (
                ask(engine, "a", count=200),
                ask(engine, "b"),
                engine.scale("a", 8, None),
                engine.wake("c"),
                engine.sleep("a", 2),
                engine.drain(0),
                engine.scale("b", 3, None),
                ask(engine, "a"),
                engine.ready(),
            )
        ]
        await asyncio.sleep(after)
        await asyncio.wait_for(engine.close(), 5)
        done, waiting = await asyncio.wait(callers, timeout=2)
        assert not waiting, waiting
        for caller in done:
            assert not caller.cancelled()
            assert caller.exception() is None or isinstance(caller.exception(), (Unavailable, UserError, TaskFailed)), caller
        world.nothing_left(engine)
        with pytest.raises((Unavailable, RuntimeError)):
            await ask(engine, "a")

    play(scene)


def test_tes_that_do_not_hear_stop_are_killed(world):
    async def scene() -> None:
        engine = world.engine("a")
        await engine.ready()
        await engine.scale("a", 4, None)
        world.deaf = True
        await engine.drain(3)
        assert len(world.of("a")) == 3
        await over(world, engine)

    play(scene)


# ---- everything at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_random_walk(world, monkeypatch, seed):
    """Whatever happens to TEs, keepers and models: every request ends with its text, or hears why not; nothing is left over."""
    monkeypatch.setattr("sched.residency.RESIDENCE", 0.01)
    monkeypatch.setattr("sched.deployment.RETRY", 0.02)
    rng = Random(seed)
    names = "abc"

    async def request(engine: AsyncLLM, number: int) -> None:
        prompt, count = tuple(rng.randrange(65, 90) for _ in range(rng.randrange(1, 4))), rng.randrange(1, 40)
        asking = asyncio.create_task(ask(engine, rng.choice(names), prompt, count, f"r{number}"))
        if rng.random() < 0.2:
            await asyncio.wait((asking,), timeout=rng.random() * 0.02)
            asking.cancel()
        with contextlib.suppress(Unavailable, TaskFailed, asyncio.CancelledError):
            assert await asking == text(prompt, count)

    async def person(engine: AsyncLLM) -> None:
        model = rng.choice(names)
        tes = list(engine.cluster.table) or [0]
        call = rng.choice(
            (
                lambda: engine.scale(model, rng.randrange(1, 5), None),
                lambda: engine.sleep(model, rng.randrange(1, 3)),
                lambda: engine.wake(model),
                lambda: engine.drain(rng.choice(tes)),
            )
        )
        calling = asyncio.create_task(call())
        if rng.random() < 0.2:
            await asyncio.wait((calling,), timeout=rng.random() * 0.01)
            calling.cancel()
        with contextlib.suppress(Unavailable, UserError, asyncio.CancelledError):
            await calling

    async def scene() -> None:
        world.load_s = 0.003
        settings = {"memory_budget": 260, "weights_dram_bytes": 150, "max_te": 3}
        if seed % 3:
            settings["keep_alive"] = 0.01 * (seed % 3 - 1)
        engine = world.engine(*names, **settings)
        await engine.ready()
        doing: set[asyncio.Task[None]] = set()
        for number in range(150):
            chance = rng.random()
            if chance < 0.5:
                doing.add(asyncio.create_task(request(engine, number)))
            elif chance < 0.8:
                doing.add(asyncio.create_task(person(engine)))
            elif chance < 0.9 and world.living:
                rng.choice(sorted(world.living, key=lambda te: te.pid)).die()
            elif chance < 0.93:
                world.keepers[-1].die()
            elif chance < 0.95:
                world.stillborn += 1
            await asyncio.sleep(rng.random() * 0.004)
            assert engine.residency.used <= engine.residency.budget
        ended, waiting = await asyncio.wait(doing, timeout=8)
        assert not waiting, [(d.id, d.state, d.held, d.slots, d.leaving, d.waking, d.failure) for d in engine.deployments]
        for task in ended:
            task.result()
        world.stillborn = 0
        for d in engine.deployments:
            assert d.je is None or (d.je.outstanding == 0 and not d.je.live and not d.je.held)
            if d.failure is not None:
                await asyncio.sleep(0.03)
            assert await ask(engine, d.id) == text(PROMPT, 5)
        assert engine.residency.used <= engine.residency.budget
        for name in names:
            await engine.sleep(name, 2)
        await until(lambda: not world.living)
        assert engine.residency.used == 0 and not engine.cluster.slots and not engine.cluster.packed
        assert all(te.sequences == te.expecting == te.computing == 0 for te in engine.cluster.table.values())
        await over(world, engine)

    play(scene)
