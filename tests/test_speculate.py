"""Speculation by prompt lookup: what is drafted, and that texts stay what they are without it, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.batch import SPECULATING_SEQS, Batch
from engine.config import Speculation
from engine.core import Core
from engine.executor import Executor
from engine.rtc import RTC
from engine.speculate import propose
from engine.types import Finish, FromWorker, Sample, SamplingParams, Start, Tokens, pack_ids, sequence_id
from tests import tiny
from tests.fake_device import VOCAB, Engine, ListInbox, text_of
from tests.harness import Rig

BOTH = pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
SPEC = Speculation(num_speculative_tokens=5)


# ---- what is drafted ------------------------------------------------------------------------------------------------


def drafted(text: list[int], n_min: int = 2, n_max: int = 4, count: int = 3) -> list[int]:
    ids = np.array([*text, -7, -7], np.int32)  # what stands past the known ids must not matter
    return propose(ids, len(text), n_min, n_max, count).tolist()


def test_the_draft_is_what_followed_the_last_time():
    assert drafted([1, 2, 3, 4, 5, 6, 1, 2]) == [3, 4, 5]
    assert drafted([1, 2, 3, 4, 5, 1, 2, 8, 9, 7, 1, 2]) == [8, 9, 7], "of equals the latest"
    assert drafted([9, 1, 2, 3, 4, 5, 1, 2, 8, 9, 1, 2]) == [3, 4, 5], "the longest match goes first"
    assert drafted([9, 1, 2, 3, 4, 5, 1, 2, 8, 9, 1, 2], n_max=2) == [8, 9, 1], "what is beyond n_max doesn't count"


def test_without_a_match_of_n_min_nothing_is_drafted():
    assert drafted([1, 2, 3, 4]) == [] and drafted([5, 2, 3, 4, 2]) == [] and drafted([5, 2, 3, 4, 2], n_min=1) == [3, 4, 2]
    assert drafted([1]) == drafted([1, 2]) == drafted([], n_min=1) == drafted([1, 2, 1, 2], count=0) == []


def test_a_loop_is_drafted_round_and_round():
    assert drafted([1, 2, 3, 1, 2, 3], count=8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert drafted([4, 4, 4], count=5) == [4, 4, 4, 4, 4]


def test_drafts_against_a_search_written_out():
    rng = random.Random(3)
    for _ in range(500):
        text = [rng.randrange(3) for _ in range(rng.randrange(30))]
        n_min = rng.randrange(1, 4)
        n_max, count = rng.randrange(n_min, 6), rng.randrange(1, 6)
        want: list[int] = []
        for n in range(n_max, n_min - 1, -1):
            ends = [e for e in range(n, len(text)) if text[e - n : e] == text[len(text) - n :]]
            if ends:
                turn = text[ends[-1] :]
                want = [turn[i % len(turn)] for i in range(count)]
                break
        assert drafted(text, n_min, n_max, count) == want


# ---- the batch, over the fake device --------------------------------------------------------------------------------
# Its text is a hash and never repeats, so drafts come from an oracle that knows the text and errs at random.


def draft_from(monkeypatch, wholes: list[list[int]], rate: float, vocab: int = VOCAB) -> None:
    """Drafts are what follows in one of `wholes` (prompt and output), each id wrong with probability 1 - rate."""
    rng = random.Random(0)

    def oracle(ids: np.ndarray, known: int, n_min: int, n_max: int, count: int) -> np.ndarray:
        begins = ids[:known].tolist()
        right = next((whole[known : known + count] for whole in wholes if whole[:known] == begins), [])
        return np.array([t if rng.random() < rate else (t + 1) % vocab for t in right], np.int32)

    monkeypatch.setattr("engine.batch.propose", oracle)


def prepare(monkeypatch, prompts: dict[int, list[int]], count: int, rate: float = 0.7) -> None:
    draft_from(monkeypatch, [p + text_of(p, count) for p in prompts.values()], rate)


@BOTH
@pytest.mark.parametrize("rate", [0.0, 0.8, 1.0])
def test_texts_are_the_same_in_fewer_steps(monkeypatch, overlapped, rate):
    prompts = {task: [task + 1] * 5 for task in range(3)}
    prepare(monkeypatch, prompts, 30, rate)
    engine = Engine(speculation=SPEC)
    for task, prompt in prompts.items():
        engine.start(task, prompt, 30)
    engine.run(overlapped)
    for task, prompt in prompts.items():
        assert engine.texts[sequence_id(task, 0)] == text_of(prompt, 30)
    load = engine.batch.load
    if rate == 1.0:  # one id by the prefill, then 2, 3, 5 and 6 at a time
        assert load.steps == 1 + 3 + 4 and load.accepted_tokens == load.draft_tokens
    elif rate == 0.0:
        assert load.accepted_tokens == 0 and load.draft_tokens == 3, "having been wrong, nobody drafts again"
    else:
        assert 8 < load.steps < 30 and 0 < load.accepted_tokens < load.draft_tokens <= 5 * load.drafts
    assert engine.rtc.used == 0


@BOTH
def test_a_stop_id_inside_the_run_ends_it(monkeypatch, overlapped):
    text = text_of([1, 2, 3], 30)
    draft_from(monkeypatch, [[1, 2, 3, *text]], 1.0)
    for at in range(1, 12):
        engine = Engine(speculation=SPEC)
        engine.start(1, [1, 2, 3], 30, stop=[text[at]])
        engine.run(overlapped)
        assert engine.texts[sequence_id(1, 0)] == text_of([1, 2, 3], 30, stop=frozenset([text[at]]))
        assert engine.ends == {sequence_id(1, 0): Finish.STOP}
        engine.start(2, [1, 2, 3, *engine.texts[sequence_id(1, 0)]], 3)  # what it left in the cache is right
        engine.run(overlapped)


@BOTH
def test_the_limit_is_never_passed(monkeypatch, overlapped):
    for count in range(1, 16):
        whole = [1, 2, 3, *text_of([1, 2, 3], 40)]
        draft_from(monkeypatch, [whole], 1.0)
        engine = Engine(max_len=3 + count, speculation=SPEC)
        engine.start(1, [1, 2, 3], count)
        engine.run(overlapped)
        assert engine.texts[sequence_id(1, 0)] == whole[3 : 3 + count]
        assert engine.ends == {sequence_id(1, 0): Finish.LENGTH}


def test_only_accepted_ids_are_committed(monkeypatch):
    """After each step every block that can be found holds the ids that its key stands for."""
    prompt = [1, 2, 3]
    prepare(monkeypatch, {1: prompt}, 50, 0.6)
    engine = Engine(speculation=SPEC, block_size=2)
    engine.start(1, prompt, 50)
    while engine.step():
        engine.batch.check()
        for seq in engine.batch.running:
            held = [engine.device.memory[b * 2 + i] for b in seq.blocks[: seq.committed] for i in range(2)]
            assert held == seq.ids[: len(held)].tolist() and len(held) < seq.known
    engine.start(2, prompt + text_of(prompt, 50), 4)
    engine.run()
    assert engine.cached[sequence_id(2, 0)] == 52 and engine.texts[sequence_id(2, 0)] == text_of(prompt, 54)[50:]


def test_penalised_sequences_do_not_speculate(monkeypatch):
    prepare(monkeypatch, {1: [1, 2, 3]}, 20, 1.0)
    for name, value in (("presence_penalty", 0.5), ("frequency_penalty", -0.5), ("repetition_penalty", 1.1)):
        engine = Engine(speculation=SPEC)
        engine.start(1, [1, 2, 3], 20, **{name: value})
        engine.run()
        assert engine.batch.load.drafts == 0 and engine.texts[sequence_id(1, 0)] == text_of([1, 2, 3], 20)


def test_a_wide_batch_does_not_speculate_and_stays_overlapped(monkeypatch):
    many = SPECULATING_SEQS + 1
    prompts = {task: [task + 1] * 3 for task in range(many)}
    prepare(monkeypatch, prompts, 12, 1.0)
    engine = Engine(speculation=SPEC, max_seqs=many, max_tokens=64, blocks=128)
    for task, prompt in prompts.items():
        engine.start(task, prompt, 12 if task else 3)
    ahead = 0
    while engine.step(overlapped=True):
        engine.batch.check()
        if len(engine.batch.running) == many:
            assert engine.batch.load.drafts == 0
            ahead += bool(engine.flying) and bool(engine.texts)
    assert ahead, "steps were launched while another was in flight"
    assert engine.batch.load.drafts > 0, "once it had grown narrow, it speculated"
    for task, prompt in prompts.items():
        assert engine.texts[sequence_id(task, 0)] == text_of(prompt, 12 if task else 3)


def test_drafts_take_no_block_that_a_decode_needs(monkeypatch):
    """In a pool that holds the two texts and no token more, speculation preempts nobody."""
    prompts = {1: [1] * 4, 2: [2] * 4}
    prepare(monkeypatch, prompts, 12, 0.5)
    engine = Engine(blocks=8, block_size=4, max_len=16, speculation=SPEC)
    for task, prompt in prompts.items():
        engine.start(task, prompt, 12)
    engine.run()
    assert engine.batch.load.preemptions == 0 and engine.batch.load.drafts > 0
    for task, prompt in prompts.items():
        assert engine.texts[sequence_id(task, 0)] == text_of(prompt, 12)


@pytest.mark.parametrize("seed", range(30))
def test_random_walk(monkeypatch, seed):
    """Arrivals, aborts, preemptions, samples and stop ids at random, with drafts of all qualities; nothing leaks."""
    rng = random.Random(seed)
    size, overlapped = rng.choice([1, 2, 4]), bool(seed % 2)
    engine = Engine(
        blocks=rng.randrange(48 // size + 1, 160 // size),
        block_size=size,
        max_seqs=rng.randrange(1, SPECULATING_SEQS + 4),
        max_tokens=rng.randrange(12, 40),
        max_len=48,
        caching=rng.random() < 0.7,
        speculation=Speculation(num_speculative_tokens=rng.randrange(1, 9)),
    )
    wholes: list[list[int]] = []
    draft_from(monkeypatch, wholes, rng.choice([0.5, 0.8, 0.95]))
    wanted: dict[int, list[int]] = {}
    aborted: set[int] = set()
    for task in range(1, 15):
        prompt = [1] * rng.randrange(0, 12) + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        count, n, stop = rng.randrange(1, 20), rng.choice([1, 1, 3]), [rng.randrange(VOCAB) for _ in range(3)]
        engine.start(task, prompt, count, n=n, seed=task, stop=stop)
        for i in range(n):
            wanted[sequence_id(task, i)] = text_of(prompt, count, task + i, frozenset(stop))
            wholes.append(prompt + text_of(prompt, count, task + i))
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


# ---- the whole engine over a tiny model on compiled kernels ---------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("speculate"))


BLOCK = 16  # tokens: the compiled kernels' smallest


class TinyEngine:
    """Batch, core and executor over a model on the compiled CPU device."""

    def __init__(self, folder, speculation: Speculation | None, *, blocks: int = 40, caching: bool = True):
        self.rig = Rig(folder, native=2, blocks=blocks, block_size=BLOCK)
        self.rtc = RTC(blocks, BLOCK, caching)
        self.batch = Batch(self.rtc, max_seqs=12, max_tokens=48, max_len=120, speculation=speculation)
        executor = Executor(self.rig.device, self.rig.model, self.rig.kv, self.batch.tables, BLOCK, 48)
        self.told: list[FromWorker] = []
        self.core = Core(self.batch, executor, ListInbox(), self.told.append)
        self.prompts: dict[int, list[int]] = {}
        self.said: dict[int, list] = {}  # of each sequence: (id, finish, log-probabilities)

    def start(self, task: int, prompt: list[int], params: SamplingParams, stop: list[int], seed: int) -> None:
        self.prompts[task] = prompt
        samples = [Sample(i, b"", seed + i) for i in range(params.n)]
        self.batch.start(Start(task, pack_ids(prompt), samples, params, params.max_tokens or 0, stop))

    def run(self, overlapped: bool = False, steps: int = 10_000) -> None:
        ahead = None
        while steps and (ahead or self.batch.has_work()):
            steps -= 1
            plan = self.batch.plan()
            launched = (plan, self.core.launch(plan)) if plan else None
            if not overlapped:
                ahead, launched = launched, None
            if ahead:
                self.core.finish(*ahead)
            elif launched is None:
                self.core.report()
            ahead = launched
            self.batch.check()
            self.listen()
        if ahead:
            self.core.finish(*ahead)
            self.listen()

    def listen(self) -> None:
        for message in self.told:
            assert isinstance(message, Tokens)
            given = message.logprobs or [None] * len(message.seqs)
            for seq, token, finish, logprobs in zip(message.seqs, message.ids, message.finish, given, strict=True):
                shown = None if logprobs is None else (logprobs.chosen, logprobs.rank, logprobs.top_ids, logprobs.top)
                self.said.setdefault(seq, []).append((token, finish, shown))
        self.told.clear()

    def close(self) -> None:
        self.rig.close()


CASES = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=60),
    "top_k": SamplingParams(temperature=0.4, top_k=20, max_tokens=60),
    "top_p": SamplingParams(temperature=0.5, top_p=0.8, max_tokens=60),
    "min_p": SamplingParams(temperature=0.6, min_p=0.05, max_tokens=60),
    "penalties": SamplingParams(
        temperature=0.5, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.4, max_tokens=40
    ),
    "logit_bias": SamplingParams(temperature=0.5, logit_bias={5: 4.0, 6: -5.0, 100: 3.0, 101: 3.0}, max_tokens=60),
    "min_tokens": SamplingParams(temperature=0.5, min_tokens=23, max_tokens=60),
    "logprobs": SamplingParams(temperature=0.3, logprobs=3, max_tokens=60),
    "samples": SamplingParams(temperature=0.5, n=2, max_tokens=40, logprobs=0),
    "wide": SamplingParams(temperature=0.5, n=4, max_tokens=40),  # too many at first, and more than the blocks hold
    "odd_limit": SamplingParams(temperature=0.0, max_tokens=37),
}


def run_case(folder, params: SamplingParams, stop: list[int], spec: Speculation | None, overlapped: bool, **more) -> TinyEngine:
    rng = np.random.default_rng(11)
    engine = TinyEngine(folder, spec, **more)
    for task in range(1, 4):
        prompt = rng.integers(3, 250, int(rng.integers(4, 30))).tolist() * (1 + task % 2)
        engine.start(task, prompt, params, stop, seed=77 * task)
    engine.run(overlapped)
    assert engine.rtc.used == 0
    engine.close()
    return engine


@BOTH
@pytest.mark.parametrize("drafts", ["lookup", "oracle"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_texts_are_bit_equal_with_and_without(monkeypatch, folder, name, drafts, overlapped):
    params = CASES[name]
    plain = run_case(folder, params, [], None, False)
    # Stop ids that occur in the text, early (held back by min_tokens) and in the middle of accepted runs.
    stop = [said[at][0] for said in plain.said.values() for at in (9, 30)] if name in ("min_tokens", "top_p") else []
    want = run_case(folder, params, stop, None, False) if stop else plain
    if drafts == "oracle":
        draft_from(monkeypatch, whole_texts(want), 0.85, tiny.VOCAB)
    spec = Speculation(num_speculative_tokens=6, prompt_lookup_min=1)
    got = run_case(folder, params, stop, spec, overlapped)
    assert got.said == want.said
    load = got.batch.load
    if name == "penalties":
        assert load.drafts == 0
    elif drafts == "oracle" and name != "wide":
        assert 10 < load.accepted_tokens < load.draft_tokens


def whole_texts(engine: TinyEngine) -> list[list[int]]:
    """Prompt and output of every sequence."""
    return [engine.prompts[seq >> 7] + [token for token, _, _ in said] for seq, said in engine.said.items()]


@BOTH
@pytest.mark.parametrize("caching", [False, True])
def test_compiled_texts_survive_preemption_and_aborts(monkeypatch, folder, overlapped, caching):
    params = SamplingParams(temperature=0.5, top_k=30, max_tokens=60)
    want = run_case(folder, params, [], None, False)
    draft_from(monkeypatch, whole_texts(want), 0.8, tiny.VOCAB)
    engine = run_case(folder, params, [], SPEC, overlapped, blocks=12, caching=caching)
    assert engine.batch.load.preemptions > 0 and engine.batch.load.accepted_tokens > 20
    assert engine.said == want.said

    engine = TinyEngine(folder, SPEC, caching=caching)
    for task, prompt in want.prompts.items():
        engine.start(task, prompt, params, [], seed=77 * task)
    engine.run(overlapped, steps=6)
    engine.batch.abort(2, -1)
    engine.run(overlapped)
    for task in want.prompts:
        said, whole = engine.said[sequence_id(task, 0)], want.said[sequence_id(task, 0)]
        assert said == (whole if task != 2 else whole[: len(said)])
    assert len(engine.said[sequence_id(2, 0)]) < 60 and engine.rtc.used == 0
    engine.close()
