"""The index of the DRAM and SSD tiers, the order in which things are given up, and the load-or-recompute rule. All pure."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rtc.cost import FIXED_SECONDS, Costs
from engine.rtc.order import Order
from engine.rtc.pool import Dram, Files, Pool, geometry
from engine.rtc.wire import FILE, KNOWN, NOWHERE, Filed, Lost, Match, Matched, Placed, Put, Release, Stored, Unlink

A, B, C, D = (bytes([n]) * 16 for n in range(4))
SLOT = 100  # bytes


def pool(slots: int = 2, file_bytes: int = 0, files: list[tuple[str, int, float]] | None = None) -> Pool:
    marked: dict[int, int] = {}
    dram = Dram(slots, marked.__setitem__) if slots else None
    made = Pool(dram, SLOT, Files(file_bytes, files or ()) if file_bytes else None, bytes.hex)
    made.marked = marked  # type: ignore[attr-defined]
    return made


def put(pool: Pool, te: int, keys: list[bytes], now: float, until: float = 0.0, leaving: bool = False) -> Placed:
    answer = pool.answer(te, Put(keys, [until] * len(keys), leaving), now)
    assert isinstance(answer, Placed)
    return answer


def store(pool: Pool, te: int, keys: list[bytes], now: float, until: float = 0.0) -> Placed:
    answer = put(pool, te, keys, now, until)
    assert pool.answer(te, Stored(keys), now) is None
    pool.check()
    return answer


def match(pool: Pool, te: int, keys: list[bytes], now: float) -> Matched:
    answer = pool.answer(te, Match(keys), now)
    assert isinstance(answer, Matched)
    pool.check()
    return answer


# ---- order ----------------------------------------------------------------------------------------------------------


def test_retention_decays_to_plain_lru():
    order: Order[str] = Order()
    order.add("kept", 0.0, until=100.0)
    order.add("early", 10.0)
    order.add("late", 60.0)
    assert order.first(60.0) == "early"
    order.discard("early")
    assert order.first(60.0) == "kept", "0 + the 40 s that are left: less than 60"
    assert order.first(30.0) == "late", "0 + 70 s: as if used after it"
    order.add("later", 99.0)
    assert [order.pop(100.0) for _ in range(3)] == ["kept", "late", "later"], "at its end it is as old as its use"
    with pytest.raises(KeyError):
        order.pop(100.0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_first_is_always_the_least(seed):
    rng, order, now = random.Random(seed), Order(), 0.0
    for _ in range(300):
        now += rng.choice([0, 0, 0.5, 1, 7])
        match rng.randrange(4):
            case 0 | 1:
                order.add(rng.randrange(30), now, now + rng.choice([-1, 0, 3, 10, 50]))
            case 2:
                order.discard(rng.randrange(30))
            case 3:
                least = min(order, key=lambda thing: order.priority(thing, now), default=None)
                assert order.first(now) == least
                if least is not None and rng.random() < 0.7:
                    assert order.pop(now) == least


def test_heaps_do_not_grow_with_use():
    order: Order[int] = Order()
    for n in range(5000):
        order.add(n % 3, float(n), float(n + 5))
    assert len(order.kept) + len(order.plain) < 300


# ---- DRAM -----------------------------------------------------------------------------------------------------------


def test_a_block_is_found_once_it_is_written_and_by_any_te():
    p = pool()
    placed = put(p, 0, [A], 1.0)
    assert placed.slots == [0] and placed.generations == [1] and p.marked == {0: 1}
    assert match(p, 1, [A], 1.0).slots == [], "it is being written"
    assert put(p, 1, [A], 1.0).slots == [KNOWN], "one writer is enough"
    p.answer(1, Stored([A]), 1.0)
    assert match(p, 1, [A], 1.0).slots == [], "not the writer's word"
    p.answer(0, Stored([A]), 1.0)
    assert match(p, 1, [A, B], 2.0).slots == [0]
    assert p.fill().dram_bytes == SLOT


def test_the_oldest_goes_and_what_is_pinned_stays():
    p = pool(2)
    store(p, 0, [A], 1.0)
    store(p, 0, [B], 2.0)
    assert match(p, 1, [A], 3.0).slots == [0]
    store(p, 0, [C], 4.0)
    assert match(p, 1, [B], 5.0).slots == [], "A is older, but pinned"
    assert match(p, 2, [C], 5.0).slots == [1]
    assert put(p, 0, [D], 6.0).slots == [NOWHERE]
    p.answer(1, Release([A]), 7.0)
    placed = store(p, 0, [D], 8.0)
    assert placed.slots == [0] and placed.generations == [2], "a slot's new content has a new generation"
    assert p.fill().dram_evictions == 2


def test_retention_goes_with_the_block():
    p = pool(2)
    store(p, 0, [A], 1.0, until=50.0)
    store(p, 0, [B], 2.0)
    store(p, 0, [C], 3.0)
    assert match(p, 0, [A], 4.0).slots and not match(p, 0, [B], 4.0).slots
    p.answer(0, Release([A]), 4.0)
    store(p, 0, [B], 60.0)
    store(p, 0, [D], 61.0)
    assert match(p, 0, [B], 62.0).slots and match(p, 0, [D], 62.0).slots


def test_pins_and_half_written_slots_die_with_their_te():
    p = pool(2)
    store(p, 0, [A], 1.0)
    assert match(p, 1, [A], 2.0).slots and match(p, 1, [A], 2.0).slots
    put(p, 1, [B], 2.0)
    assert put(p, 0, [C], 3.0).slots == [NOWHERE]
    p.leave(1, 4.0)
    p.check()
    assert store(p, 0, [C, D], 5.0).slots == [1, 0]
    assert match(p, 0, [B], 6.0).slots == []
    p.answer(1, Release([A]), 7.0)
    p.check()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_with_files_alone_blocks_go_to_files():
    p = pool(0, 250)
    assert put(p, 0, [A, B], 1.0).slots == [FILE, FILE]
    for key in (A, B):
        answer = p.answer(0, Filed(key, SLOT, 0.0), 1.0)
        assert isinstance(answer, Unlink) and answer.names == []
    assert put(p, 0, [A, C], 2.0).slots == [KNOWN, FILE]
    answer = p.answer(0, Filed(C, SLOT, 0.0), 3.0)
    assert isinstance(answer, Unlink) and answer.names == [B.hex()], "A was asked for since"
    assert match(p, 0, [A, C, B], 4.0).slots == [FILE, FILE] and p.fill().ssd_bytes == 2 * SLOT
    p.answer(0, Lost(A), 5.0)
    assert match(p, 0, [A], 6.0).slots == []
    p.check()


def test_files_from_before_are_found_and_the_oldest_go_first():
    before = [(A.hex(), 100, 50.0), (B.hex(), 100, 90.0), ("another-model", 100, 70.0)]
    p = pool(0, 250, before)
    assert match(p, 0, [A], 1.0).slots == [FILE] and match(p, 0, [B], 1.0).slots == []
    answer = p.answer(0, Filed(C, SLOT, 0.0), 1.0)
    assert isinstance(answer, Unlink) and answer.names == [B.hex(), "another-model"]


def test_dram_goes_on_to_files_before_it_is_full():
    p = pool(8, 10_000)
    keys = [bytes([n]) * 16 for n in range(20)]
    assert store(p, 0, keys[:6], 1.0).demote == []
    placed = store(p, 0, keys[6:8], 2.0)
    assert [one.key for one in placed.demote] == keys[:2], "a quarter of the slots can be taken without loss"
    p.answer(0, Filed(keys[0], SLOT, 0.0), 2.0)
    p.answer(0, Release([keys[0]]), 2.0)
    p.leave(0, 3.0)  # without having written the second
    p.check()
    assert {one.key for one in put(p, 1, [], 4.0, leaving=True).demote} == set(keys[1:8]), "what it has not written others may"
    assert len(match(p, 1, keys[:8], 5.0).slots) == 8


def test_a_te_that_leaves_writes_files():
    p = pool(4, 10_000)
    store(p, 0, [A, B], 1.0)
    placed = put(p, 0, [C, A], 2.0, leaving=True)
    assert placed.slots == [FILE, KNOWN] and {one.key for one in placed.demote} == {A, B}
    assert put(pool(4), 0, [C], 2.0, leaving=True).slots == [NOWHERE]


def test_without_tiers_for_it_a_message_is_nothing():
    p = pool(2)
    p.answer(0, Lost(A), 1.0)
    q = pool(0, 100)
    q.answer(0, Stored([A]), 1.0)
    q.answer(0, Release([A]), 1.0)
    q.leave(0, 1.0)
    assert match(q, 0, [A], 2.0).slots == []


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(0, 6), file_bytes=st.sampled_from([0, 150, 650]))
def test_random_walk_keeps_every_invariant(seed, slots, file_bytes):
    """TEs put, write, match, release, file and die in any order."""
    rng, p, now = random.Random(seed), pool(slots, file_bytes), 0.0
    keys = [bytes([n]) * 16 for n in range(10)]
    writing: dict[int, list[bytes]] = {te: [] for te in range(3)}
    pinned: dict[int, list[bytes]] = {te: [] for te in range(3)}
    for _ in range(120):
        now += rng.choice([0.0, 1.0, 5.0])
        te = rng.randrange(3)
        some = rng.sample(keys, rng.randrange(1, 4))
        match rng.randrange(6):
            case 0 | 1:
                placed = put(p, te, some, now, until=now + rng.choice([0, 10]), leaving=rng.random() < 0.1)
                writing[te] += [k for k, slot in zip(some, placed.slots, strict=True) if slot >= 0]
                for key in [k for k, slot in zip(some, placed.slots, strict=True) if slot == FILE]:
                    p.answer(te, Filed(key, SLOT, 0.0), now)
                for one in placed.demote:
                    if rng.random() < 0.7:
                        p.answer(te, Filed(one.key, SLOT, one.until), now)
                        p.answer(te, Release([one.key]), now)
                    else:
                        pinned[te].append(one.key)
            case 2:
                p.answer(te, Stored(writing[te]), now)
                writing[te] = []
            case 3:
                found = match(p, te, some, now)
                pinned[te] += [k for k, slot in zip(some, found.slots, strict=False) if slot >= 0]
            case 4:
                p.answer(te, Release(pinned[te]), now)
                pinned[te] = []
            case 5 if rng.random() < 0.3:
                p.leave(te, now)
                writing[te], pinned[te] = [], []
        p.check()
    for te in range(3):
        p.leave(te, now)
    p.check()
    assert p.dram is None or len(p.dram.idle) == len(p.dram.blocks), "pins outlive every TE"


def test_geometry():
    first, nbytes = geometry(1000, 368_640)
    assert first == 8192 and nbytes % (2 << 20) == 0 and nbytes >= first + 1000 * 368_640


# ---- cost -----------------------------------------------------------------------------------------------------------


def costs(**bandwidth: float) -> Costs:
    return Costs(block_tokens=16, block_bytes=1000, prefill=1600.0, bandwidth=bandwidth)  # type: ignore[arg-type]


def test_loading_wins_where_it_is_faster():
    c = costs(dram=1e6, ssd=50_000.0)  # a block: 10 ms computed, 1 ms from DRAM, 20 ms from SSD
    assert c.blocks_to_load(["dram"] * 5) == 5
    assert c.blocks_to_load(["ssd"] * 5) == 0
    assert c.blocks_to_load(["dram", "dram", "ssd", "ssd"]) == 2
    assert c.blocks_to_load(["ssd"] + ["dram"] * 5) == 6, "what comes after it makes up for the slow one"
    assert c.blocks_to_load([]) == 0


def test_the_fixed_cost_counts_once():
    c = costs(dram=1000 / (0.010 - FIXED_SECONDS / 2))
    assert c.blocks_to_load(["dram"]) == 0 and c.blocks_to_load(["dram"] * 3) == 3


def test_constants_follow_what_is_measured():
    c = costs(dram=1e6, ssd=50_000.0)
    for _ in range(50):
        c.loaded("ssd", 1000, 0.001)
        c.stepped(200, 3, 2.0)
        c.stepped(8, 0, 1e-6)
        c.stepped(40, 60, 1e-6)
    assert c.bandwidth["ssd"] == pytest.approx(1e6, rel=0.01) and c.prefill == pytest.approx(100, rel=0.01)
    assert c.blocks_to_load(["ssd"] * 5) == 5
