"""What steps cost: formulas against sums over steps, and learning."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from sched.costs import BOUND, NUMBERS, PACE_MEMORY, Costs, Learner, Paces, Step, fitted, rough

COSTS = Costs(
    p0=2e-3, p1=5e-5, p2=2e-9, p3=4e-9, d0=1e-2, d1=2e-4, d2=1e-8, chunk=512, peer0=1e-3, peer=1e-6, dram=4e-6, ssd=2e-5
)


@pytest.mark.parametrize(("new", "context"), [(1, 0), (511, 0), (512, 100), (513, 0), (3000, 1000)])
def test_a_prompt_takes_what_its_chunks_take(new, context):
    chunks = -(-new // COSTS.chunk)
    whole = sum(COSTS.step(new / chunks, context + i * new / chunks, 0, 0) for i in range(chunks))
    assert COSTS.prefill(float(new), float(context)) == pytest.approx(whole)


def test_costs_go_through_json():
    assert msgspec.json.decode(msgspec.json.encode(COSTS), type=Costs) == COSTS


def test_rough_costs_of_a_start():
    costs = rough(20_000.0, 0.01, chunk=512, kv_bytes=100_000, weights_bytes=10**9, peer_rate=1e9, dram_rate=2e9)
    assert costs.prefill(512.0) == pytest.approx(512 / 20_000) and costs.step(0, 0, 1, 0) == pytest.approx(0.01)
    assert costs.step(0, 0, 1, 10_000) == pytest.approx(0.02), "as many bytes again: twice as long"
    assert costs.transfer(1000.0) == pytest.approx(0.1) and costs.dram == 5e-5 and costs.ssd == 0.0


def some_steps(costs: Costs, seed: int, count: int, noise: float = 0.0) -> list[Step]:
    rng, steps = Random(seed), []
    for _ in range(count):
        prompt = rng.choice([0, 0, rng.randrange(1, 512), 512])
        context = rng.randrange(4000) if prompt else 0
        sequences = rng.randrange(0 if prompt else 1, 40)
        kv = sequences * rng.randrange(1, 2000)
        seconds = costs.step(prompt, context, sequences, kv) * rng.lognormvariate(0, noise)
        steps.append(Step(prompt, context, sequences, kv, seconds))
    return steps


def errors(costs: Costs, truth: Costs) -> list[float]:
    """Relative ones, over some steps, ascending."""
    return sorted(abs(costs.step(*s[:4]) / s.seconds - 1) for s in some_steps(truth, 99, 200))


def worst(costs: Costs, truth: Costs) -> float:
    return errors(costs, truth)[-1]


def median(costs: Costs, truth: Costs) -> float:
    return errors(costs, truth)[100]


WRONG = msgspec.structs.replace(COSTS, p0=5e-3, p1=2e-5, p2=0.0, p3=1e-9, d0=3e-2, d1=1e-3, d2=0.0)


def test_a_fit_finds_the_numbers():
    assert worst(WRONG, COSTS) > 1
    assert worst(fitted(WRONG, some_steps(COSTS, 1, 60)), COSTS) < 1e-6
    assert worst(fitted(WRONG, some_steps(COSTS, 1, 400, noise=0.1)), COSTS) < 0.1
    assert fitted(WRONG, []) == WRONG


def test_a_fit_has_no_negative_numbers_and_leaves_alone_what_it_is_not_told_of():
    decodes = [Step(0, 0, s, 0, 0.02 - 1e-4 * s) for s in range(1, 9)]  # the more the quicker: that can't be
    costs = fitted(COSTS, decodes)
    assert costs.d1 == 0.0 and costs.d0 == pytest.approx(0.0195, rel=0.02)
    assert (costs.p0, costs.p1, costs.p2, costs.p3, costs.d2) == (COSTS.p0, COSTS.p1, COSTS.p2, COSTS.p3, COSTS.d2)


def test_learning_follows_what_is_seen():
    learner = Learner(WRONG)
    for step in some_steps(COSTS, 2, 1500, noise=0.05):
        learner.learn(step)
    assert median(learner.costs, COSTS) < 0.03 and worst(learner.costs, COSTS) < 0.3
    twice = msgspec.structs.replace(COSTS, **{name: 2 * getattr(COSTS, name) for name in NUMBERS})
    for step in some_steps(twice, 3, 1500, noise=0.05):
        learner.learn(step)
    assert median(learner.costs, twice) < 0.03 and worst(learner.costs, twice) < 0.3


def test_learning_is_bounded():
    learner, rng = Learner(COSTS), Random(5)
    for step in some_steps(COSTS, 4, 2000):
        times = learner.learn(step._replace(seconds=step.seconds * rng.choice([1e-6, 1.0, 1e6])))
        assert 1 / 8 <= times <= 8
        for name in NUMBERS:
            assert getattr(COSTS, name) / BOUND * 0.999 <= getattr(learner.costs, name) <= getattr(COSTS, name) * BOUND * 1.001
    assert learner.learn(Step(0, 0, 0, 0, 0.0)) == 1.0


def test_a_long_row_of_equal_steps_does_not_make_the_others_doubtful():
    """Decodes alone for long: the prompt's numbers stay, and one odd prompt after that isn't believed more than what it took."""
    learner = Learner(COSTS)
    for _ in range(5000):
        learner.learn(Step(0, 0, 4, 4000, COSTS.step(0, 0, 4, 4000)))
    assert learner.costs.p1 == pytest.approx(COSTS.p1)
    learner.learn(Step(512, 0, 4, 4000, 3 * COSTS.step(512, 0, 4, 4000)))
    assert learner.costs.step(512, 0, 4, 4000) <= 3.3 * COSTS.step(512, 0, 4, 4000)
    learner.learn(Step(0, 0, 4, 4000, COSTS.step(0, 0, 4, 4000)))
    assert learner.costs.step(0, 0, 4, 4000) == pytest.approx(COSTS.step(0, 0, 4, 4000), rel=0.2)


def test_a_slow_te_is_known_by_its_steps_until_it_has_none():
    paces, now = Paces(), 0.0
    assert paces.slow(now) == {}
    for _ in range(100):
        now += 0.5
        for te, times in ((0, 8.0), (1, 2.0), (2, 2.0)):
            paces.hear(te, times, now)
    found = paces.slow(now)
    assert found[0] == pytest.approx(4 * found[1], rel=0.01) and sum(found.values()) == pytest.approx(3.0)
    for _ in range(100):
        now += 0.5
        paces.hear(1, 4.0, now)
        paces.hear(2, 2.0, now)
    assert paces.slow(now).keys() == {1, 2}, "one without work has shown nothing for long"
    paces.forget(1)
    assert paces.slow(now) == {2: 1.0} and paces.slow(now + PACE_MEMORY + 1) == {}


def test_tes_that_are_all_slow_alike_are_not_slow():
    paces = Paces()
    for n in range(50):
        for te in range(4):
            paces.hear(te, 3.0 + 0.5 * (te % 2), float(n))
    assert paces.slow(50.0) == pytest.approx(dict.fromkeys(range(4), 1.0))


def test_typical_lengths_follow_requests():
    learner = Learner(COSTS)
    for _ in range(400):
        learner.ended(2000, 50, 1500, 12.0)
    seen = learner.costs
    assert seen.prompt == pytest.approx(2000, rel=0.01) and seen.answer == pytest.approx(50, rel=0.1)
    assert seen.found == pytest.approx(1500, rel=0.01) and seen.crowd == pytest.approx(12, rel=0.01)
    learner.ended(0, 0, 0, 0.0)
    assert learner.costs.answer > 0
