"""Batching over the fake device: every text must equal the plain oracle's, however steps are cut, shared, preempted or
overlapped."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sequence import share
from engine.types import Finish, sequence_id
from tests.fake_device import VOCAB, Engine, score_of, text_of

BOTH = pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])


@BOTH
def test_one_sequence(overlapped):
    engine = Engine()
    engine.start(1, [5, 6, 7], 10)
    engine.run(overlapped)
    seq = sequence_id(1, 0)
    assert engine.texts[seq] == text_of([5, 6, 7], 10)
    assert engine.ends[seq] == Finish.LENGTH
    assert engine.rtc.used == 0


@BOTH
def test_stop_id_ends_and_the_overlapped_loop_drops_its_extra_token(overlapped):
    prompt = [1, 2, 3]
    stop = text_of(prompt, 8)[4]
    want = text_of(prompt, 30, stop=frozenset([stop]))
    engine = Engine()
    engine.start(1, prompt, 30, stop=[stop])
    engine.run(overlapped)
    assert engine.texts[sequence_id(1, 0)] == want
    assert engine.ends[sequence_id(1, 0)] == Finish.STOP


@BOTH
def test_min_tokens_outlasts_the_stop_id(overlapped):
    prompt = [1, 2, 3]
    want = text_of(prompt, 30)
    stop = want[2]
    engine = Engine()
    engine.start(1, prompt, 30, stop=[stop], min_tokens=5)
    engine.run(overlapped)
    assert engine.texts[sequence_id(1, 0)][:5] == want[:5]


@BOTH
def test_long_prompts_are_cut_and_share_the_budget(overlapped):
    engine = Engine(max_tokens=16, max_len=128, blocks=128)
    prompts = {i: [(i * 7 + j) % VOCAB for j in range(length)] for i, length in enumerate([70, 3, 40, 33])}
    for task, prompt in prompts.items():
        engine.start(task, prompt, 9)
    engine.run(overlapped)
    for task, prompt in prompts.items():
        assert engine.texts[sequence_id(task, 0)] == text_of(prompt, 9)


def test_a_long_prompt_starves_nobody():
    engine = Engine(max_tokens=16, max_len=256, blocks=128)
    engine.start(1, [1] * 200, 4)
    engine.start(2, [2] * 8, 4)
    engine.step()
    assert sequence_id(2, 0) in engine.texts, "the short prompt must have its first token after one step"


def test_share_spends_the_budget_on_the_shortest_and_moves_the_first_on():
    class Fake:
        def __init__(self, want, order):
            self.target, self.done, self.scores, self.order = want, 0, None, order

    for budget, wants, given_out in (
        (12, [100, 3, 100, 2], [7, 3, 0, 2]),  # a quarter, and what the short ones leave: it is the first of its length
        (12, [100, 8, 8], [3, 8, 1]),
        (7, [1, 1, 1], [1, 1, 1]),
        (5, [9, 9, 9], [5, 0, 0]),
        (1, [9, 1], [1, 0]),
        (4, [], []),
    ):
        sequences = [Fake(w, (0, i)) for i, w in enumerate(wants)]
        found = share(sequences, budget)
        assert [{id(s): n for s, n in found}.get(id(s), 0) for s in sequences] == given_out
        assert sum(n for _, n in found) == min(budget, sum(wants))
    high, low, first = Fake(9, (0, 2)), Fake(2, (1, 3)), Fake(100, (1, 1))
    found = {id(s): n for s, n in share([high, first, low], 12)}
    assert [found.get(id(s)) for s in (high, low, first)] == [9, None, 3], "priority before length, but the first moves on"


@BOTH
def test_prompts_that_begin_alike_wait_for_the_first(overlapped):
    """Arrived together, they compute their common blocks once."""
    engine = Engine(max_tokens=64, max_len=128, blocks=128)
    common = [i % VOCAB for i in range(40)]
    for task in range(1, 6):
        engine.start(task, [*common, task, task + 1], 5)
    engine.run(overlapped)
    for task in range(1, 6):
        assert engine.texts[sequence_id(task, 0)] == text_of([*common, task, task + 1], 5)
    assert engine.device.tokens_run < 5 * (42 + 5) / 2, "each would compute its forty tokens"


@BOTH
def test_prefix_hit_gives_the_same_text_for_less_work(overlapped):
    engine = Engine()
    prompt = list(range(20))
    engine.start(1, prompt, 6)
    engine.run(overlapped)
    before = engine.device.tokens_run
    engine.start(2, prompt, 6)
    engine.run(overlapped)
    assert engine.texts[sequence_id(2, 0)] == engine.texts[sequence_id(1, 0)] == text_of(prompt, 6)
    assert engine.cached == {sequence_id(1, 0): 0, sequence_id(2, 0): 16}
    assert engine.device.tokens_run - before < 20 + 6


def test_the_next_turn_finds_prompt_and_answer():
    engine = Engine()
    prompt = list(range(10))
    engine.start(1, prompt, 10)
    engine.run()
    engine.start(2, [*prompt, *engine.texts[sequence_id(1, 0)], 5], 2)
    engine.run()
    assert engine.cached[sequence_id(2, 0)] == 16, "19 of 20 tokens were computed: 4 full blocks"


def test_another_salt_meets_nothing():
    engine = Engine()
    for task, salt in ((1, b"a"), (2, b"b"), (3, b"a")):
        engine.start(task, list(range(20)), 3, salt=salt)
        engine.run()
    assert [engine.cached[sequence_id(t, 0)] for t in (1, 2, 3)] == [0, 0, 16]


@BOTH
def test_samples_share_the_prompt_and_keep_their_seeds(overlapped):
    engine = Engine(blocks=64, max_tokens=64)
    prompt = list(range(21))
    engine.start(1, prompt, 6, n=4, seed=40)
    engine.run(overlapped)
    for i in range(4):
        assert engine.texts[sequence_id(1, i)] == text_of(prompt, 6, seed=40 + i)
    assert [engine.cached[sequence_id(1, i)] for i in range(4)] == [0, 20, 20, 20]


@BOTH
def test_preemption_recomputes_and_the_text_is_the_same(overlapped):
    engine = Engine(blocks=10, block_size=4, max_len=40)
    prompts = {task: [task + 1] * 6 for task in range(4)}
    for task, prompt in prompts.items():
        engine.start(task, prompt, 30)
    engine.run(overlapped)
    assert engine.batch.load.preemptions > 0
    for task, prompt in prompts.items():
        assert engine.texts[sequence_id(task, 0)] == text_of(prompt, 30)
    assert engine.rtc.used == 0


@BOTH
def test_replay_goes_on_where_the_text_stopped(overlapped):
    prompt, want = [3, 1, 4], text_of([3, 1, 4], 12)
    engine = Engine()
    engine.start(1, prompt, 12, generated=want[:5])
    engine.start(2, prompt, 12, generated=want)
    engine.run(overlapped)
    assert engine.texts[sequence_id(1, 0)] == want[5:]
    assert engine.ends == {sequence_id(1, 0): Finish.LENGTH, sequence_id(2, 0): Finish.LENGTH}


@BOTH
def test_prompt_logprobs_line_up_whatever_the_chunks(overlapped):
    prompt = [(j * 5) % VOCAB for j in range(50)]
    want = [None, *(score_of(prompt[:i], prompt[i]) for i in range(1, 50))]
    engine = Engine(max_tokens=16, max_len=80)
    engine.start(1, prompt, 5, prompt_logprobs=0)
    engine.start(2, prompt, 0, prompt_logprobs=0)
    engine.start(3, prompt, 0)
    engine.run(overlapped)
    for task in (1, 2):
        got = engine.scores[sequence_id(task, 0)]
        assert [None if x is None else x.chosen for x in got] == want
    assert engine.texts == {sequence_id(1, 0): text_of(prompt, 5)}
    assert engine.ends[sequence_id(3, 0)] == Finish.LENGTH


def test_what_can_never_run_is_refused():
    engine = Engine(max_len=16)
    engine.start(1, [1] * 15, 5)
    engine.run()
    assert [r.seq for r in engine.refused] == [sequence_id(1, 0)]


def test_priority_goes_first():
    engine = Engine(max_seqs=1)
    engine.start(1, [1, 2], 3, priority=5)
    engine.start(2, [1, 3], 3, priority=-1)
    engine.run()
    assert list(engine.ends) == [sequence_id(2, 0), sequence_id(1, 0)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), overlapped=st.booleans(), caching=st.booleans())
def test_random_walk(seed, overlapped, caching):
    """Arrivals, aborts, preemptions, shared prefixes at random: every text is right, nothing leaks."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4])
    engine = Engine(
        blocks=rng.randrange(48 // size + 1, 160 // size),
        block_size=size,
        max_seqs=rng.randrange(1, 6),
        max_tokens=rng.randrange(6, 24),
        max_len=48,
        caching=caching,
    )
    wanted: dict[int, list[int]] = {}
    aborted: set[int] = set()
    for task in range(1, 15):
        prompt = [1] * rng.randrange(0, 12) + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        count, n, stop = rng.randrange(1, 20), rng.choice([1, 1, 3]), [rng.randrange(VOCAB) for _ in range(3)]
        engine.start(task, prompt, count, n=n, seed=task, stop=stop)
        for i in range(n):
            wanted[sequence_id(task, i)] = text_of(prompt, count, task + i, frozenset(stop))
        for _ in range(rng.randrange(4)):
            engine.step(overlapped)
            engine.batch.check()
        if rng.random() < 0.25:
            victim = rng.choice(list(wanted))
            engine.batch.abort(victim >> 7, victim & 127)
            aborted.add(victim)
            engine.batch.check()
    engine.run(overlapped)
    for seq, text in wanted.items():
        got = engine.texts.get(seq, [])
        assert got == (text[: len(got)] if seq in aborted else text)
    assert engine.rtc.used == 0
