"""`bench.scheduling`: one small run of the whole."""

from __future__ import annotations

import json
import sys

from bench import scheduling


def test_a_small_run_writes_a_row_for_each_fleet_and_order(monkeypatch, tmp_path, capsys):
    out = tmp_path / "scheduling.json"
    monkeypatch.setattr(scheduling, "SIZES", ((12, 1000),))
    monkeypatch.setattr(scheduling, "DECISIONS", 30)
    monkeypatch.setattr(sys, "argv", ["scheduling", "--out", str(out)])
    scheduling.main()
    report = json.loads(out.read_text())
    assert {(row["fleet"], row["order"]) for row in report["results"]} == {
        (f, o) for f in scheduling.FLEETS for o in scheduling.ORDERS
    }
    assert all(row["tes"] == 12 and row["blocks"] > 0 and row["decision_p50_us"] > 0 for row in report["results"])
    assert any(row["cached_tokens"] > 0 for row in report["results"]), "prompts match"
    assert report["slowest_median_us"] == max(row["decision_p50_us"] for row in report["results"])
    assert "the slowest median is" in capsys.readouterr().out
