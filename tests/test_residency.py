"""Who is up on a box that hasn't room for all: against models that are played by the test."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from engine.types import OutOfMemory
from sched.residency import RESIDENCE, Residency


@dataclass(eq=False)
class Played:
    """A model of `nbytes`, all of them weights."""

    id: str
    residency: Residency
    nbytes: int = 10
    last_used: float = 0.0
    up_since: float = 0.0
    busy: bool = False
    packed: bool = False
    state: str = "ready"
    slots: list[int] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    dropped: int = 0

    def __post_init__(self) -> None:
        self.residency.deployments.append(self)  # type: ignore[arg-type]
        self.made = self.plan = SimpleNamespace(key=self.id, weight_bytes=self.nbytes)
        self.config = SimpleNamespace(device="cpu")
        self.cluster = SimpleNamespace(packed={self.id: self.nbytes})

    @property
    def footprint(self) -> int:
        return self.nbytes * bool(self.slots or self.leaving)

    @property
    def going(self) -> int:
        return 0 if self.slots else self.footprint

    def leave(self) -> None:
        """It leaves when what it runs has ended: here in a moment."""
        if not self.slots:
            return
        slot = self.slots.pop()
        self.leaving.append(slot)

        def left() -> None:
            self.leaving.remove(slot)
            self.residency.look()

        asyncio.get_running_loop().call_later(0.001, left)

    def progress(self, line: str) -> None:
        self.lines.append(line)

    async def drop_weights(self) -> int:
        self.cluster.packed.clear()
        self.dropped += 1
        return self.nbytes

    async def come(self) -> None:
        async with self.residency.room(self, self.nbytes):  # type: ignore[arg-type]
            self.slots.append(1)


def box(budget: int, weights: int = 1000) -> tuple[Residency, list[float]]:
    now = [100.0]
    return Residency(budget, weights, lambda: now[0]), now


def test_the_least_recently_used_goes():
    async def play() -> None:
        residency, _ = box(20)
        old, new, third = (Played(name, residency, last_used=at) for name, at in (("old", 1), ("new", 2), ("third", 3)))
        await old.come()
        await new.come()
        await third.come()
        assert not old.slots and new.slots and third.slots and residency.used == 20

    asyncio.run(play())


def test_what_would_not_fit_alone_is_refused_with_what_would_do():
    async def play() -> None:
        residency, _ = box(20)
        large = Played("large", residency, nbytes=21)
        with pytest.raises(OutOfMemory, match="use 21 or more") as e:
            await large.come()
        assert e.value.param == "memory_budget"

    asyncio.run(play())


def test_a_busy_model_has_its_time_and_is_displaced_then():
    async def play() -> None:
        residency, now = box(10)
        busy, waiting = Played("busy", residency, busy=True, up_since=100.0), Played("waiting", residency)
        await busy.come()
        coming = asyncio.create_task(waiting.come())
        await asyncio.sleep(0.01)
        assert busy.slots and not coming.done() and waiting.lines
        now[0] += RESIDENCE + 0.1
        residency.look()
        await asyncio.wait_for(coming, 5)
        assert waiting.slots and not busy.slots

    asyncio.run(play())


def test_growth_never_displaces_who_is_busy():
    async def play() -> None:
        residency, now = box(30)
        busy, grows = Played("busy", residency, busy=True), Played("grows", residency)
        await busy.come()
        await grows.come()
        now[0] += 100
        with pytest.raises(OutOfMemory, match="can't grow"):
            async with residency.room(grows, 20, grows=True):  # type: ignore[arg-type]
                pass
        busy.busy = False
        async with residency.room(grows, 20, grows=True):  # type: ignore[arg-type]
            assert not busy.slots

    asyncio.run(play())


def test_weights_of_what_sleeps_are_dropped_beyond_their_budget():
    async def play() -> None:
        residency, _ = box(100, weights=20)
        models = [Played(f"m{i}", residency, last_used=i, state="asleep") for i in range(4)]
        models[0].slots = [1]  # in use, whatever the budget
        residency.look()
        assert residency.trimming is not None
        await residency.trimming
        assert [m.dropped for m in models] == [0, 1, 0, 0]
        await residency.close()

    asyncio.run(play())
