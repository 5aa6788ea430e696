"""Part `simulation` of `bench.scale`: what `bench.scale_simulation` says of 64 to 1000 TEs on clusters of NPUs."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from bench import scale_simulation
from bench.cpu_report import markdown
from bench.scale_server import Options

RESULTS = Path(scale_simulation.__file__).parent / "results" / "scale_simulation.json"
KEPT = ("links", "figure_10", "figure_11", "growth", "burst")
TES = (64, 1000)  # of the growth that is shown


def measure(options: Options) -> dict[str, Any]:
    with contextlib.redirect_stdout(sys.stderr):
        scale_simulation.main([])
    result = json.loads(RESULTS.read_bytes())
    return {"source": RESULTS.name} | {key: result[key] for key in KEPT}


def table(found: dict[str, Any]) -> list[str]:
    rows = [["simulated: seconds from 1 TE, by path", "TEs", "disk", "DRAM", "fork, one by one", "fork, broadcast", "fork, tree"]]
    for row in found["growth"]:
        if row["te"] in TES:
            values = [f"{row[key]:g}" for key in ("disk", "dram", "one by one", "broadcast", "tree")]
            rows.append([f"{row['cluster']}, {row['model']}", str(row["te"]), *values])
    lines = [*markdown(rows), ""]
    rows = [["simulated: a TE's weights, seconds", "by", "here", "the paper's figure 10", "difference"]]
    for row in found["figure_10"]:
        rows.append([row["model"], row["path"], f"{row['seconds']:g}", f"{row['paper']:g}", f"{row['error_percent']:+g} %"])
    lines += [*markdown(rows), ""]
    rows = [["simulated: load times ten for 60 s, TEs start by", "promise kept again after, s", "P95 TTFT of the burst, s"]]
    for row in found["burst"]["rows"]:
        again, p95 = row["restored_s"], row["p95_ttft_in_burst_s"]
        rows.append(
            [row["start by"], "not within the burst" if again is None else f"{again:g}", "–" if p95 is None else f"{p95:g}"]
        )
    return lines + markdown(rows)
