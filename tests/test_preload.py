"""What lies in host memory: least recently used out, what a rhythm tells in ahead of time; and how many processes to keep warm.

`python -m bench.scale_simulation` measures the hit rates (its last table): over 9 traces of 40 models, Zipf popularity and daily
hours, the predictor finds 1 to 13 points more requests served from memory than LRU alone does.
"""

from __future__ import annotations

import math
import random

import msgspec
import pytest

from bench.scale_simulation import DAY, hit_rate, trace
from scale.preload import (
    BETTER,
    DAY_HOURS,
    LIKELY,
    POOL_LEAST,
    POOL_MOST,
    WEEK_HOURS,
    Entry,
    Habit,
    Prediction,
    Predictor,
    make_room,
    pool_size,
    what_to_load,
)

HOUR = 3600.0
MONDAY = 4 * DAY  # the first one of 1970


# ---- making room ----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes() -> None:
    entries = [Entry(key, 25, float(n)) for key, n in zip("abcd", (10, 1, 2, 3), strict=True)]
    assert make_room(entries, 100, 0) == [] and make_room(entries, 100, 20) == ["b"] and make_room(entries, 100, 50) == ["b", "c"]
    assert make_room(entries, 100, 100) == ["b", "c", "d", "a"] and make_room(entries, 100, 101) is None
    entries[1] = Entry("b", 25, 1.0, pinned=True)
    assert make_room(entries, 100, 20) == ["c"] and make_room(entries, 100, 100) is None, "what TEs use stays"


def test_nothing_goes_that_needn_t() -> None:
    entries = [Entry("small", 10, 0.0), Entry("large", 80, 1.0), Entry("young", 10, 2.0)]
    assert make_room(entries, 100, 60) == ["large"], "the small one would not have been enough, and is not needed"
    assert make_room(entries, 100, 5) == ["small"]


def test_what_is_expected_goes_last() -> None:
    entries = [Entry("old", 10, 0.0), Entry("young", 10, 5.0), Entry("large", 40, 9.0)]
    assert make_room(entries, 60, 10, {"old": 3.0, "young": 1.0, "large": 20.0}) == ["young"]
    assert make_room(entries, 60, 10, {"old": 3.0, "young": 1.0, "large": 2.0}) == ["large"], "byte for byte"
    assert make_room(entries, 60, 10, {}) == ["old"]


@pytest.mark.parametrize("seed", range(40))
def test_room_is_made_whenever_it_can_be(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        entries = [Entry(str(n), rng.randrange(50), rng.random(), rng.random() < 0.2) for n in range(rng.randrange(8))]
        expected = rng.choice([None, {entry.key: rng.random() for entry in entries}])
        budget, need = rng.randrange(200), rng.randrange(120)
        gone = make_room(entries, budget, need, expected)
        pinned = sum(entry.nbytes for entry in entries if entry.pinned)
        assert (gone is None) == (pinned + need > budget)
        if gone is not None:
            rest = sum(entry.nbytes for entry in entries if entry.key not in gone)
            assert rest + need <= budget and not any(entry.pinned for entry in entries if entry.key in gone)
            for entry in entries:
                assert entry.key not in gone or rest + entry.nbytes + need > budget, "each of them had to go"


# ---- rhythms --------------------------------------------------------------------------------------------------------


def daily(hours: set[int], days: int, a_day: int = 40, seed: int = 0, weekdays: range = range(7)) -> list[float]:
    rng = random.Random(seed)
    return sorted(
        MONDAY + day * DAY + (rng.choice(sorted(hours)) + rng.random()) * HOUR
        for day in range(days)
        if day % 7 in weekdays
        for _ in range(a_day)
    )


def learned(**asked: list[float]) -> Predictor:
    predictor = Predictor()
    for at, key in sorted((at, key) for key, times in asked.items() for at in times):
        predictor.asked(key, at)
    return predictor


def test_a_daily_rhythm_is_learned_from_three_days() -> None:
    predictor = learned(
        morning=daily({8, 9}, 3), evening=daily({20, 21}, 3, seed=1), always=daily(set(range(24)), 3, 240, seed=2)
    )

    def at(hour: float) -> dict[str, float]:
        return {p.key: p.chance for p in predictor.predict(MONDAY + 3 * DAY + hour * HOUR)}

    assert at(3)["morning"] < 0.1 and at(3)["evening"] < 0.1 and at(3)["always"] > 0.3
    before = at(7 + 55 / 60)
    assert before["morning"] > 0.4 > 0.1 > before["evening"], "five minutes before its hour, of which the horizon sees five"
    assert at(8.0)["morning"] > 0.7
    late = at(19.95)
    assert late["evening"] > 0.5 > 0.1 > late["morning"]
    assert predictor.predict(MONDAY + 3 * DAY + 20 * HOUR)[0].key == "evening"


def test_a_week_tells_workdays_from_others() -> None:
    predictor = learned(work=daily({8, 9}, 21, weekdays=range(5)))
    thursday, saturday = (predictor.predict(MONDAY + day * DAY + 8 * HOUR)[0].requests for day in (24, 26))
    assert thursday > 1.0 > 0.1 > saturday


def test_what_goes_on_now_counts_at_once() -> None:
    now = MONDAY + 3 * DAY + 3 * HOUR
    predictor = learned(habit=daily({8, 9}, 3), burst=[now - 60 + n for n in range(60)])
    assert predictor.predict(now)[0].key == "burst"
    calm = predictor.predict(now + 4 * HOUR)
    assert {p.key: p.chance for p in calm}["burst"] < 0.1, "and is forgotten when it is over"


def test_a_rise_is_expected_to_go_on() -> None:
    steady = Habit(0, seen=0.0)
    rising = Habit(0, seen=0.0)
    for n in range(900):
        steady.asked(1, float(n))
        rising.asked(int(n > 720) * 5, float(n))
    assert rising.expected(900.0, 600.0) > 1.3 * steady.expected(900.0, 600.0), "900 requests both, but all in the end"


def test_a_predictor_stays_small_and_sane_over_any_gaps() -> None:
    rng = random.Random(1)
    predictor, now = Predictor(), 0.0
    for _ in range(2000):
        now += rng.choice([0.0, 1.0, 600.0, 7 * HOUR, 40 * DAY * (rng.random() < 0.02)])
        predictor.asked(rng.choice("abc"), now, rng.randrange(1, 5))
        if rng.random() < 0.1:
            for p in predictor.predict(now, rng.choice([1.0, 600.0, 2 * DAY])):
                assert p.requests >= 0 and math.isfinite(p.requests) and 0 <= p.chance <= 1
    for habit in predictor.habits.values():
        assert len(habit.day) == DAY_HOURS and len(habit.week) == WEEK_HOURS
        assert len(msgspec.msgpack.encode(habit)) < 5000
    predictor.forget("a")
    assert set(predictor.expected(now)) == {"b", "c"}


# ---- loading ahead --------------------------------------------------------------------------------------------------


def test_the_likeliest_are_loaded_and_the_unlikely_make_room() -> None:
    predictions = [Prediction("hot", 5.0), Prediction("warm", 1.0), Prediction("cold", 0.01)]
    sizes = {"hot": 40, "warm": 40, "cold": 40, "never": 40}
    steps = what_to_load(predictions, [Entry("cold", 40, 9.0), Entry("never", 40, 0.0)], sizes, 100)
    assert [(step.key, step.drop) for step in steps] == [("hot", ["never"]), ("warm", ["cold"])]
    assert what_to_load(predictions, [Entry("hot", 40, 0.0), Entry("warm", 40, 0.0)], sizes, 100) == []
    assert [s.key for s in what_to_load(predictions, [], sizes, 200)] == ["hot", "warm"], "nobody asks for the others"


def test_two_alike_don_t_take_turns() -> None:
    predictions = [Prediction("a", 1.0), Prediction("b", 1.05)]
    assert what_to_load(predictions, [Entry("a", 60, 0.0)], {"a": 60, "b": 60}, 100) == []


@pytest.mark.parametrize("seed", range(40))
def test_loading_keeps_the_budget_and_pays(seed: int) -> None:
    rng = random.Random(seed)
    keys = [str(n) for n in range(rng.randrange(1, 12))]
    sizes = {key: rng.randrange(1, 60) for key in keys}
    predictions = [Prediction(key, rng.choice([0.0, rng.random(), 10 * rng.random()])) for key in keys if rng.random() < 0.9]
    there = [Entry(key, sizes[key], rng.random(), rng.random() < 0.2) for key in keys if rng.random() < 0.4]
    budget = max(rng.randrange(200), sum(e.nbytes for e in there))
    chance = {p.key: p.chance for p in predictions}
    present = {e.key: e for e in there}
    for step in what_to_load(predictions, there, sizes, budget):
        assert step.key not in present and chance[step.key] >= LIKELY
        assert chance[step.key] >= BETTER * sum(chance.get(key, 0.0) for key in step.drop)
        for key in step.drop:
            assert not present.pop(key).pinned
        present[step.key] = Entry(step.key, sizes[step.key], 1.0)
        assert sum(e.nbytes for e in present.values()) <= budget


def test_more_hits_than_lru_alone_on_zipf_and_daily_traces() -> None:
    for seed in range(2):
        rng = random.Random(seed)
        sizes = {str(n): rng.choice([16, 28, 67, 145]) for n in range(20)}
        requests = trace(20, 5, seed, requests_a_day=1000)
        budget = sum(sizes.values()) // 4
        lru, predicted = (hit_rate(requests, sizes, budget, ahead, 3 * DAY) for ahead in (False, True))
        assert predicted["hit_percent"] >= lru["hit_percent"] + 4, (lru, predicted)
        assert predicted["loads"] < 1.3 * lru["loads"], "not by reading all the time"


# ---- warm processes -------------------------------------------------------------------------------------------------


def test_the_pool_follows_the_largest_burst() -> None:
    assert pool_size([], 0.0) == POOL_LEAST
    burst = [100.0 + 0.01 * n for n in range(16)]
    assert pool_size(burst, 101.0) == 16
    assert pool_size([*burst, 200.0], 201.0) in (15, 16), "one spawn later on doesn't undo it"
    sizes = [pool_size(burst, 101.0 + 600.0 * n) for n in range(30)]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] == 8 and sizes[-1] == POOL_LEAST
    assert pool_size([60.0 * n for n in range(100)], 6000.0) == 1, "one a minute is refilled in between"
    assert pool_size([0.0] * 1000, 1.0) == POOL_MOST
