"""Swap-out, lookup and prefetch in the step loop, over the fake device: whatever tier a prefix comes from, however late, torn or
cancelled, every text is the plain oracle's and nothing is left behind. The tiers are a dictionary that answers when told to."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rtc.cost import Costs
from engine.rtc.order import Order
from engine.rtc.wire import FILE, Event, Fetched, Fill, Found, Gone, Offer, Saved
from engine.types import Forget, PromptDone, Reserved, Sample, SamplingParams, Start, Tokens, pack_ids, sequence_id
from tests.fake_device import Engine, text_of


class SlowTiers:
    """`Tiers` that does one thing a `tick`, in order. A slot stands for DRAM, keys in `files` are files."""

    def __init__(self, engine: Engine, rng: random.Random | None = None):
        self.engine, self.rng = engine, rng
        self.kept: dict[bytes, np.ndarray] = {}
        self.files: set[bytes] = set()
        self.queue: list[Callable[[], Event | None]] = []
        self.events: list[Event] = []
        self.pins = self.torn = self.failed_writes = 0
        self.lookups: list[int] = []  # how many keys each asked for
        self.gone = False
        self.fill = Fill()
        engine.core.tiers = self  # type: ignore[assignment]
        engine.batch.loads.costs = Costs(engine.rtc.block_size, 100, 1.0, {"dram": 1e9, "ssd": 1e9})
        engine.rtc.unsaved = Order()

    def block(self, number: int) -> np.ndarray:
        size = self.engine.rtc.block_size
        return self.engine.device.memory[number * size : (number + 1) * size]

    def look_up(self, name: int, keys: list[bytes]) -> None:
        def answer() -> Found:
            offers = []
            for key in keys:
                if self.gone or key not in self.kept:
                    break
                offers.append(Offer(FILE if key in self.files else 0, 0))
            self.pins += len(offers)
            return Found(name, keys, offers)

        self.lookups.append(len(keys))
        self.queue.append(answer)

    def fetch(self, name: int, found: Found, first: int, blocks: list[int]) -> None:
        def answer() -> Fetched:
            counts = {"dram": 0, "ssd": 0}
            for block, key, offer in zip(blocks, found.keys[first:], found.offers[first:], strict=False):
                if self.gone or (self.rng is not None and self.rng.random() < 0.1):
                    self.torn += 1
                    self.block(block)[:] = -7
                    break
                self.block(block)[:] = self.kept[key]
                counts[offer.tier] += 1
            self.pins -= len(found.offers)
            return Fetched(name, counts, {"dram": 1e-6, "ssd": 1e-6})

        self.queue.append(answer)

    def release(self, found: Found) -> None:
        self.pins -= len(found.offers)

    def swap_out(self, blocks: list[int], keys: list[bytes], until: list[float]) -> None:
        def answer() -> Saved:
            for block, key in zip(blocks, keys, strict=True):
                self.kept[key] = self.block(block).copy()
            return Saved(blocks, [True] * len(blocks))

        self.queue.append(answer)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def lose(self) -> None:
        self.gone = True
        self.events.append(Gone())

    def tick(self) -> None:
        if self.queue:
            self.events.append(self.queue.pop(0)())  # type: ignore[arg-type]


def drive(engine: Engine, tiers: SlowTiers, overlapped: bool = False, limit: int = 3000) -> list[PromptDone]:
    """Run until nothing is left to do, the tiers included; what was told of prompts."""
    done: list[PromptDone] = []

    def tell(message: object) -> None:
        if isinstance(message, Tokens):
            done.extend(message.prompts or [])
            for seq, token, finish in zip(message.seqs, message.ids, message.finish, strict=True):
                if token >= 0:
                    engine.texts.setdefault(seq, []).append(token)
                if finish:
                    engine.ends[seq] = finish

    for _ in range(limit):
        engine.core.receive(idle=False)
        more = engine.step(overlapped, tell)
        engine.batch.check()
        tiers.tick()
        if not more and not tiers.queue and not tiers.events:
            assert not engine.batch.sequences, "it waits for something that doesn't come"
            assert not tiers.pins and not engine.batch.loads.asking and not engine.batch.loads.fetching and not engine.rtc.copied
            assert engine.rtc.used == 0
            return done
    raise AssertionError("no end")


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def save_all(engine: Engine, tiers: SlowTiers) -> None:
    """Have every idle block kept, then lose the device's."""
    blocks = engine.rtc.copy(10**6)
    tiers.swap_out(blocks, [engine.rtc.keys[b] or b"" for b in blocks], [0.0] * len(blocks))
    drive(engine, tiers)
    engine.rtc.reset()


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
def test_a_lost_prefix_is_loaded_and_counted_by_tier(overlapped):
    engine = Engine()
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 6)
    (cold,) = drive(engine, tiers, overlapped)
    assert (cold.cached, cold.dram, cold.ssd) == (0, 0, 0) and tiers.lookups == [7], "the last token is computed"
    save_all(engine, tiers)
    keys = list(tiers.kept)
    tiers.files = set(sorted(keys, key=keys.index)[:2])
    computed = engine.device.tokens_run
    engine.start(2, prompt, 6)
    (warm,) = drive(engine, tiers, overlapped)
    assert engine.texts[sequence_id(2, 0)] == engine.texts[sequence_id(1, 0)] == text_of(prompt, 6)
    assert warm.cached == 28 and warm.dram + warm.ssd == 28 and warm.dram > 0 and warm.ssd in (0, 4, 8)
    assert engine.device.tokens_run - computed <= 2 + 6
    load = engine.batch.load
    assert (load.populates, load.blocks_loaded, load.prefix_hits) == (1, 7, 28) and load.dram_hits + load.ssd_hits == 28
    engine.start(3, prompt, 6)
    (hot,) = drive(engine, tiers, overlapped)
    assert (hot.cached, hot.dram, hot.ssd) == (28, 0, 0), "loaded blocks are the device's own from then on"


def test_recompute_where_that_is_quicker():
    engine = Engine()
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 2)
    drive(engine, tiers)
    save_all(engine, tiers)
    assert engine.batch.loads.costs is not None
    engine.batch.loads.costs.prefill = 1e12
    engine.start(2, prompt, 2)
    (done,) = drive(engine, tiers)
    assert done.cached == 0 and engine.batch.load.blocks_recomputed == 7 and engine.batch.load.populates == 0
    assert engine.texts[sequence_id(2, 0)] == text_of(prompt, 2)


def test_a_torn_block_ends_what_is_loaded():
    engine = Engine()
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 4)
    drive(engine, tiers)
    save_all(engine, tiers)
    tiers.rng = random.Random(3)
    for task in range(2, 12):
        engine.start(task, prompt, 4)
        drive(engine, tiers)
        assert engine.texts[sequence_id(task, 0)] == text_of(prompt, 4)
        engine.rtc.reset()
    assert tiers.torn


def test_samples_and_equal_prompts_load_once():
    engine = Engine()
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 4, n=1)
    drive(engine, tiers)
    save_all(engine, tiers)
    engine.start(2, prompt, 4, n=3, seed=5)
    engine.start(3, prompt, 4)
    done = drive(engine, tiers)
    assert engine.batch.load.populates == 1
    assert sorted((d.cached, d.dram) for d in done) == [(28, 0)] * 3 + [(28, 28)]
    for sample in range(3):
        assert engine.texts[sequence_id(2, sample)] == text_of(prompt, 4, 5 + sample)


@pytest.mark.parametrize("ticks", range(4))
def test_a_cancel_while_blocks_are_looked_up_or_loaded_leaks_nothing(ticks):
    engine = Engine()
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 4)
    drive(engine, tiers)
    save_all(engine, tiers)
    engine.start(2, prompt, 4)
    for turn in range(ticks):
        if turn:
            tiers.tick()
        engine.core.receive(idle=False)
        engine.step()
        engine.batch.check()
    engine.batch.abort(2, -1)
    engine.batch.check()
    engine.start(3, [5, 6, 7, 8], 50)  # takes blocks that must not be the copy's, which comes late
    for _ in range(30):
        engine.core.receive(idle=False)
        engine.step()
        engine.batch.check()
    drive(engine, tiers)
    assert engine.texts[sequence_id(3, 0)] == text_of([5, 6, 7, 8], 50)


def test_what_others_stored_under_another_salt_is_never_found_nor_told():
    engine = Engine()
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 4, salt=b"key A")
    drive(engine, tiers)
    save_all(engine, tiers)
    for task, salt in ((2, b"key B"), (3, b""), (4, b"key A\0adapter")):
        engine.start(task, prompt, 4, salt=salt)
        (done,) = drive(engine, tiers)
        assert (done.cached, done.dram, done.ssd) == (0, 0, 0)
    assert engine.batch.load.prefix_hits == 0 and engine.batch.load.populates == 0
    engine.start(5, prompt, 4, salt=b"key A")
    (done,) = drive(engine, tiers)
    assert done.dram == 28


def test_without_the_keeper_it_goes_on():
    engine = Engine(blocks=16)
    tiers = SlowTiers(engine)
    engine.start(1, prompt_of(1, 30), 4)
    drive(engine, tiers)
    tiers.lose()
    engine.start(2, prompt_of(1, 30), 4)
    engine.start(3, prompt_of(2, 30), 4)
    drive(engine, tiers)
    assert engine.batch.loads.costs is None and engine.rtc.unsaved is None and engine.batch.load.tiers_gone == 1
    asked = len(tiers.lookups)
    engine.start(4, prompt_of(3, 30), 4)
    drive(engine, tiers)
    assert len(tiers.lookups) == asked, "nobody is asked any more"


@pytest.mark.parametrize("when", ["found", "fetching"])
def test_the_keeper_dies_while_a_prompt_waits_for_it(when):
    engine = Engine(max_seqs=1 if when == "found" else 2)
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 6)
    drive(engine, tiers)
    save_all(engine, tiers)
    engine.start(3, prompt_of(9, 10), 20)
    engine.start(2, prompt, 6)
    while not any(seq.found for seq in engine.batch.sequences.values()) if when == "found" else not engine.batch.loads.fetching:
        engine.core.receive(idle=False)
        engine.step()
        tiers.tick()
    tiers.lose()
    engine.core.receive(idle=False)
    engine.step()
    assert engine.batch.loads.costs is None
    drive(engine, tiers)
    assert engine.texts[sequence_id(2, 0)] == text_of(prompt, 6)


def test_a_lookup_made_while_nothing_runs_is_sent():
    engine = Engine(blocks=12, max_seqs=1)
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 2)
    drive(engine, tiers)
    save_all(engine, tiers)
    engine.start(4, prompt[:25], 1)
    drive(engine, tiers)
    engine.start(3, prompt_of(9, 20), 26)  # evicts what the next one's lookup begins after
    engine.step()
    engine.start(2, prompt, 4)
    while engine.batch.sequences:
        if tiers.queue:
            tiers.tick()
        else:
            assert tiers.events or engine.batch.has_work(), "it would sleep now"
        engine.core.receive(idle=False)
        engine.step()
        engine.rtc.unsaved = None  # no swap-out wakes it up
    assert len(tiers.lookups) >= 4
    drive(engine, tiers)


def test_idle_blocks_are_swapped_out_between_watermarks():
    engine = Engine(blocks=16)
    tiers = SlowTiers(engine)
    engine.start(1, prompt_of(1, 20), 4)
    drive(engine, tiers)
    assert engine.rtc.spare == 11 and not tiers.kept, "more than half can be taken without losing one"
    engine.start(2, prompt_of(2, 20), 4)
    drive(engine, tiers)
    assert 12 <= engine.rtc.spare < 16 and tiers.kept and engine.batch.load.blocks_swapped == len(tiers.kept)
    for task in range(3, 9):
        engine.start(task, prompt_of(task, 20), 4)
        drive(engine, tiers)
    assert engine.batch.load.blocks_lost == 0, "none left the device before it was kept"
    engine.start(9, prompt_of(1, 20), 4)
    (done,) = drive(engine, tiers)
    assert done.dram == 16 and engine.texts[sequence_id(9, 0)] == text_of(prompt_of(1, 20), 4)


def test_who_lends_its_blocks_loads_before_the_other_begins():
    """The decode worker of a semi pair: what it loads is told with `Reserved`, and the sequence still waits to be adopted."""
    engine = Engine()
    tiers = SlowTiers(engine)
    prompt = prompt_of(1, 30)
    engine.start(1, prompt, 4)
    drive(engine, tiers)
    save_all(engine, tiers)

    def reserve(task: int) -> Reserved:
        samples = [Sample(0, b"", 0)]
        message = Start(task, pack_ids(prompt), samples, SamplingParams(max_tokens=4), 4, [], expect=True)
        engine.batch.start(message)
        told: list[Reserved] = []
        for _ in range(12):
            engine.core.receive(idle=False)
            engine.step(False, lambda m: told.append(m) if isinstance(m, Reserved) else None)
            engine.batch.check()
            tiers.tick()
        (reserved,) = told
        return reserved

    assert reserve(2).cached == 0 and engine.batch.load.populates == 0, "whoever computes the prompt loads"
    engine.batch.abort(2, -1)
    engine.batch.lends = True
    reserved = reserve(3)
    assert (reserved.cached, reserved.dram, reserved.ssd) == (28, 28, 0)
    blocks = np.frombuffer(reserved.blocks, np.int32).tolist()
    assert np.concatenate([tiers.block(b) for b in blocks])[:28].tolist() == prompt[:28]
    memory = engine.device.memory
    memory[[blocks[p // 4] * 4 + p % 4 for p in range(28, 30)]] = prompt[28:]  # the other worker computes the rest
    assert engine.batch.adopt(sequence_id(3, 0), np.array(text_of(prompt, 1), np.int32))
    drive(engine, tiers)
    assert engine.texts[sequence_id(3, 0)] == text_of(prompt, 4)[1:]


def test_retention_and_contexts_come_with_messages():
    engine = Engine(blocks=12)
    tiers = SlowTiers(engine)
    start, batch = engine.batch.start, engine.batch

    def send(task: int, prompt: list[int], at: float, **more: object) -> PromptDone:
        def stamped(message):
            for name, value in {"at": at, **more}.items():
                setattr(message, name, value)
            start(message)

        engine.batch.start = stamped  # type: ignore[method-assign]
        engine.start(task, prompt, 2)
        engine.batch.start = start  # type: ignore[method-assign]
        (done,) = drive(engine, tiers)
        return done

    engine.core.tiers = batch.loads.costs = engine.rtc.unsaved = None  # the device's blocks alone
    send(1, prompt_of(1, 16), 10.0, context="ctx-1", preserve=True, retain=100.0)
    match = engine.rtc.match_by_id("ctx-1")
    assert match is not None and len(match.blocks) == 4
    send(2, prompt_of(2, 24), 20.0, retain=30.0)
    for task in range(3, 8):
        send(task, prompt_of(task, 20), 20.0 + task)
    assert send(8, [*prompt_of(1, 16), 5, 6], 40.0, context="ctx-1").cached == 16, "kept, though others came since"
    assert send(15, [*prompt_of(1, 16), 5, 6], 40.0, context="ctx-1", salt=b"another key").cached == 0
    engine.core.obey(Forget("ctx-1"))
    assert engine.rtc.match_by_id("ctx-1") is None
    for task in range(9, 14):
        send(task, prompt_of(task, 40), 41.0 + task)
    assert send(14, [*prompt_of(1, 16), 5, 6], 60.0).cached == 0
    assert engine.rtc.match_by_id("nothing") is None


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(14, 40), overlapped=st.booleans())
def test_random_conversations_with_a_small_device(seed, blocks, overlapped):
    """Conversations come back after their blocks have left the device; some leave early, some read torn blocks."""
    rng = random.Random(seed)
    engine = Engine(blocks=blocks, max_seqs=4, max_len=52)
    tiers = SlowTiers(engine, rng if rng.random() < 0.5 else None)
    turns = [prompt_of(n, rng.randrange(4, 20)) for n in range(6)]
    salts = [rng.choice([b"", b"a"]) for _ in turns]
    asked: dict[int, tuple[list[int], int]] = {}
    gone: set[int] = set()
    for task in range(1, 24):
        who = rng.randrange(6)
        if len(turns[who]) > 36:
            turns[who] = prompt_of(seed % 97 + task, 8)
        count = rng.randrange(1, 8)
        asked[task] = (list(turns[who]), count)
        engine.start(task, turns[who], count, salt=salts[who], priority=rng.choice([0, 0, 1]))
        turns[who] = turns[who] + text_of(turns[who], count) + prompt_of(task, rng.randrange(1, 5))
        for _ in range(rng.randrange(0, 6)):
            engine.core.receive(idle=False)
            engine.step(overlapped)
            engine.batch.check()
            if rng.random() < 0.6:
                tiers.tick()
            for key in list(tiers.kept):
                if rng.random() < 0.01:
                    tiers.files.add(key)
        if rng.random() < 0.15:
            engine.batch.abort(task, -1)
            gone.add(task)
            engine.batch.check()
        if rng.random() < 0.1:
            engine.rtc.reset()
    drive(engine, tiers, overlapped)
    for task, (prompt, count) in asked.items():
        if task not in gone:
            assert engine.texts[sequence_id(task, 0)] == text_of(prompt, count), f"task {task}"
