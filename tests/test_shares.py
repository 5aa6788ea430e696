"""The semi-PD controller against plants whose latencies follow the paper's model, noise and all."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from sched.shares import (
    LEAST,
    Controller,
    Latency,
    Promise,
    Rules,
    Shares,
    State,
    Window,
    adjust,
    fit_tpot,
    fit_ttft,
    observe,
    percentile,
    step_up,
)

PROMISE = Promise(ttft=1.0, tpot=0.1)
Plant = Callable[[Shares], Window]


def plant(ttft: Latency, tpot: Latency, noise: float = 0.0, seed: int = 0) -> Plant:
    rng = random.Random(seed)

    def show(shares: Shares) -> Window:
        x, y = shares.effective
        return Window(shares, ttft.at(x) * rng.uniform(1 - noise, 1 + noise), tpot.at(y) * rng.uniform(1 - noise, 1 + noise))

    return show


def follow(plant: Plant, start: Shares, windows: int, promise: Promise = PROMISE) -> list[Window]:
    state, seen = State(start), []
    for _ in range(windows):
        seen.append(plant(state.shares))
        state = adjust(state, seen[-1], promise).state
    return seen


def holds(window: Window, promise: Promise = PROMISE) -> bool:
    assert window.ttft is not None and window.tpot is not None
    return window.ttft <= promise.ttft and window.tpot <= promise.tpot


def test_it_comes_to_shares_that_keep_both_promises_where_there_are_some() -> None:
    rng = random.Random(5)
    lattice = [Shares(x, y) for x in range(10, 101, 10) for y in range(10, 101, 10) if x + y >= 100]
    tried = 0
    for seed in range(600):
        queue = rng.uniform(0, 30)
        ttft = Latency(rng.uniform(5, 60), rng.uniform(0, 0.3), queue)
        tpot = Latency(rng.uniform(0.5, 6), rng.uniform(0, 0.05))
        quiet = plant(ttft, tpot)
        # Some pair must keep both with a tenth to spare for the noise.
        fine = [s for s in lattice if holds(quiet(s), Promise(PROMISE.ttft * 0.9, PROMISE.tpot * 0.9))]
        if not fine:
            continue
        tried += 1
        seen = follow(plant(ttft, tpot, 0.04, seed), Shares(*rng.choice([(50, 50), (80, 100), (100, 30), (100, 100)])), 40)
        # Noise makes windows fail now and then where little is to spare: what counts is where the shares have come to.
        near = Promise(PROMISE.ttft * 1.05, PROMISE.tpot * 1.05)
        assert all(holds(quiet(w.shares), near) for w in seen[-10:]), (ttft, tpot, [w.shares for w in seen])
    assert tried > 150


def test_a_change_of_load_is_followed() -> None:
    light = plant(Latency(20, 0.1, 5), Latency(3, 0.01))
    heavy = plant(Latency(30, 0.1, 20), Latency(2, 0.01))  # more arrivals, fewer decodes
    seen = follow(light, Shares(30, 80), 20)
    assert holds(seen[-1])
    state = State(seen[-1].shares, tuple(seen[-8:]))
    for _ in range(20):
        window = heavy(state.shares)
        state = adjust(state, window, PROMISE).state
    assert not holds(heavy(seen[-1].shares)) and holds(window)


def test_it_holds_when_both_hold_and_when_both_fail() -> None:
    for ttft, tpot, why in [(0.9, 0.09, "both hold"), (1.1, 0.11, "both fail"), (1.0, 0.1, "both hold")]:
        decision = adjust(State(Shares(50, 60)), Window(Shares(50, 60), ttft, tpot), PROMISE)
        assert not decision.changed and decision.state.shares == Shares(50, 60) and why in decision.reason


def test_one_failure_raises_that_share_and_says_why() -> None:
    decision = adjust(State(Shares(50, 60)), Window(Shares(50, 60), 1.1, 0.05), PROMISE)
    assert decision.changed and decision.state.shares == Shares(60, 60)
    assert "(50, 60) to (60, 60)" in decision.reason and "TTFT 1.1 s instead of 1 s" in decision.reason
    decision = adjust(State(Shares(50, 60)), Window(Shares(50, 60), 0.5, 0.5), PROMISE)
    assert decision.state.shares == Shares(50, 90), "far off: as many steps as are allowed"
    assert "TPOT 0.5 s" in decision.reason


def test_windows_without_data() -> None:
    shares = Shares(50, 60)
    decision = adjust(State(shares), Window(shares, None, None), PROMISE)
    assert not decision.changed and "nothing was seen" in decision.reason
    assert not adjust(State(shares), Window(shares, None, 0.05), PROMISE).changed
    assert adjust(State(shares), Window(shares, None, 0.2), PROMISE).state.shares.decode > 60, "the other held, for all we know"
    assert adjust(State(shares), Window(shares, 2.0, None), PROMISE).state.shares.prefill > 50
    state = State(shares, tuple(Window(shares, None, None) for _ in range(8)))
    assert adjust(state, Window(shares, 2.0, 0.05), PROMISE).changed


def test_a_share_that_would_pass_100_takes_from_the_other() -> None:
    assert step_up(Shares(100, 60), 0, 10) == Shares(100, 50)
    assert step_up(Shares(95, 60), 0, 10) == Shares(95, 50)
    assert step_up(Shares(90, 60), 0, 10) == Shares(100, 60)
    assert step_up(Shares(60, 100), 1, 10) == Shares(50, 100)
    assert step_up(Shares(100, 15), 0, 10) == Shares(100, LEAST)
    decision = adjust(State(Shares(100, LEAST)), Window(Shares(100, LEAST), 9.0, 0.05), PROMISE)
    assert not decision.changed and "at its least" in decision.reason


def test_bounds_under_any_observations() -> None:
    rng = random.Random(3)
    for _ in range(300):
        rules = Rules(step=rng.randint(1, 40), most_steps=rng.randint(1, 5), windows=rng.randint(1, 9))
        state = State(Shares(rng.randint(LEAST, 100), rng.randint(LEAST, 100)))
        for _ in range(30):
            values = [rng.choice([None, 0.0, 1e-9, rng.uniform(0, 3), rng.uniform(0, 0.3), 1e6]) for _ in range(2)]
            before = state.shares
            decision = adjust(state, Window(before, *values), PROMISE, rules)
            state = decision.state
            now = state.shares
            assert LEAST <= now.prefill <= 100 and LEAST <= now.decode <= 100
            moved = abs(now.prefill - before.prefill) + abs(now.decode - before.decode)
            assert moved <= rules.step * rules.most_steps and bool(moved) == decision.changed
            assert len(state.windows) <= rules.windows and decision.reason
            # No share is raised beyond what its own failure asks for, and the sum is kept up.
            assert now.prefill + now.decode >= min(before.prefill + before.decode, 100 - rules.step + LEAST)


def test_the_fit_finds_the_parameters() -> None:
    shares = (20.0, 35.0, 50.0, 70.0, 90.0)
    decode = fit_tpot([(s, Latency(4.0, 0.02).at(s)) for s in shares])
    assert decode.a == pytest.approx(4.0) and decode.b == pytest.approx(0.02)
    prefill = fit_ttft([(s, Latency(15.0, 0.2, 10.0).at(s)) for s in shares])
    assert prefill.queue == pytest.approx(10.0, abs=0.2)
    assert all(prefill.at(s) == pytest.approx(Latency(15.0, 0.2, 10.0).at(s), rel=0.02) for s in (25.0, 40.0, 60.0, 100.0))


def test_parameters_stay_sane_whatever_was_seen() -> None:
    rng = random.Random(9)
    for _ in range(500):
        points = [
            (rng.choice([10.0, 33.3, 50.0, rng.uniform(5, 100)]), rng.choice([0.0, rng.uniform(0, 5)]))
            for _ in range(rng.randint(1, 8))
        ]
        for model in (fit_ttft(points), fit_tpot(points)):
            assert model.a >= 0 and model.b >= 0 and 0 <= model.queue < min(share for share, _ in points)
            assert all(math.isfinite(model.at(share)) for share, _ in points)
    rising = fit_tpot([(20.0, 0.1), (50.0, 0.2), (80.0, 0.3)])
    assert rising.a == 0 and rising.at(10) == rising.at(90), "more of the device never makes it slower"
    assert Latency(1.0, 0.0, 10.0).at(10.0) == math.inf
    assert fit_ttft([(50.0, 2.0)]) == Latency(100.0, 0.0), "one share: all of it is put down to that"


def test_what_is_observed() -> None:
    shares = Shares(50, 50)
    assert observe(shares, PROMISE, [], [], []) == Window(shares, None, None)
    window = observe(shares, PROMISE, [0.1 * i for i in range(1, 11)], [], [0.01] * 9 + [0.5])
    assert window.ttft == pytest.approx(0.9) and window.tpot == 0.01
    assert observe(shares, PROMISE, [], [0.5, 3.0], []).ttft == 3.0, "who waits longer than promised counts, others not yet"
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0 and percentile([3.0, 1.0, 2.0], 100) == 3.0 and percentile([7.0], 1) == 7.0


def test_cores_that_are_handed_out_evenly() -> None:
    """A share of a compiled team is what it has at most; of two that want all of a core the system gives each a half. So raising
    a share does nothing until the other is lowered, and it must come to that."""

    def show(shares: Shares) -> Window:
        x, y = shares.prefill, shares.decode
        has_x, has_y = min(x, max(50, 100 - y)), min(y, max(50, 100 - x))
        return Window(shares, Latency(25, 0.1, 5).at(has_x), Latency(3, 0.01).at(has_y))

    for promise in (Promise(0.45, 0.2), Promise(1.0, 0.065), Promise(0.7, 0.1)):
        for start in (Shares(80, 100), Shares(50, 50), Shares(100, 10), Shares(10, 100)):
            assert holds(follow(show, start, 40, promise)[-1], promise), (promise, start)


def test_a_pair_of_workers_is_adjusted_at_the_end_of_each_window() -> None:
    controller = Controller(PROMISE, Shares(60, 60), Rules(window=10))
    decisions = []
    for step in range(30):
        controller.tokens([0.02, 0.03])
        if step % 4 == 0:
            controller.first_token(1.5 if step < 20 else 0.5)
        decisions.append(controller.step(lambda: []))
    assert [n for n, decision in enumerate(decisions) if decision] == [9, 19, 29]
    first, second, third = (decision for decision in decisions if decision)
    assert first.changed and second.changed and not third.changed and "both hold" in third.reason
    assert controller.shares == third.state.shares and controller.shares.prefill > 60
    assert [w.ttft for w in controller.state.windows] == [1.5, 1.5, 0.5]
    starved = Controller(PROMISE, Shares(60, 60), Rules(window=2))
    assert starved.step(lambda: [5.0]) is None
    decision = starved.step(lambda: [5.0])
    assert decision is not None and decision.changed and starved.shares.prefill > 60
