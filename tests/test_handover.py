"""Handing sequences over between two TEs over the fake device: every text must equal the plain oracle's, whatever comes when, is
cancelled or preempted, and nothing is left behind. The control process's part is played by `Control`, with late mail."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.types import (
    Abort,
    Adopt,
    Adopted,
    Closed,
    HandedOver,
    Handover,
    Link,
    Move,
    Release,
    Reserved,
    Sample,
    SamplingParams,
    Start,
    Tokens,
    UserError,
    pack_ids,
    sequence_id,
    split_sequence_id,
)
from tests.fake_device import VOCAB, Engine, SlowOutbound, text_of

HOW = pytest.mark.parametrize("how", ["layer", "request", "lent"])


class Control:
    """Two TEs, 0 and 1, and mail to both that arrives when the test says so."""

    def __init__(self, how: str, rng: random.Random, **sizes):
        self.how, self.rng = how, rng
        self.engines = [Engine(**sizes), Engine(**sizes)]
        if how == "lent":
            self.engines[0].device.memory = self.engines[1].device.memory
        self.outbound = [SlowOutbound(e, dict(enumerate(self.engines))) for e in self.engines]
        for engine, outbound in zip(self.engines, self.outbound, strict=True):
            engine.core.outbound = outbound
        self.mail: list[list] = [[], []]
        self.tasks: dict[int, dict] = {}
        self.reserved: dict[int, Reserved] = {}
        self.texts: dict[int, list[int]] = {}
        self.over: set[int] = set()
        self.at: dict[int, int] = {}  # sequence -> the TE whose tokens count
        self.writing: dict[int, int] = {}  # sequence -> the TE that may write where it is expected
        self.cancelled: set[int] = set()

    def start(self, task: int, prompt: list[int], count: int, n: int = 1, seed: int = 0) -> None:
        params = SamplingParams(max_tokens=count, n=n)
        samples = [Sample(i, b"", seed + i) for i in range(n)]
        self.tasks[task] = {"prompt": prompt, "count": count, "samples": samples, "params": params}
        for sample in samples:
            self.at[sequence_id(task, sample.index)] = 1
        self.mail[1].append(Start(task, pack_ids(prompt), samples, params, count, [], expect=True))

    def cancel(self, task: int) -> None:
        if task in self.cancelled:
            return
        self.cancelled.add(task)
        for sample in self.tasks[task]["samples"]:
            seq = sequence_id(task, sample.index)
            if seq in self.writing:
                self.mail[self.writing[seq]].append(Abort(*split_sequence_id(seq)))  # it answers
            else:
                self.mail[1].append(Abort(*split_sequence_id(seq)))

    def hear(self, te: int, message) -> None:
        if isinstance(message, Tokens):
            for seq, token, finish in zip(message.seqs, message.ids, message.finish, strict=True):
                if seq in self.over or split_sequence_id(seq)[0] in self.cancelled:
                    continue
                assert te == self.at[seq], "a TE speaks for a sequence that isn't its own"
                if token >= 0:
                    self.texts.setdefault(seq, []).append(token)
                if finish:
                    self.over.add(seq)
        elif isinstance(message, Reserved):
            task, index = split_sequence_id(message.seq)
            if task in self.cancelled:
                return
            entry = self.tasks[task]
            self.at[message.seq] = self.writing[message.seq] = 0
            handover = Handover(1, message.blocks, message.cached, self.how)
            only = [s for s in entry["samples"] if s.index == index]
            prompt = pack_ids(entry["prompt"])
            self.mail[0].append(Start(task, prompt, only, entry["params"], entry["count"], [], handover=handover))
        elif isinstance(message, HandedOver):
            task, _ = split_sequence_id(message.seq)
            del self.writing[message.seq]
            if message.tokens < 0:
                self.mail[1 - te].append(Abort(*split_sequence_id(message.seq)))
            elif task in self.cancelled:
                self.mail[1 - te].append(Abort(*split_sequence_id(message.seq)))
                self.mail[te].append(Release(message.seq))
            else:
                assert message.tokens == len(self.tasks[task]["prompt"]) + len(self.texts[message.seq]) - 1
                self.at[message.seq] = 1 - te
                self.mail[1 - te].append(Adopt(message.seq, pack_ids(self.texts[message.seq])))
        elif isinstance(message, Adopted):
            self.mail[1 - te].append(Release(message.seq))
        elif isinstance(message, Closed):
            del self.writing[message.seq]
            self.mail[1 - te].append(Abort(*split_sequence_id(message.seq)))

    def turn(self, overlapped: bool) -> bool:
        """Something happens somewhere; whether more may."""
        te = self.rng.randrange(2)
        engine, mail = self.engines[te], self.mail[te]
        for _ in range(self.rng.randrange(3)):
            if mail:
                engine.core.obey(mail.pop(0))
        for _ in range(self.rng.randrange(4)):
            self.outbound[te].tick()
        engine.core.settle(engine.core.drain())
        told = list(engine.told)
        engine.told.clear()
        engine.step(overlapped, told.append)
        for message in told:
            self.hear(te, message)
        engine.batch.check()
        busy = [e.batch.has_work() or e.flying or e.core.ends or e.core.closing for e in self.engines]
        return any(busy) or any(self.mail) or any(o.queue for o in self.outbound)

    def run(self, overlapped: bool, limit: int = 20000) -> None:
        while self.turn(overlapped):
            limit -= 1
            assert limit, "no end"
        for engine in self.engines:
            assert not engine.batch.sequences and not engine.rtc.used
        assert not self.writing

    def check_texts(self) -> None:
        for task, entry in self.tasks.items():
            for sample in entry["samples"]:
                seq = sequence_id(task, sample.index)
                want = text_of(entry["prompt"], entry["count"], sample.seed)
                got = self.texts.get(seq, [])
                assert got == want[: len(got)]
                if task not in self.cancelled:
                    assert got == want and seq in self.over


@HOW
@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
def test_a_prompt_is_computed_here_and_its_text_there(how, overlapped):
    control = Control(how, random.Random(1))
    control.start(1, list(range(20, 41)), 9)
    control.start(2, list(range(20, 41)), 1)  # ends with its first token: nothing is handed over
    control.run(overlapped)
    control.check_texts()
    prefill, decode = control.engines
    assert decode.batch.load.prompt_tokens == 0, "the decode TE computed a prompt"
    # 8 more tokens of the first; the second needed none there.
    assert decode.device.tokens_run == 8 and prefill.device.tokens_run <= 2 * 21


@HOW
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_mail_any_cancel_same_text(how, seed):
    rng = random.Random(seed)
    control = Control(how, rng, blocks=rng.choice([20, 40, 64]), max_seqs=rng.choice([2, 4, 8]), max_tokens=rng.choice([8, 32]))
    common = [rng.randrange(VOCAB) for _ in range(30)]
    waiting = list(range(1, rng.randrange(2, 9)))
    overlapped = rng.random() < 0.5
    for _ in range(400):
        if waiting and rng.random() < 0.2:
            prompt = common[: rng.randrange(0, 30)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
            control.start(waiting.pop(0), prompt, rng.randrange(1, 18), n=rng.choice([1, 1, 1, 3]), seed=rng.randrange(99))
        if control.tasks and rng.random() < 0.02:
            control.cancel(rng.choice(list(control.tasks)))
        control.turn(overlapped)
    control.run(overlapped)
    control.check_texts()
    assert np.all(np.array([e.rtc.used for e in control.engines]) == 0)


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_decode_moves_between_two_tes(overlapped, seed):
    rng = random.Random(seed)
    control = Control("request", rng, blocks=64)
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
    count, room = 30, rng.choice([4, 12])
    task, seq = 1, sequence_id(1, 0)
    params, sample = SamplingParams(max_tokens=count), Sample(0, b"", 3)
    control.tasks[task] = {"prompt": prompt, "count": count, "samples": [sample], "params": params}
    control.at[seq] = 0
    control.mail[0].append(Start(task, pack_ids(prompt), [sample], params, count, []))
    while len(control.texts.get(seq, [])) < rng.randrange(1, 10):
        control.turn(overlapped)
    known = control.texts[seq]
    there = control.engines[1]
    there.core.obey(Start(task, pack_ids(prompt), [Sample(0, pack_ids(known + [0] * room), 3)], params, count, [], expect=True))
    told: list = []
    there.step(False, told.append)
    (reserved,) = [m for m in told if isinstance(m, Reserved)]
    assert reserved.cached == 0
    control.writing[seq] = 0
    control.mail[0].append(Move(seq, Handover(1, reserved.blocks, 0, "request")))
    if rng.random() < 0.3:
        control.cancel(task)
    control.run(overlapped)
    control.check_texts()


def test_a_decode_that_is_preempted_before_it_could_move_stays():
    here, there = Engine(blocks=12), Engine(blocks=12)
    here.core.outbound = SlowOutbound(here, {1: there})
    prompts = {1: list(range(14)), 2: list(range(30, 44))}
    for task, prompt in prompts.items():
        here.start(task, prompt, 30)
    told: list = []
    while here.batch.load.preemptions == 0:
        old, new = (here.batch.sequences.get(sequence_id(task, 0)) for task in prompts)
        if old and new and new.flying and not here.rtc.available and len(old.blocks) * 4 < old.target:
            here.core.obey(Move(new.id, Handover(1, pack_ids(list(range(12))), 0, "request")))
        here.step(True, told.append)
    assert new.handover is None, "a sequence without blocks can't be waited for"
    for _ in range(200):
        here.step(True, told.append)
        here.batch.check()
    assert [m.tokens for m in told if isinstance(m, HandedOver)] == [-1] and not here.batch.sequences
    texts: dict[int, list[int]] = {}
    for message in (m for m in told if isinstance(m, Tokens)):
        for seq, token in zip(message.seqs, message.ids, strict=True):
            texts.setdefault(seq, []).append(token)
    assert texts == {sequence_id(task, 0): text_of(prompt, 30) for task, prompt in prompts.items()}


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
def test_a_layer_that_was_not_carried_is_no_handover(overlapped):
    here, there = Engine(), Engine()
    here.core.outbound = outbound = SlowOutbound(here, {1: there})
    prompt = pack_ids(list(range(40)))
    handover = Handover(1, pack_ids(list(range(11))), 0, "layer")
    here.core.obey(Start(1, prompt, [Sample(0, b"", 0)], SamplingParams(max_tokens=9), 9, [], handover=handover))
    told: list = []
    here.step(overlapped, told.append)
    while not outbound.queue or not outbound.queue[0].here:
        outbound.tick()
    outbound.tick("the device failed")
    for _ in range(10):
        here.step(overlapped, told.append)
        outbound.tick()
        here.core.settle(here.core.drain())
    assert [type(m) for m in told if not isinstance(m, Tokens)] == [Closed] and not here.batch.sequences


def test_what_is_still_carried_of_a_preempted_prompt_is_waited_for():
    here, there = Engine(), Engine()
    here.core.outbound = outbound = SlowOutbound(here, {1: there})
    prompt = pack_ids(list(range(40)))
    handover = Handover(1, pack_ids(list(range(11))), 0, "layer")
    here.core.obey(Start(1, prompt, [Sample(0, b"", 0)], SamplingParams(max_tokens=9), 9, [], handover=handover))
    told: list = []
    here.step(False, told.append)
    assert outbound.queue
    here.batch.preempt(here.batch.running[0])
    here.core.obey(Abort(1))
    here.step(False, told.append)
    assert not any(isinstance(m, Closed) for m in told), "the other TE would give its blocks away"
    while outbound.queue:
        outbound.tick()
    here.core.settle(here.core.drain())
    here.step(False, told.append)
    assert any(isinstance(m, Closed) for m in told)


def test_one_dead_peer_keeps_no_other_from_being_linked():
    class Linked(SlowOutbound):
        def link(self, peer) -> None:
            if peer == "dead":
                raise UserError("it is gone")
            linked.append(peer)

    linked: list = []
    here = Engine()
    here.core.outbound = Linked(here, {})
    here.core.obey(Link(["dead", "second"]))  # type: ignore[list-item]
    assert linked == ["second"]
