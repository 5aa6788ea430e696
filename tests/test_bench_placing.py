"""`bench.placing`: its traces and figures, and one short run of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import placing
from bench.placing import Done, choices, conversations, figures, summary, tokens_of, versus
from sched.policy import Choice


def done(ttft: float = 0.1, jct: float = 0.5, cached: int = 50, choice: Choice | None = None) -> Done:
    return Done(100, cached, ttft, jct, choice or Choice(0, 0, "in turn"))


def test_a_trace_is_the_same_for_its_seed_only() -> None:
    trace = conversations(40, 8.0, 0.5, (0, 1))
    assert trace == conversations(40, 8.0, 0.5, (0, 1)) and trace != conversations(40, 8.0, 0.5, (0, 2))
    begins = [one.at for one in trace]
    assert begins == sorted(begins) and begins[0] == 0.0
    assert 40 * placing.TURNS / begins[-1] == pytest.approx(8.0, rel=0.15)
    assert {one.system for one in trace} == set(range(placing.SYSTEMS))
    turns = [turn for one in trace for turn in one.turns]
    assert len(turns) == 40 * placing.TURNS and all(one.turns[0].pause == 0.0 for one in trace)
    assert all(placing.SHORTEST <= turn.new <= placing.LONGEST for turn in turns)
    pauses = [turn.pause for one in trace for turn in one.turns[1:]]
    assert sum(pauses) / len(pauses) == pytest.approx(0.5, rel=0.3)


def test_no_two_runs_have_a_prompt_in_common() -> None:
    trace = conversations(5, 8.0, 0.5, (0,))
    one, other = tokens_of(trace, 259, (0, 0)), tokens_of(trace, 259, (0, 1))
    assert [[len(new) for new in turns] for turns in one.new] == [[turn.new for turn in c.turns] for c in trace]
    assert {len(ids) for ids in one.systems} == {placing.SYSTEM}
    beginnings = {tuple(ids[:16]) for said in (one, other) for ids in said.systems}
    assert len(beginnings) == 2 * placing.SYSTEMS
    assert one == tokens_of(trace, 259, (0, 0))


def test_figures_are_of_all_turns() -> None:
    found = figures([done(ttft=0.1)] * 98 + [done(ttft=0.9, jct=2.0, cached=100)] * 2)
    assert found["turns"] == 100 and found["ttft_p50_ms"] == 100.0 and found["ttft_p99_ms"] == 900.0
    assert found["ttft_mean_ms"] == pytest.approx(116.0) and found["jct_p99_ms"] == 2000.0 and found["cached"] == 0.51


def test_choices_are_counted_by_kind_and_place() -> None:
    pair = Choice(2, 3, "least cost", "pair", predicted_ttft_ms=80.0, cached_tokens=40)
    assert choices([done(), done(), done(), done(choice=pair)]) == {
        "kinds": {"colocated": 0.75, "pair": 0.25},
        "places": {"TE 0": 3, "TE 2 > 3": 1},
        "expected": {"ttft_mean_ms": 80.0, "cached": 0.4},
    }
    assert "expected" not in choices([done()])


@pytest.mark.parametrize(
    "ours, verdict",
    [([80.0, 82.0, 78.0], "better"), ([120.0, 122.0, 118.0], "worse"), ([80.0, 130.0, 90.0], "equal")],
)
def test_a_difference_counts_beyond_its_interval(ours: list[float], verdict: str) -> None:
    found = versus(ours, [100.0, 101.0, 99.0])
    assert found["verdict"] == verdict and found["difference"] == pytest.approx(found["percent"])


def test_one_round_decides_nothing() -> None:
    assert versus([50.0], [100.0]) == {"difference": -50.0, "ci": None, "percent": -50.0, "verdict": "equal"}


def test_algorithm_1_is_compared_with_both_usual_policies() -> None:
    rounds: dict[Any, Any] = {
        policy: [[done(ttft=n * (1 + policy.startswith("c")) / 10)] for n in (1, 2, 3)] for policy in placing.POLICIES
    }
    found = summary(rounds)
    assert not any(key.startswith("against") for policy in placing.USUAL for key in found[policy])
    assert found["cost"]["against_round_robin"]["ttft_mean_ms"]["difference"] == pytest.approx(200.0)
    assert found["paper"]["against_least_loaded"]["ttft_mean_ms"] == {"difference": 0, "ci": 0, "percent": 0, "verdict": "equal"}
    assert [one["ttft_mean_ms"] for one in found["paper"]["rounds"]] == pytest.approx([100, 200, 300])


def test_a_short_run_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placing, "SYSTEM", 48)
    monkeypatch.setattr(placing, "ANSWER", 4)
    monkeypatch.setattr(placing, "TURNS", 2)
    monkeypatch.setattr(placing, "CROWD", 4)
    monkeypatch.setattr(placing, "CAPACITY_SECONDS", 0.1)
    out = tmp_path / "placing.json"
    args = ["--models", "tiny", "--loads", "0.8", "--rounds", "2", "--seconds", "0.1", "--out", str(out)]
    assert placing.main(args) == 0
    [model] = json.loads(out.read_text())["models"]
    assert model["model"] == "tiny" and model["profile"] is None and model["turns_s"] > 0
    [row] = model["rows"]
    assert list(row["policies"]) == list(placing.POLICIES)
    for found in row["policies"].values():
        assert found["turns"] == sum(found["places"].values()) >= 2 * placing.FEWEST * placing.TURNS
        assert 0 < found["ttft_p50_ms"] <= found["ttft_p99_ms"] and found["ttft_mean_ms"] < found["jct_mean_ms"]
        assert 0 < found["cached"] < 1 and len(found["rounds"]) == 2
    # Round robin takes each of the three units as often as any other.
    assert len(set(row["policies"]["round_robin"]["kinds"])) == 2
    assert "cost against round_robin: TTFT" in capsys.readouterr().out
