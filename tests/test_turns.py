"""`Turns` at work in the job executor: which key's task is next, which TEs it may have now, and who is refused."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest

from engine.types import Finish, Load, PromptDone, SamplingParams, Start, Tokens, sequence_id
from sched.fairness import ABOUT, AGING, OUTPUT, free
from sched.live import LiveRequest
from sched.stream import Overloaded, Submission
from sched.tenants import ANYONE, Tenant
from tests import books
from tests.test_job_executor import PlayedTE, Scene, run

ALICE, BOB, CAROL = (Tenant(name=name) for name in ("alice", "bob", "carol"))


class Market(Scene):
    """Callers with keys. A TE's sequences end when the test says so."""

    def __init__(self, tes: int = 1, seats: int = 8, queue: int = 10**6, **settings):
        super().__init__(tes, max_num_seqs=seats, max_num_queued_reqs=queue, **settings)
        self.seats, self.count = seats, 0

    def ask(self, tenant: Tenant = ANYONE, tokens: int = 2, priority: int = 0, **params) -> LiveRequest:
        self.count += 1
        live = self.je.admit(
            Submission(
                id=f"r{self.count}",
                model="m",
                prompts=[array("i", [65] * tokens)],
                params=SamplingParams(**params),
                priority=priority,
                tenant=tenant,
            )
        )
        live.stream.sink = lambda deltas: None
        return live

    def asks(self, tenant: Tenant, count: int, **more) -> list[LiveRequest]:
        return [self.ask(tenant, **more) for _ in range(count)]

    def speak(self, live: LiveRequest, finish: int = 0) -> None:  # type: ignore[override]
        """Each of a task's open sequences goes on by a token."""
        (entry,) = live.tasks
        seqs = [sequence_id(entry.wire, i) for i in entry.open_indices()]
        first = None if entry.begun else [PromptDone(seqs[0], 0, self.now)]
        message = Tokens(seqs, [65] * len(seqs), [finish] * len(seqs), Load(), None, first)
        self.je.message(entry.te, message)  # type: ignore[arg-type]

    def end(self, live: LiveRequest) -> None:
        self.speak(live, Finish.LENGTH)

    def on(self, te: PlayedTE) -> list[LiveRequest]:
        """What it has, the oldest first."""
        return [e.request for e in sorted(self.je.live.values(), key=lambda e: e.wire) if e.te is te]

    def has(self, te: PlayedTE) -> Counter[str]:
        """Sequences by key."""
        counts: Counter[str] = Counter()
        for live in self.on(te):
            counts[live.flow.tenant.name] += live.open_samples
        return counts

    def waits(self, live: LiveRequest) -> bool:
        return live.tasks[0] in self.je.held


# ---- one key ------------------------------------------------------------------------------------------------------------


@run
def test_of_one_key_everything_goes_to_tes_at_once_by_its_own_priority():
    s = Market(tes=2, seats=2)
    for priority in (0, 3, -2, 1, 0, 5, 0, 0, 0, 1):
        s.ask(BOB, priority=priority, tokens=200)
    assert not s.je.held and [te.sequences for te in s.tes] == [5, 5]
    starts = sorted((m for te in s.tes for m in te.sent if isinstance(m, Start)), key=lambda m: m.task)
    assert [m.priority for m in starts] == [0, 3, -2, 1, 0, 5, 0, 0, 0, 1]
    books.check(s.je)


@run
def test_of_one_key_what_waits_for_a_te_goes_by_priority_then_in_order():
    s = Market(tes=0)
    lives = [s.ask(BOB, priority=p) for p in (0, 1, 0, -1)]
    te = PlayedTE(0)
    s.up(te)
    assert [m.task for m in te.sent] == [lives[i].tasks[0].wire for i in (3, 0, 2, 1)]


@run
def test_a_key_that_was_about_long_ago_is_no_other():
    s = Market(seats=2)
    s.end(s.ask(ALICE))
    s.asks(BOB, 4)
    assert len(s.je.held) == 3
    s.now += ABOUT
    s.asks(BOB, 4)
    assert not s.je.held and s.tes[0].sequences == 8


# ---- two keys -----------------------------------------------------------------------------------------------------------


def flooded(s: Market) -> list[LiveRequest]:
    """Alice was here, and Bob sends all that he can."""
    s.end(s.ask(ALICE))
    return s.asks(BOB, 12 * s.seats)


@run
def test_who_floods_leaves_a_seat_and_the_other_one_has_it_at_once():
    s = Market()
    flooded(s)
    te = s.tes[0]
    assert s.has(te) == {"bob": s.seats - free(s.seats)}
    one = s.ask(ALICE)
    assert not s.waits(one) and s.has(te)["alice"] == 1
    two = s.ask(ALICE)
    assert s.waits(two), "all seats are taken"
    s.end(next(live for live in s.on(te) if live.flow.tenant is BOB))
    assert not s.waits(two), "the next free seat is hers, however many wait before her"
    books.check(s.je)


@run
def test_both_have_half_when_both_flood_and_what_is_beyond_is_told_to_the_te():
    s = Market()
    flooded(s)
    te = s.tes[0]
    s.asks(ALICE, 20)
    for _ in range(40):
        s.end(s.on(te)[0])
        assert te.sequences <= s.seats
    assert abs(s.has(te)["alice"] - s.has(te)["bob"]) <= 1
    starts = {m.task: m.priority for m in te.sent if isinstance(m, Start)}
    bobs = [starts[e.wire] for e in sorted(s.je.live.values(), key=lambda e: e.wire) if e.request.flow.tenant is BOB and e.te]
    assert set(bobs) <= {0, 1}
    books.check(s.je)


@run
def test_ranks_tell_what_is_within_a_keys_share():
    s = Market(seats=8)
    s.end(s.ask(ALICE))
    te = s.tes[0]
    te.sent.clear()
    s.asks(BOB, 7, priority=-9)
    assert [m.priority for m in te.sent] == [0, 0, 0, 0, 1, 1, 1], "what keys say of their own requests is no word against others"
    s.ask(ALICE, priority=9)
    assert te.sent[-1].priority == 0


@run
def test_weights_are_parts():
    s = Market(seats=12)
    heavy, light = Tenant(name="heavy", weight=3.0), Tenant(name="light")
    s.end(s.ask(light))
    s.asks(heavy, 300)
    s.asks(light, 300)
    for _ in range(200):
        s.now += 0.01
        s.end(s.on(s.tes[0])[0])
    assert s.has(s.tes[0])["heavy"] == pytest.approx(9, abs=1)
    books.check(s.je)


@run
def test_whoever_was_served_least_is_next():
    s = Market(seats=1)
    s.end(s.ask(ALICE))
    s.end(s.ask(BOB))
    s.asks(BOB, 60)
    s.asks(ALICE, 60)
    turns: Counter[str] = Counter()
    for _ in range(70):
        (live,) = s.on(s.tes[0])
        turns[live.flow.tenant.name] += 1
        for _ in range(3 if live.flow.tenant is BOB else 0):
            s.speak(live)
        s.end(live)
    # Two tokens in, and one or four out.
    assert turns["bob"] * (2 + 4 * OUTPUT) == pytest.approx(turns["alice"] * (2 + OUTPUT), rel=0.1), "tokens, not requests"


@run
def test_output_is_charged_as_it_comes():
    s = Market()
    live = s.ask(BOB, tokens=9)
    before = live.flow.virtual
    s.speak(live)
    s.speak(live)
    assert before == 9.0 and live.flow.virtual == before + 2 * OUTPUT


@run
def test_a_prompt_that_starts_again_is_charged_once():
    s = Market()
    live = s.ask(BOB, tokens=9)
    s.je.lost(s.tes[0], "killed")  # type: ignore[arg-type]
    s.tes[0] = PlayedTE(0)
    s.up(s.tes[0])
    assert live.tasks[0].te is s.tes[0] and live.flow.virtual == 9.0


@run
def test_a_long_prompt_of_one_key_is_kept_back_while_the_te_has_enough_to_read():
    s = Market(seats=64)
    s.je.max_len = 10**6
    s.end(s.ask(ALICE))
    s.asks(BOB, 20, tokens=200)
    te = s.tes[0]
    assert te.prompt_tokens < 3 * 256 and s.je.held
    assert not s.waits(s.ask(ALICE)), "a short one of another key goes at once"
    before = len(s.je.held)
    for live in s.on(te):
        s.speak(live)
    assert len(s.je.held) < before, "they have been read: the next ones may come"
    books.check(s.je)


@run
def test_a_key_of_a_lower_level_waits_but_not_for_ever():
    s = Market(seats=1)
    high, low = Tenant(name="high", priority=0), Tenant(name="low", priority=2)
    s.end(s.ask(low))
    s.end(s.ask(high))
    s.asks(high, 200)
    waiting = s.ask(low)
    turns = 0
    while s.waits(waiting):
        s.now += 0.5
        s.end(s.on(s.tes[0])[0])
        turns += 1
    assert 2 * AGING / 0.5 - 2 <= turns <= 2 * AGING / 0.5 + 3


@run
def test_of_several_tes_each_keeps_a_seat_free():
    s = Market(tes=3, seats=4)
    s.end(s.ask(ALICE))
    s.asks(BOB, 40)
    assert [te.sequences for te in s.tes] == [3, 3, 3]
    s.asks(ALICE, 3)
    assert [s.has(te)["alice"] for te in s.tes] == [1, 1, 1]
    books.check(s.je)


@run
def test_one_request_of_more_sequences_than_seats_goes_to_an_empty_te():
    s = Market(seats=4)
    s.end(s.ask(ALICE))
    live = s.ask(BOB, n=6)
    assert not s.waits(live) and s.tes[0].sequences == 6
    assert s.waits(s.ask(ALICE))
    s.end(live)
    assert s.has(s.tes[0]) == {"alice": 1}


# ---- whatever they send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_nobody_starves_and_no_te_gets_more_than_it_runs(seed):
    def body() -> None:
        rng = random.Random(seed)
        s = Market(tes=rng.choice([1, 2, 4]), seats=rng.choice([2, 4, 8]))
        keys = [Tenant(name=f"k{i}", weight=rng.choice([0.5, 1.0, 3.0]), priority=rng.choice([0, 0, 1])) for i in range(4)]
        rates = [rng.choice([0.05, 0.3, 3.0]) for _ in keys]
        for key in keys:
            s.end(s.ask(key))  # all of them are about
        waiting: dict[LiveRequest, float] = {}
        longest = 0.0
        for _ in range(500):
            s.now += 0.05
            for key, rate in zip(keys, rates, strict=True):
                if rng.random() < rate * 0.5 and len(s.je.live) < 300:
                    waiting[s.ask(key, tokens=rng.randrange(1, 60), n=rng.choice([1, 1, 1, 2]))] = s.now
            for te in s.tes:
                for live in s.on(te):
                    if rng.random() < 0.1:
                        s.end(live)
                    elif rng.random() < 0.5:
                        s.speak(live)
                assert te.sequences <= s.seats
            for live in [live for live in waiting if not s.waits(live)]:
                del waiting[live]
            if rng.random() < 0.05:
                s.je.leave(rng.choice(list(s.je.live.values())).request if s.je.live else s.ask(keys[0]))
            for head in s.je.held.heads(s.now):  # the longest that a key has had a task here without a turn
                longest = max(longest, s.now - head.request.flow.since)
            books.check(s.je)
        assert longest < 4 * AGING
        for _ in range(10**4):
            if not s.je.live:
                break
            for te in s.tes:
                for live in s.on(te):
                    s.end(live)
        books.check(s.je)
        turns = s.je.held
        assert not s.je.live and not turns and not turns.sequences and not turns.unread and not turns.outstanding
        assert all(not flow.heap and not flow.places for flow in turns.line.flows.values())

    run(body)()


# ---- a full queue -------------------------------------------------------------------------------------------------------


@run
def test_a_full_queue_refuses_only_those_who_have_more_than_their_share():
    s = Market(seats=4, queue=6)
    s.end(s.ask(ALICE))
    s.asks(BOB, 10)
    with pytest.raises(Overloaded):
        s.ask(BOB)
    alices = s.asks(ALICE, 5)
    with pytest.raises(Overloaded) as e:
        s.ask(ALICE)
    assert e.value.cause == "queue_full" and e.value.retry_after > 0
    assert s.je.held.outstanding == {"alice": 5, "bob": 10} and s.je.outstanding == 15
    s.je.leave(alices[0])
    s.ask(ALICE)
    with pytest.raises(Overloaded):
        s.ask(BOB)
    with pytest.raises(Overloaded):
        s.ask(CAROL, n=6)
    s.ask(CAROL, n=3)  # a third of ten
    books.check(s.je)


@run
def test_of_one_key_a_full_queue_refuses_as_ever():
    s = Market(seats=4, queue=6)
    s.asks(BOB, 10)
    with pytest.raises(Overloaded):
        s.ask(BOB)
    assert s.je.held.outstanding == {"bob": 10}
    for entry in list(s.je.live.values()):
        s.je.leave(entry.request)
    assert not s.je.held.outstanding and not s.je.held.sequences and not s.je.held.unread


@pytest.mark.parametrize("n", [2, 3, 8, 12])
@pytest.mark.parametrize("tes", [1, 3])
def test_a_request_of_several_texts_is_made_room_for_in_time(n, tes):
    def body() -> None:
        rng = random.Random(n)
        s = Market(tes=tes)
        flooded(s)
        live = s.ask(ALICE, n=n)
        at, least = s.now, tes * s.seats
        while s.waits(live):
            s.now += 0.2
            assert s.now < at + AGING + 0.2 * 5 * s.seats * tes
            busy = [one for te in s.tes for one in s.on(te) if one.flow.tenant is BOB]
            s.end(rng.choice(busy))
            s.ask(BOB)
            least = min(least, sum(te.sequences for te in s.tes))
        assert least >= (tes - 1) * (s.seats - free(s.seats)) - 1, "one TE makes room, the others go on"
        books.check(s.je)

    run(body)()


# ---- who comes after a flood --------------------------------------------------------------------------------------------


@run
def test_what_a_key_that_was_alone_has_sent_ahead_waits_for_its_turn_again():
    s = Market(tes=2)
    flood = s.asks(BOB, 60)
    assert all(not s.waits(live) for live in flood)
    for live in flood[:4]:
        s.speak(live)
    alice = s.ask(ALICE)
    books.check(s.je)
    assert not s.waits(alice), "there is a seat"
    assert all(sum(s.has(te).values()) <= s.seats for te in s.tes)
    assert all(not s.waits(live) for live in flood[:4]), "what has begun goes on"
    taken_back = [live for live in flood if s.waits(live)]
    assert len(taken_back) == 60 - 2 * (s.seats - free(s.seats)) and not set(flood[:8]) & set(taken_back), "the newest"
    for live in flood[:4]:
        s.end(live)
    assert not s.waits(taken_back[0]), "the oldest of them is next"


@run
def test_a_floods_waiting_is_no_reason_to_refuse_another_key():
    s = Market()
    flood = s.asks(BOB, 40)
    s.ask(ALICE)
    s.now += 100.0
    for live in flood[:3]:
        s.end(live)
    late = {"slo_ttft_ms": 500.0, "reject_late": True}

    def ask(tenant: Tenant) -> LiveRequest:
        prompts = [array("i", [65, 66])]
        s.count += 1
        return s.je.admit(
            Submission(id=f"r{s.count}", model="m", prompts=prompts, params=SamplingParams(), tenant=tenant, **late)
        )

    ask(ALICE).stream.sink = lambda deltas: None
    with pytest.raises(Overloaded, match="wanted within 500 ms"):
        ask(BOB)
