"""`bench.control`: its arithmetic, the paced device, and one short run of the whole."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from bench import control
from tests import tiny


def test_a_stopwatch_parts_the_time_where_stages_begin():
    now = [0.0]
    watch = control.Stopwatch(lambda: now[0])

    def call(stage: str, seconds: float, inner=lambda: None, leaves: bool = False) -> None:
        def work() -> None:
            now[0] += seconds
            inner()

        watch.watched(work, stage, leaves)()

    now[0] += 5.0
    call("queue", 1.0, lambda: (call("encoding", 2.0), call("encoding", 3.0), call("writing", 4.0)), leaves=True)
    now[0] += 7.0
    watch.enter("queue")
    assert watch.spent == {control.LOOP: 12.0, "queue": 1.0, "encoding": 5.0, "writing": 4.0}


def test_costs_are_of_the_window_alone():
    before = control.Reading(cpu=1.0, tokens=1000, outstanding=64, stages={"writing": 0.5, "queue": 0.25})
    after = control.Reading(cpu=1.5, tokens=26_000, outstanding=64, stages={"writing": 0.75, "queue": 0.25})
    assert control.cost(before, after) == pytest.approx(20.0)
    parts = control.stage_costs(before, after)
    assert parts["writing"] == 10.0 and sum(parts.values()) == 10.0 and list(parts)[-1] == control.LOOP


def test_the_paced_device_reads_out_its_script():
    device = control.PacedDevice(np.arange(50, 60, dtype=np.int32), 0.001)

    class Rows:
        position, slot = np.array([3, 4, 12]), np.array([0, 0, 0])

    class Inputs:
        sampling = Rows

    began = time.monotonic()
    steps = [device.launch(None, Inputs) for _ in range(2)]  # type: ignore[arg-type]
    assert [s.result().ids.tolist() for s in steps] == [[53, 54, 52]] * 2
    assert steps[1].due - steps[0].due == pytest.approx(0.001) and steps[0].due >= began + 0.001


def test_the_whole_of_it(tmp_path, capsys):
    out = tmp_path / "control.json"
    few = ["--streams", "2", "--rounds", "1", "--seconds", "0.3", "--step-ms", "5"]
    assert control.main([*few, "--model", str(tiny.make(tmp_path / "tiny")), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [(r["kind"], r["streams"]) for r in report["rows"]] == [(kind, 2) for kind in control.KINDS]
    assert all(r["us"] > 0 for r in report["rows"]) and report["stages_us"].keys() == set(control.KINDS)
    assert report["stages_us"]["chat"]["writing"] > report["stages_us"]["chat, not streamed"]["writing"]
    assert "us a token" in capsys.readouterr().out
