"""The comparison of the simulator with the real server: what needs no server."""

from __future__ import annotations

import pytest

from bench.sim_validation import BLOCK, LAYOUTS, SCENARIOS, Fitted, arrivals, ids_of, rate_for, simulated
from engine.rtc.keys import block_keys, root_key
from engine.types import pack_ids
from sched.costs import Costs
from sched.traces import keys_of

# About those of the default model on two cores.
FIT = Fitted(Costs(p1=9e-4, p3=6e-7, d0=4e-3, d1=5e-4, d2=3.6e-6, chunk=256), 0.005, 0.05)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_each_scenario_computes_for_the_stated_part_of_the_time(scenario):
    rate = rate_for(scenario, FIT, 30.0, 1)
    asked = list(arrivals(scenario, rate, 300.0, 1))
    told, busy = simulated(LAYOUTS[scenario.layout], FIT, asked)
    assert busy == pytest.approx(scenario.busy, abs=0.03) and scenario.busy <= 0.8
    assert told.requests == len(asked)
    assert (told.cached > 0.4) == (scenario.kept > 0)
    assert told.split == (scenario.layout == "1p1d")


def test_prompts_have_in_common_what_the_simulator_thinks():
    """Equal keys in the simulator, equal hashes in the engine, and no others."""
    sessions = next(s for s in SCENARIOS if s.kept)
    asked = list(arrivals(sessions, 4.0, 10.0, 2))
    ours = [keys_of(a.spans, a.prompt, BLOCK) for a in asked]
    theirs = [list(block_keys(root_key(b""), memoryview(pack_ids(ids_of(a.spans, a.prompt, 7))), BLOCK)) for a in asked]
    names: dict[bytes, bytes] = {}
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) == len(other)
        for key, hashed in zip(one, other, strict=True):
            assert names.setdefault(key, hashed) == hashed
    assert len(set(names.values())) == len(names) < sum(map(len, ours))
    assert ids_of(asked[0].spans, 50, 7) != ids_of(asked[0].spans, 50, 8)
