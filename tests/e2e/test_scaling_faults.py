"""Models and TEs that come and go while processes die, with real processes: every request ends with its text or hears why not,
and nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
from pathlib import Path
from random import Random

import pytest

from deepserve import AsyncLLM, Config, SamplingParams, UserError
from sched.stream import TaskFailed, Unavailable
from tests import tiny
from tests.server import Server, alive, family, wait_until

NAMES = ("one", "two", "three")
SMALL = ("--max-model-len", "256", "--kv-cache-memory-bytes", "4M")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny.make(folder / name, seed=i) for i, name in enumerate(NAMES)]


def text(server: Server) -> str:
    body = {"model": server.get("/v1/models")[1]["data"][0]["id"], "prompt": "once upon", "max_tokens": 8, "temperature": 0}
    status, reply = server.post("/v1/completions", body | {"ignore_eos": True})
    assert status == 200, reply
    return reply["choices"][0]["text"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_while_sixteen_tes_come_up_leaves_nothing(models, how):
    with Server(models[0], *SMALL) as server:
        server.ready()
        asking = threading.Thread(target=lambda: refused(lambda: server.post("/v1/admin/scale", {"te": 16})))
        asking.start()
        wait_until("some of them are on their way", lambda: len(family(server.marker)) >= 5)
        server.signal(how)
        server.process.wait(20)
        wait_until("nothing is left", lambda: not family(server.marker), 10.0)
        asking.join()


def refused(call) -> None:  # type: ignore[no-untyped-def]
    """The server goes while it is asked."""
    with contextlib.suppress(OSError, ValueError):
        call()


@pytest.mark.parametrize("flags", [("--pd", "semi"), ("--tensor-parallel-size", "2"), ("--pd", "1p1d")], ids=["semi", "tp", "pd"])
def test_teams_sleep_and_wake_whole(models, flags):
    with Server(models[0], *SMALL, *flags) as server:
        server.ready()
        before, processes = text(server), family(server.marker)
        status, slept = server.post("/v1/admin/sleep", {"level": 1})
        assert status == 200 and slept["state"] == "asleep" and slept["verified"], slept
        wait_until("only the server and its keeper are left", lambda: len(family(server.marker)) < len(processes))
        assert not server.tes()
        assert text(server) == before and len(family(server.marker)) == len(processes)
        te = server.tes()[0]
        if flags[0] == "--pd":
            status, reply = server.post("/v1/admin/drain", {"te": te["id"]})
            assert status == 400 and "no task could run" in reply["error"]["message"]
        os.kill(te["pid"], signal.SIGKILL)
        assert text(server) == before


def test_files_that_vanish_and_are_replaced(models, tmp_path):
    model = shutil.copytree(models[0], tmp_path / "model")
    other = tiny.make(tmp_path / "other", seed=9)
    with Server(model, *SMALL) as server:
        server.ready()
        before = text(server)
        server.post("/v1/admin/sleep", {"level": 2})
        away = model.rename(tmp_path / "away")
        status, reply = server.post("/v1/admin/wake", {})
        assert status == 503 and str(model) in reply["error"]["message"], reply
        assert server.get("/v1/models")[1]["data"][0]["state"] == "failed" and server.get("/health")[0] == 503
        away.rename(model)
        status, reply = server.post("/v1/admin/wake", {})
        assert status == 200, reply
        assert text(server) == before
        server.post("/v1/admin/sleep", {"level": 1})
        shutil.rmtree(model)
        other.rename(model)
        assert text(server) != before
        assert [climb["path"] for climb in server.get("/v1/admin/scale")[1]["climbs"]] == ["disk", "disk", "disk"]
        assert len(server.get("/v1/admin/scale")[1]["dram"]["entries"]) == 1


# ---- everything at once ---------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_random_walk(models, steps: int = 40, seed: int = 0):
    rng = Random(seed)
    pids: set[int] = set()

    async def answer(engine: AsyncLLM, model: str, number: int, count: int) -> list[int]:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        last = None
        async for output in engine.generate([70 + number, 71, 72], params, model=model):
            last = output
        assert last is not None
        return list(last.outputs[0].token_ids)

    async def request(engine: AsyncLLM, wanted: dict[tuple[str, int], list[int]]) -> None:
        (model, number), count = rng.choice(list(wanted)), rng.randrange(1, 60)
        asking = asyncio.create_task(answer(engine, model, number, count))
        if rng.random() < 0.15:
            await asyncio.wait((asking,), timeout=rng.random() * 0.1)
            asking.cancel()
        with contextlib.suppress(Unavailable, TaskFailed, asyncio.CancelledError):
            assert await asking == wanted[model, number][:count]

    async def person(engine: AsyncLLM) -> None:
        model = rng.choice(NAMES)
        tes = list(engine.cluster.table) or [0]
        call = rng.choice(
            (
                lambda: engine.scale(model, rng.randrange(1, 4), None),
                lambda: engine.sleep(model, rng.randrange(1, 3)),
                lambda: engine.wake(model),
                lambda: engine.drain(rng.choice(tes)),
            )
        )
        calling = asyncio.create_task(call())
        if rng.random() < 0.2:
            await asyncio.wait((calling,), timeout=rng.random() * 0.1)
            calling.cancel()
        with contextlib.suppress(Unavailable, UserError, asyncio.CancelledError):
            await calling

    def kill(engine: AsyncLLM) -> None:
        """A TE, or the keeper now and then."""
        found = [te.pid for te in engine.cluster.table.values() if te.pid and te.state in ("loading", "ready")]
        keeper = engine.cluster.keeper
        if rng.random() < 0.2 and keeper is not None:
            found = [keeper.pid]
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(found), signal.SIGKILL)

    async def play(steps: int) -> None:
        settings = {"max_model_len": 256, "kv_cache_memory_bytes": 4 << 20, "memory_budget": 230 << 20, "max_te": 2}
        configs = [Config(model=str(path), **settings) for path in models]
        engine = AsyncLLM(configs=configs)
        await engine.ready()
        wanted = {(name, i): await answer(engine, name, i, 60) for name in NAMES for i in range(3)}
        doing: set[asyncio.Task[None]] = set()
        for _ in range(steps):
            chance = rng.random()
            if chance < 0.55:
                doing.add(asyncio.create_task(request(engine, wanted)))
            elif chance < 0.85:
                doing.add(asyncio.create_task(person(engine)))
            else:
                kill(engine)
            pids.update(te.pid for te in engine.cluster.table.values() if te.pid)
            await asyncio.sleep(rng.random() * 0.06)
            assert engine.residency.used <= engine.residency.budget
        ended, waiting = await asyncio.wait(doing, timeout=60) if doing else (set(), set())
        assert not waiting, [(d.id, d.state, d.held, d.slots, d.leaving, d.failure) for d in engine.deployments]
        for task in ended:
            task.result()
        for (name, number), ids in wanted.items():
            assert await answer(engine, name, number, 60) == ids
        for d in engine.deployments:
            assert d.je is not None and d.je.outstanding == 0 and not d.je.live and not d.je.passages.table
            await engine.sleep(d.id, 2)
        assert engine.residency.used == 0 and not engine.cluster.slots and not engine.cluster.packed
        assert engine.cluster.keeper is not None
        pids.add(engine.cluster.keeper.pid)
        await engine.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(play(0))  # what is loaded once has its files from now on
    before = open_files()
    asyncio.run(play(steps))
    assert open_files() <= before
    wait_until("every process has ended", lambda: not any(map(alive, pids)), 10.0)
