"""The step loops of two ranks over slower tiers that only the master has: whatever comes when, they plan and keep the same."""

from __future__ import annotations

import random
from collections import deque

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rtc.cost import Costs
from engine.rtc.wire import Measured
from engine.spmd import Turn
from engine.types import sequence_id
from tests.fake_device import Engine, text_of
from tests.test_rtc_batch import SlowTiers, prompt_of


class Ranks:
    """A master and a rank behind it, on one memory: what either writes there the other would too."""

    def __init__(self, rng: random.Random, overlapped: bool, blocks: int):
        self.rng, self.overlapped = rng, overlapped
        self.both = self.master, self.rank = [Engine(blocks=blocks, max_seqs=4, max_len=52) for _ in range(2)]
        self.rank.device.memory = self.master.device.memory
        self.tiers = SlowTiers(self.master, rng)
        self.master.batch.loads.costs = self.master.rtc.unsaved = None  # until they are measured
        self.turns: deque[bytes] = deque()
        self.now = 1.0
        self.master.core.agree, self.rank.core.agree = self.lead, self.follow
        self.master.core.clock = self.tell_time
        self.master.core.events.append(Measured(Costs(4, 100, 1.0, {"dram": 1e9, "ssd": 1e9})))

    def tell_time(self) -> float:
        """Of the master alone: the other's stands still. Now loading is quicker, now computing."""
        self.now += 10.0 ** self.rng.uniform(-9, 1)
        return self.now

    def lead(self, turn: Turn) -> Turn:
        self.turns.append(msgspec.msgpack.encode(turn))
        return turn

    def follow(self, turn: Turn) -> Turn:
        agreed = msgspec.msgpack.decode(self.turns.popleft(), type=Turn)
        assert turn[:3] == ([], [], []) and turn[3] == agreed[3]
        return agreed

    def turn(self) -> bool:
        """A turn of both loops; whether there is more to do."""
        more = []
        for engine in self.both:
            engine.core.receive(idle=False)
            more.append(engine.step(self.overlapped))
            engine.batch.check()
        self.compare()
        if self.rng.random() < 0.6:
            self.tiers.tick()
        self.tiers.files.update(key for key in self.tiers.kept if self.rng.random() < 0.01)
        assert more[0] == more[1]
        return more[0] or bool(self.tiers.queue or self.tiers.events)

    def compare(self) -> None:
        one, other = (engine.rtc for engine in self.both)
        assert np.array_equal(self.master.batch.tables, self.rank.batch.tables)
        for field in ("refs", "keys", "until", "free_list", "touched", "copied", "by_key", "losses"):
            assert getattr(one, field) == getattr(other, field), field
        assert list(one.idle) == list(other.idle)
        assert (one.unsaved is None) == (other.unsaved is None) and list(one.unsaved or ()) == list(other.unsaved or ())
        assert self.master.batch.loads.costs == self.rank.batch.loads.costs
        assert self.master.texts == self.rank.texts


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(14, 30), overlapped=st.booleans())
def test_ranks_keep_the_same_whatever_the_master_hears_and_times(seed, blocks, overlapped):
    rng = random.Random(seed)
    ranks = Ranks(rng, overlapped, blocks)
    lost = rng.randrange(60)
    asked: dict[int, tuple[list[int], int]] = {}
    for task in range(1, 24):
        prompt, count = prompt_of(rng.randrange(4), rng.randrange(8, 36)), rng.randrange(1, 8)
        asked[task] = (prompt, count)
        for engine in ranks.both:
            engine.start(task, prompt, count)
        for _ in range(rng.randrange(6)):
            ranks.turn()
        if rng.random() < 0.15:
            del asked[task]
            for engine in ranks.both:
                engine.batch.abort(task, -1)
        if task == lost:
            ranks.tiers.lose()
    for _ in range(3000):
        if not ranks.turn():
            break
    for task, (prompt, count) in asked.items():
        assert ranks.rank.texts[sequence_id(task, 0)] == text_of(prompt, count), f"task {task}"
    assert not ranks.turns and not ranks.rank.batch.sequences and ranks.rank.rtc.used == 0
