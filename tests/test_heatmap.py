"""The heat map: what it concludes from what was measured, what it asks for next, and how live traffic changes it."""

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from sched.costs import Costs
from sched.heatmap import FEW, LOAD_MEMORY, NOTHING, REFIT, HeatMap, MapData, Traffic, alone, next_cell, work


def truth(prefill: int, decode: int, load: float = 0.6) -> float:
    """The paper's shape: long prompts with short answers gain by a pair, the more so the longer; others lose a little."""
    return 0.25 * math.tanh(math.log2(prefill / 512)) - 0.12 * math.log2(max(decode / prefill, 1 / 16)) - 0.1


def measured(heat: HeatMap, points, rng=None, kind="disaggregated") -> HeatMap:
    for cell in map(heat.cell, points):
        noise = 0.0 if rng is None else rng.normal(0, 0.04)
        heat.add(kind, cell.point, truth(cell.prefill, cell.decode, cell.load) + noise, 0.04**2)
    heat.refit()
    return heat


def test_of_nothing_it_says_nothing():
    heat = HeatMap()
    assert heat.value(1000, 200) == (0.0, 0.0)
    assert heat.value(0, 5) == NOTHING
    assert HeatMap(MapData(kinds=("disaggregated",))).value(1000, 200, "semi") == NOTHING


def test_what_was_measured_is_what_it_says():
    heat = measured(HeatMap(), range(126))
    for cell in heat.cells():
        found = heat.value(cell.prefill, cell.decode)
        want = math.exp(truth(cell.prefill, cell.decode)) - 1
        assert found.value == pytest.approx(want, abs=0.06)
        assert 0 <= found.confidence <= 1
        if abs(want) > 0.15:
            assert found.confidence > 0.9 and found.value * want > 0
    assert heat.same_sign("disaggregated") == 1.0
    assert heat.same_sign("semi") is None


def test_neighbours_tell_of_each_other_and_less_the_farther_they_are():
    heat = HeatMap()
    cell = next(c for c in heat.cells() if (c.prefill, c.decode, c.load) == (1024, 64, 0.6))
    heat.add("disaggregated", cell.point, 0.3, 0.02**2)
    heat.refit()
    at, near, far = heat.value(1024, 64), heat.value(512, 64), heat.value(128, 512)
    assert at.value > near.value > far.value > 0
    assert at.confidence > near.confidence > far.confidence
    assert heat.value(1024, 64, "semi") == (0.0, 0.0)


def test_off_the_map_it_fades():
    heat = measured(HeatMap(), range(126))
    edge = heat.value(4096, 256)
    values = [heat.value(prefill, prefill // 16) for prefill in (4096, 8192, 16384, 32768)]
    assert values[0] == edge
    for nearer, farther in pairwise(values):
        assert 0 < farther.value < nearer.value and farther.confidence < nearer.confidence
    assert values[2].value == pytest.approx(edge.value * 0.5**1.5)
    assert abs(heat.value(512, 512 * 4 * 64).value) < abs(heat.value(512, 512 * 4).value)
    assert abs(heat.value(1, 1).value) < 0.05


def test_a_sign_that_changes_with_the_rate_is_in_doubt():
    steady, torn = HeatMap(), HeatMap()
    place = 3 * steady.columns + 2
    for i in range(3):
        steady.add("disaggregated", place * 3 + i, 0.2, 0.0)
        torn.add("disaggregated", place * 3 + i, 0.2 if i else -0.3, 0.0)
    steady.refit()
    torn.refit()
    cell = steady.cell(place * 3)
    assert steady.value(cell.prefill, cell.decode).confidence > torn.value(cell.prefill, cell.decode).confidence
    assert (steady.same_sign("disaggregated"), torn.same_sign("disaggregated")) == (1.0, 0.0)


def test_measuring_again_makes_it_surer():
    heat = HeatMap()
    confidences = []
    for _ in range(4):
        heat.add("disaggregated", 40, 0.05, 0.05**2)
        heat.refit()
        cell = heat.cell(40)
        confidences.append(heat.value(cell.prefill, cell.decode).confidence)
    assert confidences == sorted(confidences) and confidences[0] < confidences[-1]
    assert len(heat.data.measured) == 1


# ---- what to measure next -----------------------------------------------------------------------------------------------


def test_it_asks_for_what_fits_the_time_that_is_left():
    heat = HeatMap()
    seconds = [5.0 + i for i in range(heat.points)]
    assert next_cell(heat, seconds, 4.0) is None
    assert next_cell(heat, seconds, 5.0).point == 0
    assert next_cell(heat, [math.inf] * heat.points, 1e9) is None
    seconds[7] = 1.0
    assert next_cell(heat, seconds, 4.0).point == 7


def test_it_asks_where_a_second_tells_most():
    heat = HeatMap()
    middle = next_cell(heat, [10.0] * heat.points, 1e3)
    assert middle.prefill in (512, 1024) and middle.load == 0.6  # of equal price, the one with most neighbours
    heat.add("disaggregated", middle.point, 0.5, 0.0)
    heat.add("semi", middle.point, 0.5, 0.0)
    heat.refit()
    second = next_cell(heat, [10.0] * heat.points, 1e3)
    assert second.point != middle.point
    dear = [10.0 if i != second.point else 1e3 for i in range(heat.points)]
    assert next_cell(heat, dear, 1e4).point != second.point


def test_a_short_budget_finds_nearly_all_signs():
    """Chosen by uncertainty, a third of the points tells the sign of nearly every cell that has one."""
    rng, heat = np.random.default_rng(0), HeatMap(MapData(kinds=("disaggregated",)))
    seconds = [2.0 + cell.prefill * 0.001 + cell.decode * 0.005 for cell in heat.cells()]
    left = sum(seconds) / 6
    while (cell := next_cell(heat, seconds, left)) is not None:
        left -= seconds[cell.point]
        measured(heat, [cell.point], rng)
    assert len(heat.data.measured) < heat.points / 2
    wrong = sure = 0
    for cell in heat.cells():
        found, want = heat.value(cell.prefill, cell.decode), truth(cell.prefill, cell.decode)
        if found.confidence > 0.9:
            sure += 1
            wrong += found.value * want < 0
    assert sure > heat.points * 0.5 and wrong <= sure * 0.05


# ---- live traffic -------------------------------------------------------------------------------------------------------


def live(heat: HeatMap, kind, count: int, slowdown: float, rng) -> None:
    for _ in range(count):
        heat.observe(kind, 1000, 60, slowdown * math.exp(rng.normal(0, 0.1)), 1.0, 0.6)


def test_live_traffic_of_one_kind_alone_compares_nothing():
    heat, rng = HeatMap(), np.random.default_rng(0)
    live(heat, "disaggregated", 3 * REFIT, 2.0, rng)
    assert heat.value(1000, 60) == (0.0, 0.0)
    live(heat, "colocated", FEW - 1, 2.0, rng)
    heat.refit()
    assert heat.value(1000, 60) == (0.0, 0.0)


def test_live_traffic_of_both_kinds_fills_the_map():
    heat, rng = HeatMap(), np.random.default_rng(0)
    live(heat, "colocated", 40, 3.0, rng)
    live(heat, "disaggregated", 40, 2.0, rng)
    heat.refit()
    found = heat.value(1024, 64)
    assert found.value > 0.2 and found.confidence > 0.8
    assert heat.value(1024, 64, "semi") == (0.0, 0.0)


def test_a_map_is_drawn_anew_elsewhere():
    heat, rng = HeatMap(), np.random.default_rng(0)
    live(heat, "colocated", REFIT // 2, 3.0, rng)
    assert not heat.due
    live(heat, "disaggregated", REFIT // 2, 2.0, rng)
    assert heat.due and heat.value(1024, 64) == (0.0, 0.0)
    drawn = HeatMap.drawn(heat.snapshot())
    assert not heat.due
    live(heat, "colocated", 1, 3.0, rng)  # meanwhile
    heat.adopt(drawn)
    assert heat.value(1024, 64) == drawn.value(1024, 64) and heat.value(1024, 64).value > 0.2


def test_live_traffic_replaces_what_was_measured_in_time():
    """Measured as a gain; since then something has changed, and the pair is slower for every length."""
    heat, rng = measured(HeatMap(), range(126), np.random.default_rng(1)), np.random.default_rng(0)
    values = [heat.value(1000, 60).value]
    for _ in range(10):
        for prefill in (256, 1000, 4000):
            for load in heat.data.loads:
                for kind, slowdown in (("colocated", 2.0), ("disaggregated", 3.0)):
                    for _ in range(15):
                        heat.observe(kind, prefill, 60, slowdown * math.exp(rng.normal(0, 0.1)), 1.0, load)
        heat.refit()
        values.append(heat.value(1000, 60).value)
    assert values[0] > 0.1 and values[-1] < -0.1
    assert values[0] > values[1] > values[-1]


def test_what_can_not_be_a_request_is_not_observed():
    heat = HeatMap()
    heat.observe("colocated", 0, 10, 1.0, 1.0, 0.5)
    heat.observe("colocated", 100, 10, 0.0, 1.0, 0.5)
    heat.observe("colocated", 10**7, 10, 1.0, 1.0, 0.5)
    assert heat.data.live == []


def test_traffic_tells_how_requests_fared_and_at_which_load():
    costs, heat = Costs(p1=0.0005, d0=0.004, d1=0.0005), HeatMap()
    traffic, now = Traffic(heat), 0.0
    assert alone(costs, 1000, 100) == pytest.approx(0.5 + 0.45)
    assert work(costs, 1000, 100, cached=600) == pytest.approx(0.2 + 0.1)
    gap = work(costs, 1000, 100) / 0.6 / 2  # two TEs, 0.6 of what they can do
    while now < 5 * LOAD_MEMORY:
        now += gap
        traffic.ended("colocated", 1000, 0, 100, 1.9, 2, costs, now)
    newest = max(heat.data.live, key=lambda one: one.count)
    cell = heat.cell(newest.point)
    assert (newest.kind, cell.prefill, cell.decode, cell.load) == ("colocated", 1024, 128, 0.6)
    assert newest.mean == pytest.approx(math.log(1.9 / 0.95))


# ---- other models, and files --------------------------------------------------------------------------------------------


def test_another_models_rows_move_by_how_many_steps_its_prompts_last():
    heat = measured(HeatMap(), range(126))
    # Twice the decode steps a prompt token: 512 of its tokens are like 1024 of the model that was measured.
    other = heat.scaled(0.02, theirs=0.01)
    for prefill, decode in ((512, 64), (512, 512), (1024, 128)):
        mine, theirs = other.value(prefill, decode), heat.value(2 * prefill, decode)
        assert mine.value == theirs.value
        assert mine.confidence == pytest.approx(theirs.confidence / 2)


def test_a_stored_map_is_the_same_map():
    heat, rng = measured(HeatMap(), range(0, 126, 5), np.random.default_rng(1)), np.random.default_rng(2)
    live(heat, "colocated", 20, 2.0, rng)
    live(heat, "disaggregated", 20, 3.0, rng)
    heat.refit()
    again = HeatMap(msgspec.json.decode(msgspec.json.encode(heat.data), type=MapData))
    assert again.tables == heat.tables
