"""The autoscaler: what it must never do under any signals, and what it does with TEs that take time to come (a toy plant)."""

from __future__ import annotations

import itertools
import math
import random

import msgspec
import pytest

from bench.scale_simulation import Course, Load, Plant
from scale import autoscale
from scale.autoscale import CALM, COOL_DOWN, GROWTH, Bounds, Decision, Memory, Resident, Signals, decide, leaving, told

BOUNDS = Bounds(1, 64, None)


def signals(now: float = 0.0, ready: int = 1, **more: object) -> Signals:
    return Signals(**{"now": now, "ready": ready, "starting": 0, "queued": 0, "running": 0, "slots": 8, **more})  # type: ignore[arg-type]


def any_signals(rng: random.Random, now: float) -> Signals:
    total = rng.choice([0, 0, rng.randrange(100)])
    return signals(
        now,
        ready=rng.choice([0, 1, rng.randrange(70)]),
        starting=rng.choice([0, 0, rng.randrange(10)]),
        queued=rng.choice([0, 0, rng.randrange(10), rng.randrange(1000)]),
        running=rng.choice([0, rng.randrange(600)]),
        slots=rng.choice([1, 8, 64]),
        predicted_wait_s=rng.choice([0.0, rng.uniform(0, 1), rng.uniform(0, 1e5)]),
        kv_usage=rng.random(),
        ttft_misses=rng.randint(0, total),
        ttft_total=total,
        tpot_misses=rng.randint(0, total),
        tpot_total=total,
        idle_s=rng.choice([0.0, rng.uniform(0, 1000)]),
        draining=rng.choice([0, 0, 1]),
        role=rng.choice(["colocated", "prefill", "decode", "semi"]),
    )


# ---- whatever the signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_bounds_and_pace_under_any_signals(seed: int) -> None:
    rng = random.Random(seed)
    least = rng.randrange(4)
    bounds = Bounds(least, max(1, least + rng.randrange(60)), rng.choice([None, 0.0, 30.0, 300.0]))
    memory, now, went_down = Memory(), 1000.0, -math.inf
    for _ in range(400):
        now += rng.choice([0.0, 0.1, 1.0, rng.uniform(0, 100)])
        seen = any_signals(rng, now)
        before = memory.target
        decision = decide(seen, bounds, memory)
        memory, target = decision.memory, decision.target
        assert bounds.min_te <= target <= bounds.max_te and decision.reason and memory.target == target
        assert math.isfinite(memory.rate) and 0 <= memory.missed <= 1 and 1 <= memory.patience <= autoscale.PATIENCE_MOST
        if before < 0:
            continue
        assert target <= GROWTH * max(1, before, bounds.min_te)
        if target < before:
            assert seen.queued + seen.running <= seen.slots * max(1, seen.ready), "nobody lacks a slot when there get fewer"
            if target > bounds.min_te or bounds.keep_alive is None:
                assert now - went_down >= COOL_DOWN and target >= before - max(1, before // 4)
                went_down = now
        if target == 0 and before > 0:
            assert bounds.keep_alive is not None and seen.idle_s >= bounds.keep_alive
            assert not seen.running and not seen.queued
        if before == 0 and seen.queued:
            assert target > 0, "from zero at once"


@pytest.mark.parametrize("seed", range(40))
def test_more_waiting_never_means_fewer(seed: int) -> None:
    rng = random.Random(seed)
    bounds = Bounds(rng.randrange(2), 64, rng.choice([None, 60.0]))
    memory, now = Memory(), 0.0
    for _ in range(60):
        now += rng.choice([0.5, 1.0, 20.0])
        seen = any_signals(rng, now)
        targets = [
            decide(msgspec.structs.replace(seen, queued=queued), bounds, memory).target for queued in (0, 1, 2, 5, 20, 100, 1000)
        ]
        assert targets == sorted(targets), targets
        memory = decide(seen, bounds, memory).memory


# ---- one at a time --------------------------------------------------------------------------------------------------


def looks(memory: Memory, bounds: Bounds, *seen: Signals) -> list[Decision]:
    decisions = []
    for each in seen:
        decisions.append(decide(each, bounds, memory))
        memory = decisions[-1].memory
    return decisions


def test_from_zero_at_once_and_as_many_as_wait() -> None:
    bounds = Bounds(0, 8, 60.0)
    asleep, first = looks(Memory(), bounds, signals(ready=0), signals(0.5, ready=0, queued=1))
    assert asleep.target == 0 and "asleep" in asleep.reason
    assert first.target == 1 and first.reason.startswith("0 to 1")
    assert decide(signals(0.5, ready=0, queued=20), bounds, asleep.memory).target == 4, "20 sequences on 8 slots each"
    waiting = decide(signals(1.0, ready=0, starting=1, queued=2), bounds, first.memory)
    assert waiting.target == 1, "it is on its way"


def test_to_zero_after_keep_alive_only() -> None:
    bounds = Bounds(0, 8, 60.0)
    memory = told(Memory(), 2, 0.0)
    seen = [signals(float(t), ready=2, idle_s=float(t)) for t in range(0, 59)]
    assert {d.target for d in looks(memory, bounds, *seen)} == {2}
    *_, last = looks(memory, bounds, *seen, signals(60.0, ready=2, idle_s=60.0))
    assert last.target == 0 and "keep-alive is 60 s" in last.reason
    assert decide(signals(60.0, ready=2, idle_s=60.0, running=1), bounds, memory).target == 2, "a sequence runs yet"
    never = looks(memory, Bounds(0, 8, None), *(signals(float(t), ready=2, idle_s=float(t)) for t in range(0, 4000, 5)))
    assert never[-1].target == 1, "without keep-alive one stays"
    few = looks(memory, Bounds(2, 8, 60.0), signals(100.0, ready=2, idle_s=100.0))
    assert few[-1].target == 2


def test_a_tenfold_jump_is_answered_within_two_looks() -> None:
    memory = told(Memory(), 4, 0.0)
    jump = [signals(100.0 + n, ready=4, queued=300 + n, running=32, predicted_wait_s=10.0) for n in range(2)]
    one, two = looks(memory, BOUNDS, *jump)
    assert one.target == 16 and two.target >= 40
    assert "wait" in one.reason


def test_a_little_more_must_be_seen_twice() -> None:
    memory = told(Memory(), 4, 0.0)
    more, calm = signals(100.0, ready=4, queued=3, running=27), signals(101.0, ready=4, running=20)
    assert [d.target for d in looks(memory, BOUNDS, more, calm, more, calm)] == [4, 4, 4, 4]
    assert [d.target for d in looks(memory, BOUNDS, more, more)] == [4, 5]


def test_missed_promises_bring_more_and_count_anew_with_them() -> None:
    memory = told(Memory(), 4, 0.0)
    late = {"ttft_total": 20, "ttft_misses": 4, "running": 8}
    course = looks(memory, BOUNDS, *(signals(100.0 + n, ready=4, **late) for n in range(7)))
    assert course[-1].target == 6 and any("20% of promises missed" in d.reason for d in course)
    rest = looks(course[-1].memory, BOUNDS, *(signals(107.0 + n, ready=4, starting=2, **late) for n in range(20)))
    assert {d.target for d in rest} == {6}, "those that were ordered are not there yet"
    after = looks(rest[-1].memory, BOUNDS, *(signals(130.0 + n, ready=6, **late) for n in range(10)))
    assert after[-1].target > 6
    few = looks(memory, BOUNDS, *(signals(100.0 + n, ready=4, ttft_total=1, ttft_misses=1) for n in range(3)))
    assert few[-1].target == 4, "three late ones are no share"


def test_each_role_is_judged_by_its_own_promise() -> None:
    late = {"tpot_total": 500, "tpot_misses": 100, "ttft_total": 50, "running": 8}
    memory = told(Memory(), 2, 0.0)
    targets = {}
    for role in ("prefill", "decode", "colocated"):
        course = looks(memory, BOUNDS, *(signals(100.0 + n, ready=2, role=role, **late) for n in range(6)))
        targets[role] = course[-1].target
    assert targets["prefill"] == 2 and targets["decode"] > 2 and targets["colocated"] > 2


def test_a_full_kv_cache_brings_more() -> None:
    memory = told(Memory(), 4, 0.0)
    full = [signals(100.0 + n, ready=4, running=8, kv_usage=0.95) for n in range(2)]
    assert looks(memory, BOUNDS, *full)[-1].target == 6


def test_slowly_down_and_not_before_what_drains_is_gone() -> None:
    memory = told(Memory(), 16, 0.0)
    idle = [signals(float(t), ready=16, running=4, draining=int(t < 100)) for t in range(400)]
    course = looks(memory, BOUNDS, *idle)
    targets = [d.target for d in course]
    assert targets[100] == 12 and set(targets[:100]) == {16}, "it waits for those that drain"
    assert targets == sorted(targets, reverse=True) and targets[-1] == 1
    changes = [t for t, (a, b) in enumerate(itertools.pairwise(targets)) if a != b]
    assert all(b - a >= COOL_DOWN for a, b in itertools.pairwise(changes))
    undisturbed = looks(memory, BOUNDS, *(signals(float(t), ready=16, running=4) for t in range(400)))
    assert CALM <= next(t for t, d in enumerate(undisturbed) if d.target < 16) <= 2 * CALM + 1


def test_a_step_down_that_was_wrong_is_not_soon_taken_again() -> None:
    """A load that is too much for one TE, and idle for two calm times in between: each round takes longer than the one before."""
    memory, now, rounds = told(Memory(), 2, 0.0), 0.0, []
    for _ in range(5):
        began = now
        while (decision := decide(signals(now, ready=2, running=1), BOUNDS, memory)).target == 2:
            memory, now = decision.memory, now + 1.0
        rounds.append(now - began)
        memory, now = decision.memory, now + 1.0
        up = decide(signals(now, ready=1, running=8, queued=8, predicted_wait_s=2.0), BOUNDS, memory)
        assert up.target >= 2
        memory = told(up.memory, 2, now)
    assert all(b > 1.5 * a for a, b in itertools.pairwise(rounds[:4])), rounds


def test_what_a_person_asked_for_stays_a_while() -> None:
    memory = told(looks(Memory(), BOUNDS, signals(0.0))[-1].memory, 5, 10.0)
    course = looks(memory, BOUNDS, *(signals(11.0 + n, ready=5) for n in range(200)))
    assert {d.target for d in course[: int(CALM) - 2]} == {5} and course[-1].target == 1
    beyond = looks(told(Memory(), 9, 10.0), Bounds(2, 4, None), *(signals(11.0 + n, ready=9) for n in range(200)))
    assert beyond[0].target == 9 and beyond[-1].target == 2, "more than there may be else, and not for ever"
    drained = looks(told(Memory(), 1, 10.0), Bounds(2, 4, None), *(signals(11.0 + n) for n in range(200)))
    assert {d.target for d in drained} == {1}, "what was taken away isn't put back"
    needed = looks(drained[-1].memory, Bounds(2, 4, None), signals(300.0, queued=30, running=8, predicted_wait_s=2.0))
    assert needed[0].target == 4


def test_who_is_drained() -> None:
    tes = [Resident(0, 3), Resident(1, 0), Resident(2, 0), Resident(3, 7)]
    assert leaving(tes, 0) == [] and leaving(tes, 3) == [2, 1, 0] and leaving(tes, 9) == [2, 1, 0, 3]
    lenders = [Resident(0, 0, lends_to=(1, 2)), Resident(1, 5), Resident(2, 4), Resident(3, 9)]
    assert leaving(lenders, 1) == [2] and leaving(lenders, 3) == [2, 1, 0], "those that live in its memory first"


# ---- with TEs that take time to come ---------------------------------------------------------------------------------


def run(
    rate: object, most: float, seconds: float, te: int = 4, start: float = 0.4, seed: int = 0, bounds: Bounds = BOUNDS
) -> Course:
    load = Load(rate, most, prefill=0.1, decode=1.0, slots=16)  # type: ignore[arg-type]
    course = Plant(load, te, bounds, lambda ready, new: [start] * len(new), seed).run(seconds)
    assert not course.lost, "a TE ends when its sequences have"
    return course


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9, 1.2, 3.1])
def test_a_steady_load_with_noise_settles(load: float) -> None:
    """`load`: of what 4 TEs can do. In the second of two quarters of an hour the count all but stands still."""
    rate = load * 40
    course = run(lambda t: rate, rate, 1800, seed=round(10 * load))
    ups, downs = course.changes(since=900.0)
    assert ups <= 1 and downs <= 2, (ups, downs)
    p95 = course.p95(60.0, 1790.0)
    assert p95 is not None and p95 < 1.0
    counts = [look.target for look in course.looks if look.now > 900]
    assert math.ceil(rate / 10) <= max(counts) <= max(3, 2.2 * rate / 10 + 1), "neither too few nor a crowd"


def test_a_tenfold_jump_restores_the_promise() -> None:
    def rate(t: float) -> float:
        return 300.0 if 60 <= t < 120 else 30.0

    fast = run(rate, 300.0, 400, te=4)
    restored = fast.restored(60, 120, 1.0)
    assert restored is not None and restored <= 6
    slow = run(rate, 300.0, 400, te=4, start=8.0)
    later = slow.restored(60, 120, 1.0)
    assert later is None or later > restored + 5, "the time to come up is what counts"
    none = run(rate, 300.0, 400, te=4, bounds=Bounds(4, 4, None))
    assert none.restored(60, 120, 1.0) is None
    ups, downs = fast.changes()
    assert ups <= 4 and fast.looks[-1].target <= 10 and downs <= 12
    targets = [look.target for look in fast.looks if look.now > 125]
    assert targets == sorted(targets, reverse=True), "down only, after the jump"


def test_a_model_that_sleeps_wakes_for_each_burst_and_serves_all() -> None:
    def rate(t: float) -> float:
        return 20.0 if t % 200 < 20 else 0.0

    course = run(rate, 20.0, 590, te=0, bounds=Bounds(0, 8, 60.0))
    assert all(math.isfinite(seconds) for _, seconds in course.ttft) and len(course.ttft) > 900
    zero = [look.now for look in course.looks if look.target == 0]
    assert any(80 < t % 200 < 200 for t in zero) and not any(25 < t % 200 < 75 for t in zero)
    ups = sum(a.target == 0 and b.target > 0 for a, b in itertools.pairwise(course.looks))
    assert ups == 3
