"""A pair of TEs played by the test: what each side is told at every point at which a request can end or a TE can die."""

from __future__ import annotations

import pytest

from engine.types import (
    Abort,
    Adopt,
    Adopted,
    Closed,
    Finish,
    HandedOver,
    Move,
    Refused,
    Release,
    Reserved,
    Start,
    pack_ids,
    sequence_id,
    unpack_ids,
)
from tests.test_job_executor import PlayedTE, Scene, run


class Pair(Scene):
    """TE 0 computes prompts, TE 1 the rest; `extra` further pairs."""

    def __init__(self, pairs: int = 1, **settings):
        super().__init__(0, **settings)
        self.tes = [PlayedTE(i) for i in range(2 * pairs)]
        for i, te in enumerate(self.tes):
            te.role = "decode" if i % 2 else "prefill"
            self.up(te)

    def hear(self, te: int, message) -> None:
        self.je.message(self.tes[te], message)  # type: ignore[arg-type]

    def mail(self, te: int) -> list:
        sent, self.tes[te].sent = self.tes[te].sent, []
        return sent

    def die(self, te: int) -> None:
        self.tes[te].state = "dead"
        self.je.lost(self.tes[te], "killed")  # type: ignore[arg-type]

    def back(self, te: int) -> None:
        new = PlayedTE(te)
        new.role = self.tes[te].role
        self.tes[te] = new
        self.up(new)

    def reserve(self) -> int:
        """Up to the prefill TE's start: the sequence."""
        (start,) = self.mail(1)
        assert isinstance(start, Start) and start.expect and start.handover is None
        seq = sequence_id(start.task, start.samples[0].index)
        assert not self.mail(0), "nothing is computed before there is room for it"
        self.hear(1, Reserved(seq, pack_ids([4, 5]), 0))
        (work,) = self.mail(0)
        assert isinstance(work, Start) and work.handover is not None and work.handover.to == 1 and not work.expect
        assert list(unpack_ids(work.handover.blocks)) == [4, 5] and len(work.samples) == 1
        return seq

    def over(self) -> bool:
        je = self.je
        idle = not any(te.sequences or te.prompt_tokens for te in self.tes if te.state == "ready")
        return idle and not (je.live or je.held or je.passages.table or je.moves or je.outstanding)


@run
def test_two_tasks_one_text():
    s = Pair()
    live, got = s.submit(max_tokens=3)
    assert s.tes[0].prompt_tokens == 2 and s.tes[1].sequences == 1
    seq = s.reserve()
    s.speak(s.tes[0], [(seq, 67, 0)], first=(seq,), cached=1)
    assert s.tes[0].prompt_tokens == 0 and not s.mail(1), "its blocks aren't there yet"
    s.hear(0, HandedOver(seq, 2))
    assert s.mail(1) == [Adopt(seq, pack_ids([67]))] and not s.mail(0)
    s.hear(1, Adopted(seq))
    assert s.mail(0) == [Release(seq)]
    s.speak(s.tes[1], [(seq, 68, 0)])
    s.speak(s.tes[1], [(seq, 69, Finish.LENGTH)])
    assert "".join(d.text for d in got) == "CDE" and live.stream.usage.cached_tokens == 1 and s.over()
    kinds = {task.kind: [x for x, _ in task.life.times] for task in live.record.tasks()}
    assert kinds["prefill"] == ["queued", "dispatched", "prefill", "done"]
    assert kinds["decode"] == ["queued", "dispatched", "decode", "done"]


@run
def test_a_text_of_one_token_is_never_handed_over():
    s = Pair()
    s.submit(max_tokens=1)
    seq = s.reserve()
    s.speak(s.tes[0], [(seq, 67, Finish.LENGTH)], first=(seq,))
    assert not s.mail(1), "the prefill TE may still write there"
    s.hear(0, Closed(seq))
    assert s.mail(1) == [Abort(*divmod(seq, 128))] and s.over()


@run
def test_a_stop_string_in_the_first_token():
    s = Pair()
    s.submit(max_tokens=9, stop=["C"])
    seq = s.reserve()
    s.speak(s.tes[0], [(seq, 67, 0)], first=(seq,))
    assert s.mail(0) == [Abort(*divmod(seq, 128))] and not s.mail(1)
    s.hear(0, HandedOver(seq, 2))  # said before it heard
    assert s.mail(1) == [Abort(*divmod(seq, 128))] and s.mail(0) == [Release(seq)] and s.over()


@pytest.mark.parametrize("when", ["reserving", "writing", "written", "adopting", "decoding"])
@pytest.mark.parametrize("end", ["cancel", "prefill dies", "decode dies"])
def test_the_end_at_every_point(when, end):
    def body() -> None:
        s = Pair()
        live, got = s.submit(max_tokens=5)
        points = ["reserving", "writing", "written", "adopting", "decoding"]
        at = points.index(when)
        said = ""
        if at >= 1:
            seq = s.reserve()
        else:
            (start,) = s.mail(1)
            seq = sequence_id(start.task, 0)
        if at >= 2:
            s.speak(s.tes[0], [(seq, 67, 0)], first=(seq,))
            said = "C"
        if at >= 3:
            s.hear(0, HandedOver(seq, 2))
            s.mail(1)
        if at >= 4:
            s.hear(1, Adopted(seq))
            s.speak(s.tes[1], [(seq, 68, 0)])
            s.mail(0)
            said = "CD"
        abort = Abort(seq >> 7, 0)
        if end == "cancel":
            s.je.leave(live)
            mail = s.mail(0), s.mail(1)
            if when == "reserving" or when == "decoding":
                assert mail == ([], [Abort(seq >> 7)])
            elif when == "adopting":
                assert mail == ([], [abort])
                s.hear(1, Adopted(seq))
                assert s.mail(0) == [Release(seq)]
            else:
                assert mail == ([abort], []), "its blocks are not free while the other may write there"
                s.hear(0, Closed(seq))
                assert s.mail(1) == [abort]
            assert s.over()
            return
        if end == "prefill dies":
            s.die(0)
            if when in ("adopting", "decoding"):
                assert not s.mail(1) and not s.je.held, "its part was done"
            else:
                assert set(map(type, s.mail(1))) == {Abort} and len(s.je.held) == 1
                s.back(0)
        else:
            s.die(1)
            mail = s.mail(0)
            assert mail == {"reserving": [], "decoding": [], "adopting": [Release(seq)]}.get(when, [abort])
            assert len(s.je.held) == 1
            s.hear(0, Closed(seq))  # stale: its passage is gone
            s.back(1)
        if end == "decode dies" or at < 3:
            (start,) = s.mail(1)
            assert isinstance(start, Start) and "".join(map(chr, unpack_ids(start.samples[0].generated))) == said
            new = sequence_id(start.task, 0)
            assert new != seq, "who still speaks of the last attempt must not be heard"
            s.speak(s.tes[0], [(seq, 99, 0)])
            s.hear(1, Reserved(new, pack_ids([4, 5]), 0))
            s.mail(0)
            s.speak(s.tes[0], [(new, 69, 0)], first=(new,))
            s.hear(0, HandedOver(new, 2 + len(said)))
            (adopt,) = s.mail(1)
            assert adopt == Adopt(new, pack_ids([*map(ord, said), 69]))
            s.hear(1, Adopted(new))
            s.speak(s.tes[1], [(new, 70, Finish.LENGTH)])
            assert "".join(d.text for d in got) == said + "EF"
        else:
            s.hear(1, Adopted(seq))
            s.speak(s.tes[1], [(seq, 70, Finish.LENGTH)])
            assert "".join(d.text for d in got) == said + "F"
        assert s.over()

    run(body)()


@run
def test_several_samples_wait_for_the_first_ones_prompt_on_the_decode_te():
    s = Pair()
    live, _ = s.submit(max_tokens=3, n=3)
    (start,) = s.mail(1)
    assert [x.index for x in start.samples] == [0, 1, 2]
    seq = sequence_id(start.task, 0)
    s.hear(1, Reserved(seq, pack_ids([1]), 0))
    (work,) = s.mail(0)
    assert [x.index for x in work.samples] == [0]
    s.je.leave(live)
    assert s.mail(0) == [Abort(start.task, 0)] and s.mail(1) == [Abort(start.task, 1), Abort(start.task, 2)]
    s.hear(0, Closed(seq))
    assert s.mail(1) == [Abort(start.task, 0)] and s.over()


@run
def test_a_transfer_that_fails_is_another_attempt():
    s = Pair()
    s.submit(max_tokens=3)
    seq = s.reserve()
    s.speak(s.tes[0], [(seq, 67, 0)], first=(seq,))
    s.hear(0, Closed(seq))
    forget, *_, again = s.mail(1)
    assert forget == Abort(seq >> 7, 0)
    assert isinstance(again, Start) and list(unpack_ids(again.samples[0].generated)) == [67]


class Movers(Scene):
    def __init__(self):
        super().__init__(2)
        self.live, self.got = self.submit(max_tokens=9)
        (start,) = self.tes[0].sent
        self.seq = sequence_id(start.task, 0)
        self.speak(self.tes[0], [(self.seq, 65, 0)], first=(self.seq,))
        self.tes[0].sent = []
        assert self.je.move_away(self.tes[0]) == (1, 0)  # type: ignore[arg-type]
        (expect,) = self.tes[1].sent
        assert expect.expect and list(unpack_ids(expect.samples[0].generated)) == [65]
        self.tes[1].sent = []

    def hear(self, te: int, message) -> None:
        self.je.message(self.tes[te], message)  # type: ignore[arg-type]


@run
def test_a_decode_moves_and_goes_on():
    s = Movers()
    first, second = s.tes
    s.speak(first, [(s.seq, 66, 0)])
    s.hear(1, Reserved(s.seq, pack_ids([7]), 0))
    (move,) = first.sent
    assert isinstance(move, Move) and move.handover.to == 1
    s.speak(first, [(s.seq, 67, 0)])
    s.hear(0, HandedOver(s.seq, 4))
    assert second.sent == [Adopt(s.seq, pack_ids([65, 66, 67]))] and (first.sequences, second.sequences) == (0, 1)
    s.hear(1, Adopted(s.seq))
    assert first.sent[1:] == [Release(s.seq)]
    s.speak(second, [(s.seq, 68, Finish.LENGTH)])
    assert "".join(d.text for d in s.got) == "ABCD" and not s.je.live and second.sequences == 0


@run
def test_a_decode_that_cant_move_stays():
    for answer in ("refused", "kept", "ended"):
        s = Movers()
        first, second = s.tes
        if answer == "refused":
            s.hear(1, Refused(s.seq, "no room"))
        else:
            s.hear(1, Reserved(s.seq, pack_ids([7]), 0))
        if answer == "kept":
            s.hear(0, HandedOver(s.seq, -1, "it has outgrown its blocks"))
            assert second.sent == [Abort(s.seq >> 7, 0)]
        s.speak(first, [(s.seq, 66, Finish.LENGTH)])
        if answer == "ended":
            s.hear(0, Closed(s.seq))
            assert second.sent == [Abort(s.seq >> 7, 0)]
        assert "".join(d.text for d in s.got) == "AB" and not (s.je.live or s.je.passages.table or s.je.moves)


@run
def test_a_target_that_dies_while_a_decode_moves_there():
    s = Movers()
    first, second = s.tes
    s.hear(1, Reserved(s.seq, pack_ids([7]), 0))
    first.sent.clear()
    second.state = "dead"
    s.je.lost(second, "killed")  # type: ignore[arg-type]
    forget, *_, again = first.sent
    assert isinstance(forget, Abort) and isinstance(again, Start) and again.task != s.seq >> 7


@pytest.mark.parametrize("end", ["handed over", "cancel"])
def test_two_tes_never_wait_for_each_others_room(end):
    def body() -> None:
        s = Pair()
        first, _ = s.submit(max_tokens=9)
        seq = s.reserve()
        s.tes[0].role, s.tes[1].role = "decode", "prefill"
        s.submit("second", max_tokens=9)
        assert not s.mail(0) and not s.mail(1) and len(s.je.held) == 1, "each would be full of what the other is to compute"
        if end == "cancel":
            s.je.leave(first)
            assert s.mail(0)[0] == Abort(seq >> 7, 0)
        else:
            s.speak(s.tes[0], [(seq, 67, 0)], first=(seq,))
            assert s.je.held
            s.hear(0, HandedOver(seq, 2))
            (start,) = s.mail(0)
            assert start.expect
        assert not s.je.held

    run(body)()


@run
def test_a_text_of_no_token_needs_no_prefill_te():
    s = Pair()
    live, _ = s.submit(max_tokens=0)
    (start,) = s.mail(1)
    s.speak(s.tes[1], [(sequence_id(start.task, 0), -1, Finish.LENGTH)])
    assert s.over() and not s.mail(0) and live.record.life.state == "done"
    assert {task.kind: task.life.state for task in live.record.tasks()} == {"decode": "done", "prefill": "cancelled"}


@run
def test_what_the_prefill_te_refuses_is_given_back():
    s = Pair()
    live, _ = s.submit(max_tokens=3)
    seq = s.reserve()
    s.hear(0, Refused(seq, "no room"))
    assert Abort(seq >> 7, 0) in s.mail(1) and live.record.life.state == "failed" and s.over()
    live, _ = s.submit("again", max_tokens=3)
    seq = s.reserve()
    s.je.leave(live)
    assert s.mail(0) == [Abort(seq >> 7, 0)] and not s.mail(1)
    s.hear(0, Refused(seq, "no room"))  # said before it heard
    assert s.mail(1) == [Abort(seq >> 7, 0)] and s.over()


@pytest.mark.parametrize("finish", [0, Finish.LENGTH])
def test_blocks_of_a_sample_that_is_over_are_kept_while_they_may_be_written(finish):
    def body() -> None:
        s = Pair()
        live, _ = s.submit(max_tokens=9, n=3, stop=["C"])
        (start,) = s.mail(1)
        seq = sequence_id(start.task, 0)
        s.hear(1, Reserved(seq, pack_ids([1]), 0))
        s.mail(0)
        s.speak(s.tes[0], [(seq, 67, finish)], first=(seq,))
        s.je.leave(live)
        assert s.mail(1) == [Abort(start.task, 1), Abort(start.task, 2)]
        s.hear(0, Closed(seq))
        assert s.mail(1) == [Abort(start.task, 0)] and s.over()

    run(body)()


@run
def test_a_te_dies_before_its_decode_has_room_elsewhere():
    s = Movers()
    first, second = s.tes
    first.state = "dead"
    s.je.lost(first, "killed")  # type: ignore[arg-type]
    forget, *_, again = second.sent
    assert forget == Abort(s.seq >> 7, 0) and isinstance(again, Start) and again.task != s.seq >> 7
    second.sent.clear()
    s.hear(1, Reserved(s.seq, pack_ids([7]), 0))  # said before it heard
    assert not second.sent and not s.je.passages.table


@run
def test_a_decode_that_has_just_come_moves_on_while_the_te_that_it_came_from_is_gone():
    s = Movers()
    first, second = s.tes
    s.hear(1, Reserved(s.seq, pack_ids([7]), 0))
    s.hear(0, HandedOver(s.seq, 4))
    third = PlayedTE(2)
    s.tes.append(third)
    s.up(third)
    first.state = "dead"
    s.je.lost(first, "killed")  # type: ignore[arg-type]
    second.role = "prefill"
    assert s.je.move_away(second) == (1, 0)  # type: ignore[arg-type]
    s.hear(2, Reserved(s.seq, pack_ids([8]), 0))
    assert isinstance(second.sent[-1], Move)
    s.hear(1, Adopted(s.seq))  # of the first move, which it hasn't told before
    assert isinstance(second.sent[-1], Move), "it must keep what it is to hand over"
    s.hear(1, HandedOver(s.seq, 4))
    s.hear(2, Adopted(s.seq))
    assert isinstance(third.sent[-1], Adopt) and second.sent[-1] == Release(s.seq)
    s.speak(third, [(s.seq, 70, Finish.LENGTH)])
    assert not s.je.live and not s.je.passages.table and second.sequences == third.sequences == 0
