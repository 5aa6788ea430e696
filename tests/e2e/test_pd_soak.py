"""Twenty of the runs of `bench/pd_soak.py`: random streams, cancels, SIGKILLs and changes of role, four runs in each mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.pd_soak import Kind, make_plan, prepare, soak

MODES = ("te-2", "1p1d", "2p1d", "1p1d+1c", "semi-slo")
RUNS = 4  # in each


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, list[Kind], list[str]]:
    return prepare(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize("mode", MODES)
def test_random_faults(mode, undisturbed):
    first = 1000 + RUNS * MODES.index(mode)
    outcomes, _ = soak(*undisturbed, mode, range(first, first + RUNS))
    assert [outcome.wrong for outcome in outcomes] == [[]] * RUNS
    assert sum(outcome.completed for outcome in outcomes) > 0


def test_the_runs_have_faults_of_every_sort():
    plans = [make_plan(seed) for seed in range(1000, 1000 + RUNS * len(MODES))]
    for i in range(len(MODES)):
        some = plans[RUNS * i : RUNS * (i + 1)]
        assert any(plan.kills for plan in some) and any(a.left is not None for plan in some for a in plan.asked)
    assert any(plan.changes for plan in plans) and make_plan(1000) == plans[0]
