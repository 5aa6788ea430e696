"""The scheduler's columns: after any row of changes they are what a table of records says, and so are the candidates."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from sched.view import ALONE, COLUMNS, LOST, ROLES, View

FACTS = ("sequences", "queued_tokens", "running", "kv_used", "kv_total", "seats", "slow", "last")


def scanned(records: dict[int, dict], way: str) -> set[int]:
    """The TEs that can take a task in this way: a look at every record."""

    def fits(te: int) -> bool:
        it = records[te]
        if not it["takes"]:
            return False
        if way == "semi":
            return it["role"] == "semi" and it["lender"] in records and records[it["lender"]]["takes"]
        alone = it["lender"] < 0
        return alone and (it["role"] != "decode" if way == "prompt" else it["role"] == way)

    return {te for te in records if fits(te)}


def check(view: View, records: dict[int, dict]) -> None:
    assert len(view) == len(records) and set(view.slots) == set(records)
    for te, it in records.items():
        slot = view.slots[te]
        assert view.te[slot] == te and ROLES[view.role[slot]] == it["role"] and view.takes[slot] == it["takes"]
        assert view.mixes[slot] == (it["role"] in ("colocated", "semi"))
        assert view.lender[slot] == (ALONE if it["lender"] < 0 else view.slots.get(it["lender"], LOST))
        for name in FACTS:
            assert getattr(view, name)[slot] == it.get(name, COLUMNS[name][1])
    free = np.setdiff1d(np.arange(len(view.te)), list(view.slots.values()))
    assert (view.te[free] == -1).all() and not view.takes[free].any()
    for way in (*ROLES, "prompt"):
        slots = view.candidates(way)
        assert (np.diff(slots) > 0).all()
        assert {int(te) for te in view.te[slots]} == scanned(records, way), way


@pytest.mark.parametrize("seed", range(4))
def test_candidates_and_columns_equal_a_full_scan_after_any_change(seed):
    rng, view, records = Random(seed), View(), {}
    for _ in range(600):
        move = rng.random()
        if not records or (move < 0.15 and len(records) < 40):
            te = rng.choice([n for n in range(50) if n not in records])
            role = rng.choice(ROLES)
            lender = rng.choice([-1, *records, 49]) if role == "semi" else -1  # 49 may come later, or never
            lender = lender if lender != te else -1
            fields = {"takes": rng.random() < 0.7, **{name: float(rng.randrange(99)) for name in FACTS if rng.random() < 0.5}}
            view.add(te, role, lender, **fields)
            records[te] = {"role": role, "lender": lender, **fields}
        elif move < 0.25:
            te = rng.choice(list(records))
            view.remove(te)
            del records[te]
        else:
            te = rng.choice(list(records))
            fields = {name: float(rng.randrange(99)) for name in FACTS if rng.random() < 0.3}
            if rng.random() < 0.2:
                fields["takes"] = rng.random() < 0.5
            if rng.random() < 0.1 and records[te]["lender"] < 0:
                fields["role"] = rng.choice(ROLES)
            view.update(te, **fields)
            records[te].update(fields)
        check(view, records)


def test_slots_are_used_again_the_lowest_first():
    view = View()
    assert [view.add(te) for te in (5, 6, 7)] == [0, 1, 2]
    view.remove(6)
    view.remove(5)
    assert view.add(8) == 0 and view.add(9) == 1 and view.add(10) == 3
    assert view.sequences[0] == 0 and np.isinf(view.kv_total[0]), "nothing is left of the one before"


def test_a_worker_waits_for_its_lender_and_outlives_it():
    view = View()
    view.add(1, "semi", lender=0)
    assert view.lender[view.slots[1]] == LOST and not len(view.candidates("semi"))
    view.add(0, "semi")
    assert view.te[view.candidates("semi")].tolist() == [1] and view.te[view.candidates("prompt")].tolist() == [0]
    view.update(0, takes=False)
    assert not len(view.candidates("semi")), "no pair with half of it away"
    view.update(0, takes=True)
    view.remove(0)
    view.add(3, "colocated")  # in the slot of the one that is gone
    assert view.lender[view.slots[1]] == LOST and not len(view.candidates("semi"))
    view.add(0, "semi")
    assert view.te[view.candidates("semi")].tolist() == [1]


def test_slots_of_numbers_that_nobody_has():
    view = View()
    view.add(3)
    view.add(200)
    assert view.slots_of(np.array([200, 3, 4])).tolist() == [1, 0, -1]
    assert view.slots_of(np.array([3, 100_000, 8])).tolist() == [0, -1, -1]
    assert view.slots_of(np.array([], dtype=np.int64)).tolist() == []


def test_unknown_columns_and_second_lives_are_bugs():
    view = View()
    view.add(0)
    with pytest.raises(AssertionError, match="no such columns: \\['queue'\\]"):
        view.update(0, queue=3)
    with pytest.raises(AssertionError, match="is there already"):
        view.add(0)
