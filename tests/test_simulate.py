"""Simulated clusters: the server's decisions about simulated TEs, and the command that sets policies beside each other."""

from __future__ import annotations

import itertools
import json
from functools import cache

import numpy as np
import pytest

from bench import simulate as command
from bench import simulation
from engine.types import UserError
from scale.autoscale import Bounds
from sched import traces
from sched.heatmap import HeatMap
from sched.simulate import (
    POLICIES,
    Cluster,
    Done,
    Scaling,
    Simulation,
    Slo,
    figures,
    heat_map,
    predicted,
    roles_of,
)
from sched.simulate_te import Spec
from sched.stated_costs import STATED, stated
from sched.tenants import Tenant
from sched.traces import Arrival

COSTS, SPEC = stated("34b-910b")
EVERY = pytest.mark.parametrize("policy", POLICIES)


def cluster(mix: str = "2c+1p1d", tes: int | None = None, **more) -> Cluster:
    return Cluster(roles=roles_of(mix, tes), costs=COSTS, **{"spec": SPEC, "slo": Slo(2.0, 0.05), **more})


def some(trace: str, rate: float, count: int, seed: int = 1) -> list[Arrival]:
    return list(itertools.islice(traces.MADE_UP[trace](rate, seed), count))


def silent(text: str) -> None: ...


# ---- clusters -------------------------------------------------------------------------------------------------------


def test_roles():
    assert roles_of("1c", None) == [("colocated", -1)]
    assert [role for role, _ in roles_of("2c+1p1d", 8)] == ["colocated", "colocated", "prefill", "decode"] * 2
    assert roles_of("1c+1s", 6)[3:] == [("colocated", -1), ("semi", -1), ("semi", 4)]
    assert [role for role, _ in roles_of("3p2d", None)] == ["prefill"] * 3 + ["decode"] * 2


@pytest.mark.parametrize(
    ("mix", "tes", "said"),
    [
        ("", None, "2c\\+1p1d"),
        ("2x", None, "2c\\+1p1d"),
        ("2c+1p", None, "1p1d"),
        ("0c", None, "use 1c"),
        ("2c+1p1d", 6, "use 8"),
        ("2c+1p1d", 1, "use 4"),
    ],
)
def test_roles_that_can_not_be(mix, tes, said):
    with pytest.raises(UserError, match=said):
        roles_of(mix, tes)


def test_stated_figures():
    for name in STATED:
        costs, spec = stated(name)
        assert 0.1 < costs.prefill(2048.0) < 0.5, "seconds of a 2K prompt"
        assert 0.02 < costs.step(0, 0, 32, 32 * 2048) < 0.05, "seconds of a step of 32 sequences"
        assert 300 < spec.kv_tokens / 2248 < 500, "requests of 2K + 200 tokens that fit"


# ---- runs -----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("trace", ["code", "gamma"])
def test_everything_ends_and_nothing_is_left(policy, trace):
    asked = some(trace, 8, 300)
    simulation = Simulation(cluster("2c+1p1d+1s"), policy, HeatMap(), 0)
    done = simulation.run(asked)
    assert sorted(done.at) == [a.at for a in asked]
    assert sorted(zip(done.prompt, done.output, strict=True)) == sorted((a.prompt, a.output) for a in asked)
    assert all(0 < ttft <= jct for ttft, jct in zip(done.ttft, done.jct, strict=True))
    view = simulation.view
    for column in (view.sequences, view.queued_tokens, view.running, view.kv_used):
        assert np.abs(column).max() < 1e-6
    for te in simulation.tes.values():
        assert not te.seated and not te.refs and te.used == pytest.approx(0, abs=1e-3)
    assert 0 < done.busy <= 1


@EVERY
def test_the_same_seed_gives_the_same_run(policy):
    runs = [Simulation(cluster(), policy, HeatMap(), 3).run(some("multiturn", 6, 200)) for _ in range(2)]
    assert runs[0].jct == runs[1].jct and runs[0].ttft == runs[1].ttft


def test_a_lone_request_takes_what_the_costs_say():
    done = Simulation(cluster("1c"), "cost", HeatMap()).run([Arrival(5.0, 2000, 3)])
    steps = [COSTS.step(0, 0, 1, kv) for kv in (2000, 2001)]
    assert done.ttft == pytest.approx([COSTS.prefill(2000.0)])
    assert done.jct == pytest.approx([COSTS.prefill(2000.0) + sum(steps)])
    assert done.tpot == pytest.approx([np.mean(steps)])


def test_a_lone_request_on_a_pair_waits_for_its_kv():
    done = Simulation(cluster("1p1d"), "cost", HeatMap()).run([Arrival(5.0, 2000, 2)])
    assert done.split == [True]
    assert done.jct == pytest.approx([COSTS.prefill(2000.0) + COSTS.transfer(2000.0) + COSTS.step(0, 0, 1, 2000)])


def test_an_answer_of_one_token_needs_no_other_te():
    for mix in ("1p1d", "1s"):
        simulation = Simulation(cluster(mix), "cost", HeatMap())
        done = simulation.run([Arrival(0.0, 500, 1)])
        assert done.jct == done.ttft == pytest.approx([COSTS.prefill(500.0)])
        assert not any(te.seated for te in simulation.tes.values())


def test_what_fits_nowhere_is_refused():
    done = Simulation(cluster("1c", spec=Spec(kv_tokens=1000)), "cost", HeatMap()).run([Arrival(0.0, 900, 200)])
    assert done.refused == {("", "length"): 1} and not done.at


def test_the_tree_knows_what_the_tes_have():
    simulation = Simulation(cluster("1c", 3, spec=Spec(kv_tokens=12_000)), "cost", HeatMap())
    simulation.run(some("multiturn", 4, 150))
    known = {te: set(simulation.tree.match([key]).tes.tolist()) for te in simulation.tes for key in simulation.tes[te].idle}
    assert known
    for te in simulation.tes.values():
        for key in te.idle:
            assert te.number in simulation.tree.match([key]).tes


def test_round_robin_gives_each_its_turn():
    done = Simulation(cluster("2c+1p1d"), "round_robin", HeatMap()).run(some("completion", 2, 300))
    assert np.mean(done.split) == pytest.approx(1 / 3, abs=0.01)


def test_conversations_go_where_their_prefix_is():
    """What the policies are for: the order of what is found cached."""
    found = {p: np.sum(Simulation(cluster("1c", 8), p, HeatMap(), 0).run(some("multiturn", 16, 900)).cached) for p in POLICIES}
    assert found["random"] < found["paper"] and found["round_robin"] < found["cost"] <= 1.05 * found["prefix_only"]


def test_predicted_lengths_are_as_often_right_as_the_papers():
    from random import Random

    rng = Random(1)
    hits = 0
    for output in rng.choices(range(1, 1500), k=3000):
        told = predicted(output, rng)
        assert 1 <= told.low <= told.mean <= told.high
        hits += told.low <= output <= told.high
    assert hits / 3000 == pytest.approx(0.849, abs=0.03)


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_a_flood_does_not_drown_another_key():
    """The server's own line: alice's first tokens come nearly as soon as without bob's flood."""
    flood = [Arrival(0.5 + n / 200, 2000, 60, key="bob") for n in range(300)]
    calls = [Arrival(n / 2, 500, 20, key="alice") for n in range(60)]
    asked = sorted([*flood, *calls], key=lambda a: a.at)
    alone = Simulation(cluster("1c"), "cost", HeatMap()).run(calls)
    beside = Simulation(cluster("1c"), "cost", HeatMap()).run(asked)
    strangers = [Arrival(a.at, a.prompt, a.output) for a in asked]
    together = Simulation(cluster("1c"), "cost", HeatMap()).run(strangers)
    slowest = float(np.max(alone.ttft))
    hers = [t for t, key in zip(beside.ttft, beside.key, strict=True) if key == "alice"]
    two_budgets = 2 * COSTS.step(COSTS.chunk, 0, SPEC.seats, 0)
    assert len(hers) == 60 and max(hers) < slowest + two_budgets + 1.0
    assert max(t for t, p in zip(together.ttft, together.prompt, strict=True) if p == 500) > 5 * max(hers)


def test_limits_refuse():
    tenants = {"bob": Tenant(name="bob", rpm=60)}
    asked = [Arrival(n / 10, 100, 5, key=key) for n in range(600) for key in ("bob", "alice")]
    done = Simulation(cluster("1c", tenants=tenants), "cost", HeatMap()).run(asked)
    assert done.refused == {("bob", "rpm"): 600 - done.key.count("bob")}
    assert 60 + 59 <= done.key.count("bob") <= 60 + 61 and done.key.count("alice") == 600


def test_a_full_queue_refuses():
    asked = [Arrival(0.0, 1000, 100) for _ in range(300)]
    done = Simulation(cluster("1c", max_queued=10), "cost", HeatMap()).run(asked)
    assert len(done.at) == SPEC.seats + 10 and done.refused == {("", "queue"): 300 - SPEC.seats - 10}


# ---- scaling --------------------------------------------------------------------------------------------------------


def test_tes_come_when_the_load_does_and_go_when_it_is_over():
    quiet = some("completion", 1, 60)
    later = quiet[-1].at
    burst = [Arrival(later + a.at, a.prompt, a.output) for a in some("completion", 16, 900)]
    after = [Arrival(burst[-1].at + a.at, a.prompt, a.output) for a in some("completion", 1, 200, 2)]
    scaling = Scaling(Bounds(1, 6, None), 1.0)
    simulation = Simulation(cluster("1c", scaling=scaling), "cost", HeatMap(), 0)
    done = simulation.run([*quiet, *burst, *after])
    assert len(done.at) == 60 + 900 + 200
    there = [ready for _, _, ready in done.targets]
    assert there[0] == 1 and max(there) >= 4 and there[-1] < max(there)
    fixed = Simulation(cluster("1c"), "cost", HeatMap(), 0).run([*quiet, *burst, *after])
    assert np.mean(done.jct) < 0.5 * np.mean(fixed.jct)
    assert simulation.te_seconds < 6 * done.seconds
    assert len(simulation.view) == len(simulation.tes)


# ---- the heat map ---------------------------------------------------------------------------------------------------


@cache
def the_map() -> HeatMap:
    return heat_map(COSTS, SPEC)


def test_long_prompts_with_short_answers_want_a_pair():
    """The paper's finding: the longer the prompt, the farther the pair's advantage reaches; long answers want colocated TEs."""
    heat = the_map()
    values = np.array([heat.value(cell.prefill, cell.decode).value for cell in heat.cells()[:: heat.loads]])
    values = values.reshape(heat.rows, heat.columns)
    assert values[-1, 0] > 0.05 and values[:, -1].max() < 0
    assert list(values[:, 0]) == sorted(values[:, 0])
    assert (heat.same_sign("disaggregated") or 0) > 0.8, "stable over the loads"


# ---- figures and the command ------------------------------------------------------------------------------------------


def test_figures():
    done = Done()
    done.at, done.ttft, done.tpot, done.jct = [0.0, 1.0, 2.0, 3.0], [0.1, 0.1, 3.0, 0.1], [0.0, 0.02, 0.02, 0.2], [1.0] * 4
    done.prompt, done.output, done.cached, done.split = [10] * 4, [1, 5, 5, 5], [0, 5, 0, 0], [False, True, True, False]
    seen = figures(done, 0.0, 4.0, Slo(1.0, 0.1))
    assert (seen.requests, seen.rate, seen.good, seen.split) == (4, 1.0, 0.5, 0.5)
    assert seen.ttft_mean == pytest.approx(825.0) and seen.tpot_mean == pytest.approx(80.0)
    assert seen.cached == pytest.approx(5 / 40)
    with pytest.raises(UserError, match="--requests"):
        figures(done, 10.0, 11.0, None)


def test_intervals():
    assert command.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5, rel=1e-3))
    assert command.interval([1.0])[1] == float("inf")


def test_verdicts_are_beyond_the_interval():
    def of(good, jct):
        seen = figures_like(good, jct)
        return command.Found(seen, 0.5, 1.0, 0, {}, {}, 0.1, [])

    def figures_like(good, jct):
        return command.Figures(**dict.fromkeys(command.Figures.__struct_fields__, 0.0) | {"good": good, "jct_mean": jct})

    ours = [of(0.9 + n / 100, 100.0 + n) for n in range(4)]
    theirs = [of(0.8 + n / 100, 90.0 + n) for n in range(4)]
    assert simulation.versus(ours, theirs, "good")["verdict"] == "better"
    assert simulation.versus(ours, theirs, "jct_mean")["verdict"] == "worse"
    assert simulation.versus(ours, ours, "jct_mean")["verdict"] == "equal"


def test_the_command_writes_what_it_found(tmp_path, capsys):
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--roles", "1c", "--tes", "2", "--trace", "gamma", "--rate", "1", "4", "--requests", "60", "--seeds", "2"]
    assert command.main([*flags, "--policy", "cost", "random", "--out", str(out), "--png", str(png)], silent) == 0
    report = json.loads(out.read_bytes())
    assert [(row["policy"], row["rate"]) for row in report["rows"]] == [("cost", 1), ("random", 1), ("cost", 4), ("random", 4)]
    assert all(row["ttft_mean"] > 0 and row["ttft_mean_ci"] > 0 for row in report["rows"])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_command_scales_tes(tmp_path):
    out = tmp_path / "out.json"
    flags = ["--roles", "1c", "--max-te", "3", "--trace", "completion", "--rate", "8", "--requests", "200", "--seeds", "1"]
    assert command.main([*flags, "--policy", "cost", "--out", str(out)], silent) == 0
    assert max(target for _, target, _ in json.loads(out.read_bytes())["targets"]["cost 0"]) == 3


def test_a_recorded_trace(tmp_path, capsys):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"at": n / 4, "prompt": 300 + n, "output": 20}) + "\n" for n in range(60)))
    assert command.main(["--trace", str(file), "--roles", "1c", "--policy", "cost", "--seeds", "1"], silent) == 0
    assert "cost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trace", "nothing"], "--trace nothing: neither a file nor one of"),
        (["--costs", "nothing"], "--costs nothing: No such file"),
        (["--rate", "0"], "--rate 0: it must be more than 0"),
        (["--seeds", "0"], "--seeds 0"),
        (["--max-te", "9"], "use --roles 1c"),
        (["--tes", "5"], "use 4"),
    ],
)
def test_mistakes_are_told(flags, said):
    with pytest.raises(UserError) as error:
        command.main(flags, silent)
    assert said in str(error.value)


def test_costs_of_no_profile(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="it is no profile"):
        command.main(["--costs", str(file)], silent)
