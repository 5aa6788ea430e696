"""Who gives weights to whom: no source sends twice at once, the tree doubles, what is near comes first, who dies is replaced."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from scale.fork import ANYWHERE, SAME_DEVICE, SAME_DOMAIN, SAME_HOST, Holder, Move, Plan, Taker, Way, assign, nearness, schedule


def holder(te: int, index: int, host: int = 0, domain: int = 0, free: bool = True, device: str = "npu") -> Holder:
    return Holder(te, device, index, free, host, domain)


def taker(te: int, index: int, host: int = 0, domain: int = 0, device: str = "npu") -> Taker:
    return Taker(te, device, index, host, domain)


def in_rounds(source: Holder, to: Taker, way: Way) -> float:
    return 0.0 if way == "map" else 1.0


def check(plan: Plan, sources: set[int], takers: set[int], deaths: dict[int, float] | None = None) -> None:
    """Whatever the plan: each taker once and for all, from one that had its weights then and lived, no two copies out of one."""
    deaths = deaths or {}
    done = {move.taker: move for move in plan.moves if move.done}
    assert len(done) == sum(move.done for move in plan.moves), "nobody gets them twice"
    assert set(done) | {t.te for t in plan.left} | set(deaths) >= takers
    assert not set(done) & {t.te for t in plan.left}
    for move in plan.moves:
        assert move.source in sources or done[move.source].ended <= move.began, "a source must have what it gives"
        assert move.depth == (1 if move.source in sources else done[move.source].depth + 1)
        if move.done:
            assert move.ended < deaths.get(move.source, math.inf) and move.ended < deaths.get(move.taker, math.inf)
        else:
            assert move.ended in (deaths.get(move.source), deaths.get(move.taker))
    for te in sources | takers:
        sent = sorted((m.began, m.ended) for m in plan.moves if m.source == te and m.way == "copy")
        assert all(end <= start for (_, end), (start, _) in pairwise(sent)), f"TE {te} sends twice at once"
        got = sorted((m.began, m.ended) for m in plan.moves if m.taker == te)
        assert all(end <= start for (_, end), (start, _) in pairwise(got))


def test_one_source_to_many_doubles_each_round() -> None:
    for count in (1, 2, 3, 7, 8, 31, 63, 64, 100):
        plan = schedule([holder(0, 0)], [taker(n, n) for n in range(1, count + 1)], in_rounds)
        check(plan, {0}, set(range(1, count + 1)))
        assert not plan.left and plan.depth <= plan.seconds == math.ceil(math.log2(count + 1))


def test_several_sources_share_the_work() -> None:
    plan = schedule([holder(n, n) for n in range(4)], [taker(n, n) for n in range(4, 64)], in_rounds)
    check(plan, set(range(4)), set(range(4, 64)))
    assert plan.seconds == 4


def test_in_the_memory_of_a_host_all_map_at_once() -> None:
    plan = schedule([holder(0, 0, device="cpu")], [taker(n, n, device="cpu") for n in range(1, 64)], in_rounds)
    check(plan, {0}, set(range(1, 64)))
    assert plan.seconds == 0 and {move.way for move in plan.moves} == {"map"} and plan.depth == 1
    starts = assign([holder(0, 0, free=False, device="cpu")], [taker(1, 1, device="cpu")])
    assert [way for _, _, way in starts] == ["map"], "a source that is busy is mapped all the same"
    assert assign([holder(0, 0, host=1, device="cpu")], [taker(1, 0, device="cpu")]) == [], "not from another host"


def test_the_same_device_is_mapped_and_that_first() -> None:
    starts = assign([holder(0, 0), holder(1, 1, free=False)], [taker(2, 2), taker(3, 1), taker(4, 3)])
    assert [(t.te, h.te, way) for t, h, way in starts] == [(3, 1, "map"), (2, 0, "copy")]


def test_one_copy_to_a_device_the_others_there_map_it() -> None:
    takers = [taker(1, 1), taker(2, 1), taker(3, 1)]
    starts = assign([holder(0, 0), holder(9, 9)], takers)
    assert [(t.te, h.te, way) for t, h, way in starts] == [(1, 0, "copy")]
    assert assign([holder(0, 0, free=False), holder(9, 9)], takers[1:], coming=takers[:1]) == []
    plan = schedule([holder(0, 0)], takers, in_rounds)
    assert [m.way for m in plan.moves] == ["copy", "map", "map"] and plan.seconds == 1


def test_the_nearest_source_is_taken() -> None:
    far, near, there = holder(0, 0, host=9, domain=3), holder(1, 0, host=7), holder(2, 0, host=1)
    wants = taker(3, 5, host=1)
    assert [nearness(h, wants) for h in (far, near, there)] == [ANYWHERE, SAME_DOMAIN, SAME_HOST]
    assert nearness(holder(4, 5, host=1), wants) == SAME_DEVICE
    for known, expected in (([far, near, there], 2), ([far, near], 1), ([far], 0)):
        assert [h.te for _, h, _ in assign(known, [wants])] == [expected]


def test_a_host_that_has_a_holder_serves_its_own() -> None:
    busy = holder(0, 0, host=0, free=False)
    elsewhere = holder(1, 0, host=1)
    assert assign([busy, elsewhere], [taker(2, 1, host=0)]) == [], "its own is busy for a short time only"
    assert [h.te for _, h, _ in assign([busy, elsewhere], [taker(2, 1, host=0)], refused={(2, 0)})] == [1], "... if it works"
    # Two takers on a host without: one copy goes there, the other waits for it.
    both = [taker(3, 0, host=5), taker(4, 1, host=5)]
    assert [t.te for t, _, _ in assign([elsewhere, holder(6, 1, host=1)], both)] == [3]


def test_half_of_the_holders_send_to_hosts_that_have_none() -> None:
    holders = [holder(n, n) for n in range(4)]
    near = [taker(n, n) for n in range(4, 8)]
    far = [taker(10 + n, 0, host=1 + n) for n in range(5)]
    starts = assign(holders, near + far)
    assert sorted(t.te for t, _, _ in starts) == [4, 5, 10, 11]
    # What is on its way counts: two holders are busy with it, and two more are in no hurry to follow.
    starts = assign([holder(0, 0), holder(1, 1), holder(2, 2, free=False), holder(3, 3, free=False)], near + far[2:], far[:2])
    assert sorted(t.te for t, _, _ in starts) == [4, 5]


def test_other_devices_don_t_help() -> None:
    assert assign([holder(0, 0, device="cuda")], [taker(1, 0)]) == []
    plan = schedule([holder(0, 0, device="cuda")], [taker(1, 0)], in_rounds)
    assert not plan.moves and [t.te for t in plan.left] == [1]


def test_what_was_refused_is_not_tried_again() -> None:
    one, other = holder(0, 0), holder(1, 1)
    assert [h.te for _, h, _ in assign([one, other], [taker(2, 2)])] == [0]
    assert [h.te for _, h, _ in assign([one, other], [taker(2, 2)], refused={(2, 0)})] == [1]
    assert assign([one, other], [taker(2, 2)], refused={(2, 0), (2, 1)}) == []
    assert [(t.te, h.te) for t, h, _ in assign([one], [taker(2, 2), taker(3, 3)], refused={(2, 0)})] == [(3, 0)]
    # Not mapped from one, but from another one on the device.
    assert [h.te for _, h, _ in assign([one, holder(5, 0)], [taker(2, 0)], refused={(2, 0)})] == [5]


def test_a_source_dies_half_way() -> None:
    plan = schedule([holder(0, 0), holder(1, 1)], [taker(2, 2), taker(3, 3)], in_rounds, {1: 0.5})
    check(plan, {0, 1}, {2, 3}, {1: 0.5})
    assert not plan.left
    assert [(m.taker, m.source, m.began, m.ended, m.done) for m in plan.moves] == [
        (3, 1, 0.0, 0.5, False),
        (2, 0, 0.0, 1.0, True),
        (3, 0, 1.0, 2.0, True),
    ]


def test_the_only_source_dies() -> None:
    plan = schedule([holder(0, 0)], [taker(1, 1), taker(2, 2)], in_rounds, {0: 0.5})
    assert sorted(t.te for t in plan.left) == [1, 2], "they go to DRAM, or to disk"
    plan = schedule([holder(0, 0)], [taker(1, 1), taker(2, 2)], in_rounds, {0: 1.5})
    assert not plan.left and [(m.taker, m.source) for m in plan.moves if m.done] == [(1, 0), (2, 1)]


def test_a_taker_dies() -> None:
    plan = schedule([holder(0, 0)], [taker(1, 1), taker(2, 2)], in_rounds, {1: 0.5})
    check(plan, {0}, {1, 2}, {1: 0.5})
    assert [(m.taker, m.done) for m in plan.moves] == [(1, False), (2, True)] and plan.seconds == 1.5, (
        "its source is free at once"
    )


@pytest.mark.parametrize("seed", range(60))
def test_any_cluster_any_deaths(seed: int) -> None:
    rng = random.Random(seed)
    hosts, domain = rng.randint(1, 6), rng.randint(1, 3)
    count, sources = rng.randint(2, 50), rng.randint(1, 3)
    places = [(rng.randrange(8), rng.randrange(hosts)) for _ in range(count + sources)]
    holders = [holder(n, index, host, host // domain) for n, (index, host) in enumerate(places[:sources])]
    takers = [taker(n, index, host, host // domain) for n, (index, host) in enumerate(places[sources:], sources)]
    took = {(a, b.te): rng.choice([0.1, 0.2, 0.7]) for a in range(count + sources) for b in takers}
    deaths = {te: rng.uniform(0, 2) for te in rng.sample(range(count + sources), rng.randint(0, count // 3))}

    def seconds(source: Holder, to: Taker, way: Way) -> float:
        return 0.0 if way == "map" else took[source.te, to.te]

    plan = schedule(holders, takers, seconds, deaths)
    check(plan, {h.te for h in holders}, {t.te for t in takers}, deaths)
    if not set(deaths) >= {h.te for h in holders}:
        assert not plan.left, "as long as one source lives, everybody is served"
    longest = 3 + math.ceil(math.log2(count + 1))
    if not deaths:
        assert plan.seconds <= 0.7 * (longest + 3 * math.log2(count + 1)), "a tree, not a queue"


def test_a_thousand_are_planned_at_once() -> None:
    """Fast enough to be asked at each event: one look at 1000 TEs is some milliseconds."""
    takers = [taker(n, n % 8, n // 8, n // 384) for n in range(8, 1000)]
    starts = assign([holder(n, n) for n in range(8)], takers)
    assert len(starts) == 8 and len({h.te for _, h, _ in starts}) == 8
    moves: list[Move] = schedule([holder(0, 0)], [taker(n, n % 8, n // 8, n // 384) for n in range(1, 400)], in_rounds).moves
    assert len(moves) == 399
