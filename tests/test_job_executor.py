"""The JE against TEs that are played by the test: what it sends, what the stream gets, what the tables say."""

from __future__ import annotations

import asyncio
from array import array
from random import Random

import msgspec
import pytest

from engine.config import Config
from engine.rtc.keys import block_keys, root_key
from engine.types import (
    Abort,
    BlockNews,
    Finish,
    Load,
    PromptDone,
    Recount,
    Refused,
    SamplingParams,
    Start,
    Tokens,
    pack_ids,
    sequence_id,
    unpack_ids,
)
from scale.ladder import Climb
from sched.job_executor import MAX_ATTEMPTS, JobExecutor
from sched.metrics import Families, Metrics
from sched.stream import Delta, Overloaded, Submission, TaskFailed

EOS = 0


class Letters:
    """Token 65 is A."""

    eos_ids = frozenset({EOS})

    def detokenizer(self, skip_special: bool, continues: bool) -> Letters:
        return self

    def feed(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


class PlayedTE:
    """A TE whose link writes down what it is sent."""

    def __init__(self, number: int):
        self.id, self.state, self.role, self.lender = number, "ready", "colocated", -1
        self.sequences = self.prompt_tokens = self.expecting = self.computing = 0
        self.draining = False
        self.load = Load()
        self.climb = Climb(number, 0.0)
        self.blocks, self.memory = 0, {}
        self.sent: list = []
        self.link = self

    def __setattr__(self, name: str, value) -> None:
        """As of a TE, the JE hears of what makes it take tasks or not."""
        super().__setattr__(name, value)
        if name in ("state", "role", "draining") and (je := getattr(self, "listener", None)) is not None:
            je.changed(self)

    def send(self, message) -> None:
        self.sent.append(message)

    def look_whether_drained(self) -> None: ...

    def meet(self, other) -> None: ...


class Scene:
    def __init__(self, tes: int = 1, **settings):
        self.now = 100.0
        config = Config(max_model_len=64, block_size=16, max_num_batched_tokens=256, te=max(tes, 1), **settings)
        self.je = JobExecutor(config, Metrics(Families(), "m"), Random(1), clock=lambda: self.now)
        self.je.tokenizer = Letters()  # type: ignore[assignment]
        self.tes = [PlayedTE(i) for i in range(tes)]
        for te in self.tes:
            self.up(te)

    def up(self, te: PlayedTE) -> None:
        te.listener = self.je
        self.je.ready(te)  # type: ignore[arg-type]

    def submit(self, name: str = "r", prompts=((65, 66),), **params):
        live = self.je.admit(
            Submission(
                id=name,
                trace_id="t-" + name,
                model="m",
                prompts=[array("i", p) for p in prompts],
                params=SamplingParams(**params),
                keys=[list(block_keys(root_key(b""), pack_ids(array("i", p))[: (len(p) - 1) // 16 * 64], 16)) for p in prompts],
            )
        )
        got: list[Delta] = []
        live.stream.sink = got.extend
        return live, got

    def speak(self, te: PlayedTE, rows: list[tuple[int, int, int]], first: tuple[int, ...] = (), cached: int = 0) -> None:
        seqs, ids, finish = (list(c) for c in zip(*rows, strict=True))
        prompts = [PromptDone(s, cached, self.now) for s in first] or None
        message = Tokens(seqs, ids, finish, Load(), None, prompts)
        self.je.message(te, msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Tokens))  # type: ignore[arg-type]


def run(scene_test):
    """Streams make futures, so they want a loop."""

    def test():
        async def inside():
            scene_test()

        asyncio.run(inside())

    test.__name__ = scene_test.__name__
    return test


@run
def test_a_request_becomes_one_job_and_one_task_and_ends():
    s = Scene()
    live, got = s.submit(max_tokens=3)
    (start,) = s.tes[0].sent
    assert (
        isinstance(start, Start)
        and list(unpack_ids(start.prompt)) == [65, 66]
        and start.max_tokens == 3
        and EOS in start.stop_ids
    )
    assert s.tes[0].sequences == 1 and s.tes[0].prompt_tokens == 2
    seq = sequence_id(start.task, 0)
    s.speak(s.tes[0], [(seq, 67, 0)], first=(seq,), cached=1)
    assert s.tes[0].prompt_tokens == 0
    s.speak(s.tes[0], [(seq, 68, 0)])
    s.speak(s.tes[0], [(seq, EOS, Finish.STOP)])
    assert "".join(d.text for d in got) == "CD" and got[-1].finish == "stop" and got[-1].stop_reason is None
    assert (live.stream.usage.prompt_tokens, live.stream.usage.completion_tokens, live.stream.usage.cached_tokens) == (2, 3, 1)
    record = s.je.find("t-r")
    assert record is s.je.find("r") and record is not None
    assert [x for x, _ in record.life.times] == ["received", "queued", "running", "done"]
    (task,) = record.tasks()
    assert [x for x, _ in task.life.times] == ["queued", "dispatched", "decode", "done"] and task.kind == "unified"
    assert s.tes[0].sequences == 0 and s.je.outstanding == 0 and not s.je.live


@run
def test_a_stop_string_ends_the_sequence_on_the_te_too():
    s = Scene()
    _, got = s.submit(stop=["BC"], max_tokens=9)
    seq = sequence_id(s.tes[0].sent[0].task, 0)
    for token in (65, 66, 67):
        s.speak(s.tes[0], [(seq, token, 0)])
    assert [d.text for d in got] == ["A", "", ""] and (got[-1].finish, got[-1].stop_reason) == ("stop", "BC")
    assert s.tes[0].sent[1:] == [Abort(seq >> 7, 0)]
    s.speak(s.tes[0], [(seq, 68, 0)])  # said before the abort arrived
    assert len(got) == 3


@run
def test_stop_token_is_named():
    s = Scene()
    _, got = s.submit(stop_token_ids=[70], max_tokens=9)
    seq = sequence_id(s.tes[0].sent[0].task, 0)
    s.speak(s.tes[0], [(seq, 70, Finish.STOP)])
    assert (got[-1].text, got[-1].finish, got[-1].stop_reason) == ("", "stop", 70)


@run
def test_a_dead_te_is_replayed_on_another_and_the_stream_goes_on():
    s = Scene(tes=2)
    live, got = s.submit(n=2, max_tokens=5, seed=7)
    first, second = s.tes if s.tes[0].sent else s.tes[::-1]
    task = first.sent[0].task
    a, b = sequence_id(task, 0), sequence_id(task, 1)
    s.speak(first, [(a, 65, 0)], first=(a,))
    s.speak(first, [(a, 66, 0), (b, 80, Finish.LENGTH)], first=(b,))
    s.je.lost(first, "killed")  # type: ignore[arg-type]
    (again,) = second.sent
    assert [(x.index, list(unpack_ids(x.generated)), x.seed) for x in again.samples] == [(0, [65, 66], 7)]
    s.speak(first, [(a, 99, 0)])  # a message of the dead TE's that was still in its ring
    s.speak(second, [(a, 67, Finish.LENGTH)])
    assert "".join(d.text for d in got if d.index == 0) == "ABC"
    assert live.record.life.state == "done" and live.stream.usage.completion_tokens == 4
    (task_record,) = live.record.tasks()
    assert task_record.attempts == 2 and [x for x, _ in task_record.life.times].count("queued") == 2


@run
def test_a_task_that_kills_every_te_is_given_up():
    s = Scene()
    live, _ = s.submit()
    for _ in range(MAX_ATTEMPTS):
        s.je.lost(s.tes[0], "died")  # type: ignore[arg-type]
        s.tes[0] = PlayedTE(0)
        s.up(s.tes[0])
    assert isinstance(live.stream.error, TaskFailed) and live.record.life.state == "failed"
    assert not s.je.live and not s.je.held and s.je.outstanding == 0


@run
def test_a_task_that_comes_on_under_each_te_is_not_given_up():
    s = Scene()
    live, _ = s.submit()
    (entry,) = s.je.live.values()
    for i in range(2 * MAX_ATTEMPTS):
        s.speak(s.tes[0], [(sequence_id(entry.wire, 0), 65 + i, 0)])
        s.je.lost(s.tes[0], "died")  # type: ignore[arg-type]
        s.tes[0] = PlayedTE(0)
        s.up(s.tes[0])
    assert live.stream.error is None and live.record.life.state == "running"


@run
def test_a_new_te_takes_its_part_of_what_has_not_begun():
    s = Scene()
    lives = [s.submit(f"r{i}")[0] for i in range(6)]
    begun, *waiting = list(s.je.live.values())
    s.speak(s.tes[0], [(sequence_id(begun.wire, 0), 65, 0)])
    new = PlayedTE(1)
    s.up(new)
    assert (s.tes[0].sequences, new.sequences) == (3, 3)
    assert {e.request.record.id for e in s.je.live.values() if e.te is new} == {"r3", "r4", "r5"}, "the newest"
    assert [m.task for m in s.tes[0].sent if isinstance(m, Abort)] == [e.task.id for e in reversed(waiting[2:])]
    for entry in list(s.je.live.values()):
        s.speak(entry.te, [(sequence_id(entry.wire, 0), 66, Finish.LENGTH)])
    assert all(live.record.life.state == "done" for live in lives) and (s.tes[0].prompt_tokens, new.prompt_tokens) == (0, 0)


@run
def test_who_would_rather_hear_it_at_once_is_refused_when_it_would_be_late():
    s = Scene()
    s.submit("slow")
    (entry,) = s.je.live.values()
    s.now += 2.0
    s.speak(s.tes[0], [(sequence_id(entry.wire, 0), 65, 0)])

    def ask(name: str, **more):
        return s.je.admit(Submission(id=name, model="m", prompts=[array("i", [65])], params=SamplingParams(), **more))

    with pytest.raises(Overloaded, match="2000 ms, and wanted within 500 ms") as e:
        ask("late", slo_ttft_ms=500.0, reject_late=True)
    assert e.value.cause == "ttft" and s.je.find("late").life.state == "refused"
    with pytest.raises(Overloaded, match="deadline"):
        ask("dead", deadline=s.now + 1.0, reject_late=True)
    ask("patient", slo_ttft_ms=500.0)
    ask("in time", slo_ttft_ms=5000.0, reject_late=True)


@run
def test_a_prompt_goes_where_its_beginning_is_cached():
    s = Scene(tes=3)
    prompt = list(range(40))
    keys = b"".join(block_keys(root_key(b""), pack_ids(prompt[:32]), 16))
    s.je.message(s.tes[2], BlockNews(1, stored=keys))  # type: ignore[arg-type]
    s.submit("warm", prompts=[prompt])
    (entry,) = s.je.live.values()
    assert entry.te is s.tes[2] and "32 of 40 prompt tokens are there" in entry.task.reason
    s.je.message(s.tes[2], BlockNews(3))  # type: ignore[arg-type]  # the second was lost
    assert isinstance(s.tes[2].sent[-1], Recount)
    s.je.message(s.tes[2], BlockNews(4, evicted=keys, whole=True))  # type: ignore[arg-type]
    s.submit("cold", prompts=[prompt])
    assert s.tes[0].sequences == 1
    s.je.message(s.tes[1], BlockNews(1, stored=keys))  # type: ignore[arg-type]
    s.je.lost(s.tes[1], "killed")  # type: ignore[arg-type]
    assert not s.je.placing.tree.match(entry.keys).tes.size


@run
def test_tasks_wait_for_a_te_and_leave_with_their_caller():
    s = Scene(tes=0)
    one, _ = s.submit("one")
    two, _ = s.submit("two")
    assert len(s.je.held) == 2
    s.je.leave(one)
    te = PlayedTE(0)
    s.up(te)
    assert [m.task for m in te.sent] == [two.tasks[0].task.id]
    s.je.leave(two)
    assert te.sent[-1] == Abort(two.tasks[0].task.id) and te.sequences == te.prompt_tokens == 0
    assert [x.record.life.state for x in (one, two)] == ["cancelled", "cancelled"]
    s.je.leave(two)  # twice is harmless


@run
def test_a_full_queue_refuses_with_a_wait():
    s = Scene(max_num_seqs=2, max_num_queued_reqs=1)
    for i in range(3):
        s.submit(str(i))
    with pytest.raises(Overloaded) as e:
        s.submit("more")
    assert e.value.retry_after > 0
    record = s.je.find("more")
    assert record is not None and record.life.state == "refused"
    assert b'request_refused_total{cause="queue_full",model_name="m"} 1.0' in s.je.metrics.families.text()


@run
def test_several_prompts_are_several_jobs_of_one_request():
    s = Scene()
    live, got = s.submit(prompts=((65,), (66,)), n=2, max_tokens=1)
    for start in list(s.tes[0].sent):
        rows = [(sequence_id(start.task, i), 70 + i, Finish.LENGTH) for i in range(2)]
        s.speak(s.tes[0], rows)
    assert sorted(d.index for d in got) == [0, 1, 2, 3] and len(live.record.jobs) == 2
    assert live.record.life.state == "done"


@run
def test_what_a_te_refuses_fails_the_request():
    s = Scene()
    live, _ = s.submit()
    s.je.message(s.tes[0], Refused(sequence_id(s.tes[0].sent[0].task, 0), "too long"))  # type: ignore[arg-type]
    assert isinstance(live.stream.error, TaskFailed) and "too long" in str(live.stream.error)


@run
def test_load_goes_to_the_idler_te():
    s = Scene(tes=2)
    for i in range(6):
        s.submit(str(i))
    assert [te.sequences for te in s.tes] == [3, 3]


@run
def test_a_sequence_may_speak_several_times_in_a_step():
    s = Scene()
    live, got = s.submit(max_tokens=3)
    seq = sequence_id(s.tes[0].sent[0].task, 0)
    s.speak(s.tes[0], [(seq, 65, 0), (seq, 66, 0), (seq, 67, Finish.LENGTH)], first=(seq,))
    assert "".join(d.text for d in got) == "ABC" and got[-1].finish == "length"
    assert live.stream.usage.completion_tokens == 3 and live.record.life.state == "done"


@run
def test_a_sink_that_fails_leaves_the_others_of_the_step_alone():
    s = Scene()
    seqs = []
    for name in "ab":
        live, got = s.submit(name, max_tokens=9)
        seqs.append(sequence_id(s.tes[0].sent[-1].task, 0))
        if name == "a":
            bad = live
            live.stream.sink = lambda deltas: 1 / 0  # type: ignore[assignment, return-value]
    s.speak(s.tes[0], [(seqs[0], 65, 0), (seqs[1], 66, 0)])
    assert isinstance(bad.stream.error, ZeroDivisionError) and [d.text for d in got] == ["B"]


@run
def test_tokens_and_the_gaps_between_them_are_counted():
    s = Scene()
    s.submit(n=2, max_tokens=9)
    a, b = (sequence_id(s.tes[0].sent[0].task, i) for i in range(2))
    s.speak(s.tes[0], [(a, 65, 0), (b, 65, 0)])
    s.now += 0.04
    s.speak(s.tes[0], [(a, 66, 0), (b, 66, 0)])
    s.now += 200.0
    s.speak(s.tes[0], [(b, 67, 0)])
    value = s.je.metrics.families.registry.get_sample_value
    named, stem = {"model_name": "m"}, "deepserve:inter_token_latency_seconds"
    assert value("deepserve:generation_tokens_total", named) == 5
    assert value(f"{stem}_count", named) == 3 and value(f"{stem}_sum", named) == pytest.approx(200.08)
    buckets = [value(f"{stem}_bucket", named | {"le": le}) for le in ("0.025", "0.05", "80.0", "+Inf")]
    assert buckets == [0, 2, 2, 3]


@run
def test_who_waits_for_a_model_hears_how_it_comes_up_and_who_comes_later_too():
    s = Scene(tes=0)
    s.je.progress("weights 10 %")
    first, _ = s.submit("first")
    s.je.progress("weights 40 %")
    later, _ = s.submit("later")
    assert (first.stream.unheard, later.stream.unheard) == ("weights 40 %", "weights 40 %")
    s.up(PlayedTE(0))
    s.je.progress("weights 10 %")  # of a second TE: nobody waits for it
    placed, _ = s.submit("placed")
    assert later.stream.unheard == "weights 40 %" and placed.stream.unheard == ""


@run
def test_one_long_request_does_not_keep_all_that_came_after_it():
    s = Scene(max_num_queued_reqs=10**6)
    long, _ = s.submit("long")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sched.job_executor.KEPT_REQUESTS", 8)
        for i in range(60):
            live, _ = s.submit(f"r{i}")
            if i % 3:
                s.je.leave(live)
            assert len(s.je.requests) <= max(8, 2 * len(s.je.live) + 1)
        for entry in list(s.je.live.values()):
            assert s.je.find("t-" + entry.request.record.id) is entry.request.record
            if entry.request is not long:
                s.je.leave(entry.request)
        for i in range(60):
            s.je.leave(s.submit(f"s{i}")[0])
    assert len(s.je.requests) == len(s.je.by_trace) == 8 and s.je.find("long") is long.record
