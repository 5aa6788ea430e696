"""`bench.fairness`: its verdict, and one short run of the whole."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from bench import fairness
from bench.fairness import Figures, figures, verdict


def test_both_bounds_are_judged() -> None:
    found = {"alone": Figures(0.1, 0.2, 9), "equal": Figures(0.1, 0.3, 9), "flood": Figures(0.1, 0.35, 9)}
    assert verdict(found, 0.1) == {
        "p99_flood_s": 0.35,
        "at_most_by_steps_s": pytest.approx(0.4),
        "at_most_by_equal_s": pytest.approx(0.39),
        "within_steps": True,
        "within_equal": True,
    }
    assert not verdict(found, 0.05)["within_steps"]
    assert not verdict(found | {"equal": Figures(0.1, 0.25, 9)}, 0.1)["within_equal"]
    assert figures([0.1] * 99 + [9.0]) == Figures(0.1, 0.1, 100) and figures([0.1] * 98 + [9.0] * 2).p99 == 9.0


def test_a_short_run_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def soon(other: fairness.Asker) -> float:
        return 40.0

    monkeypatch.setattr(fairness, "capacity", soon)
    monkeypatch.setattr(fairness, "SEATS", 4)
    monkeypatch.setattr(fairness, "SETTLE", 0.1)
    monkeypatch.setattr(fairness, "flooded", lambda url, seed: contextlib.nullcontext())  # a process that imports takes its time
    out = tmp_path / "fairness.json"
    fairness.main(["--models", "tiny", "--requests", "4", "--rounds", "1", "--load", "0.5", "--out", str(out)])
    report = json.loads(out.read_text())
    [row] = report["rows"]
    assert row["model"] == "tiny" and row["victim_requests_s"] == 20.0 and report["seats"] == 4
    assert set(row["ttft_s"]) == set(fairness.PHASES)
    assert all(one["n"] == 4 and 0 < one["p50"] <= one["p99"] for one in row["ttft_s"].values())
    assert row["p99_flood_s"] == row["ttft_s"]["flood"]["p99"] and "TTFT P50/P99" in capsys.readouterr().out
