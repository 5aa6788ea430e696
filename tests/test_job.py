from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sched.job import TABLES, TERMINAL, IllegalMove, Job, Request, Task, born, describe


def events(table: str) -> list[str]:
    return sorted({event for _, event in TABLES[table]})


@pytest.mark.parametrize("table", TABLES)
def test_every_state_is_reached_and_can_end(table):
    moves = TABLES[table]
    first = born(table, 0.0).state
    reached, frontier = {first}, [first]
    while frontier:
        state = frontier.pop()
        for (source, _), target in moves.items():
            if source == state and target not in reached:
                reached.add(target)
                frontier.append(target)
    assert reached >= set(moves.values()) | {s for s, _ in moves}
    for state in reached - TERMINAL:
        assert any(source == state for source, _ in moves), f"{table}: {state} is a dead end"
    assert not any(source in TERMINAL for source, _ in moves), "a terminal state can't be left"


@given(st.data())
def test_random_events_either_follow_the_table_or_raise(data):
    """The job table under random steps: times grow, a terminal state is entered once, an illegal move changes nothing."""
    table = data.draw(st.sampled_from(sorted(TABLES)))
    life = born(table, 0.0)
    for step in range(1, 20):
        event = data.draw(st.sampled_from(events(table)))
        before = (life.state, list(life.times))
        if (life.state, event) in TABLES[table]:
            life.move(event, float(step))
            assert life.times[:-1] == before[1] and life.times[-1] == (life.state, float(step))
        else:
            with pytest.raises(IllegalMove):
                life.move(event, float(step))
            assert (life.state, life.times) == before
    assert sum(state in TERMINAL for state, _ in life.times) <= 1


def test_ending_a_request_ends_what_is_left_of_it():
    request = Request(id="r", trace_id="t", model="m", kind="chat", life=born("request", 0.0))
    done, running = Task(id=1, kind="unified", life=born("task", 0.0)), Task(id=2, kind="unified", life=born("task", 0.0))
    request.jobs = [
        Job(id="a", kind="serving", life=born("job", 0.0), tasks=[done]),
        Job(id="b", kind="serving", life=born("job", 0.0), tasks=[running]),
    ]
    request.life.move("admit", 1.0)
    for task in (done, running):
        task.life.move("dispatch", 1.0)
    for job in request.jobs:
        job.life.move("run", 1.0)
    request.life.move("run", 1.0)
    done.life.move("finish", 2.0)
    request.jobs[0].life.move("finish", 2.0)
    request.end("cancel", 3.0)
    assert [j.life.state for j in request.jobs] == ["done", "cancelled"]
    assert [t.life.state for t in request.tasks()] == ["done", "cancelled"]
    shown = describe(request)
    assert shown["state"] == "cancelled" and shown["jobs"][1]["tasks"][0]["times"][-1] == {"state": "cancelled", "at": 3.0}
    with pytest.raises(IllegalMove):
        request.end("finish", 4.0)
