"""`bench.scale`: what it makes of times, memory maps and counters. No server."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from bench import scale, scale_burst, scale_growth, scale_models, scale_respawn, scale_zero
from bench.scale_figures import finite, lru_hits, percentile, restored, slope, spread, windows, zipf
from bench.scale_server import Mapped, Options, account, mappings, memfds, pss

MB = 1_000_000


# ---- figures --------------------------------------------------------------------------------------------------------


def test_percentiles_are_values_that_came():
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 95) == 95.0 and percentile(values, 50) == 50.0 and percentile(values, 100) == 100.0
    assert percentile([3.0], 95) == 3.0 and percentile([2.0, 1.0], 0) == 1.0
    assert percentile([1.0] * 18 + [math.inf] * 2, 95) == math.inf
    assert percentile([1.0] * 19 + [math.inf], 95) == 1.0


def requests(*stretches: tuple[float, float, float]) -> list[tuple[float, float]]:
    """Ten a second: (from, until, seconds to the first token)."""
    return [(begin + i / 10, ttft) for begin, end, ttft in stretches for i in range(round(10 * (end - begin)))]


def test_a_promise_is_kept_again_when_the_window_is_clean():
    samples = requests((0, 10, 0.1), (10, 14, 3.0), (14, 70, 0.1))
    # Of 50 requests in the window two may be late: the last late one but two is sent at 13.7, and leaves it 5 s later.
    assert restored(samples, 10, 70, 1.0) == pytest.approx(8.7, abs=0.15)
    assert restored(samples, 10, 70, 5.0) == 0.0


def test_a_promise_that_is_broken_again_was_not_restored():
    samples = requests((0, 10, 0.1), (10, 14, 3.0), (14, 40, 0.1), (40, 42, 3.0), (42, 70, 0.1))
    assert restored(samples, 10, 70, 1.0) == pytest.approx(36.7, abs=0.15)
    assert restored(samples, 10, 43, 1.0) is None
    assert restored(requests((0, 10, 0.1), (10, 70, math.inf)), 10, 70, 1.0) is None


def test_a_window_without_requests_has_no_percentile():
    looks = windows([(1.0, 0.5)], 0.0, 8.0, 1.0)
    assert [seconds for _, seconds in looks] == [None, 0.5, 0.5, 0.5, 0.5, 0.5, None, None, None]


def test_zipf_falls_with_the_rank():
    found = zipf(8)
    assert sum(found) == pytest.approx(1) and found[0] == pytest.approx(2 * found[1]) == pytest.approx(8 * found[7])


def test_lru_keeps_what_was_used_last():
    assert lru_hits([1, 2, 1, 3, 1, 2], 2) == pytest.approx(2 / 6)
    assert lru_hits([1, 2, 3, 1, 2, 3], 3) == pytest.approx(3 / 6)


def test_a_slope_is_the_lines():
    assert slope([(x, 5 - 2 * x) for x in (0.0, 1.0, 3.0)]) == pytest.approx(-2)
    assert slope([(1.0, 4.0), (1.0, 9.0)]) == 0


def test_json_has_no_infinities():
    assert finite({"a": [math.inf, (1.23456789, 2)], "b": "text"}) == {"a": [None, [1.2346, 2]], "b": "text"}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}


# ---- memory ---------------------------------------------------------------------------------------------------------


SMAPS = """\
55d0-55d1 r--p 00000000 08:01 123                        /usr/bin/python3.11
Size:                  4 kB
Rss:                   4 kB
Pss:                   1 kB
Private_Clean:         0 kB
Private_Dirty:         0 kB
VmFlags: rd mr mw me
7f00-7f10 rw-p 00000000 00:00 0
Rss:                  40 kB
Pss:                  30 kB
Private_Clean:         8 kB
Private_Dirty:        12 kB
7f20-7f30 r--s 00000000 00:01 77                         /memfd:deepserve-weights-0 (deleted)
Rss:                 100 kB
Pss:                  10 kB
Private_Clean:         0 kB
Private_Dirty:       100 kB
"""


def test_memory_maps_are_read():
    first, second, third = mappings(SMAPS)
    assert first == Mapped("/usr/bin/python3.11", "123", 4096, 1024, 0)
    assert second == Mapped("", "0", 40960, 30720, 20480)
    assert third.name.startswith("/memfd:deepserve-weights") and third.inode == "77" and third.private == 102400


def test_what_several_map_counts_once():
    def shared(name: str, inode: str, rss: int, private: int = 0) -> Mapped:
        return Mapped(f"/memfd:deepserve-{name} (deleted)", inode, rss, rss // 2, private)

    own = Mapped("[heap]", "0", 7 * MB, 7 * MB, 7 * MB)
    maps = {
        1: ("te", [own, shared("weights-0", "5", 90 * MB), shared("kv", "8", 2 * MB, 2 * MB)]),
        2: ("te", [own, shared("weights-0", "5", 98 * MB), shared("kv", "9", 1 * MB, 1 * MB), shared("kv", "8", 1 * MB)]),
        3: ("pool", [Mapped("[heap]", "0", MB, MB, MB)]),
        4: ("keeper", [Mapped("[heap]", "0", 3 * MB, 3 * MB, 3 * MB), shared("weights-0", "5", 98 * MB, 98 * MB)]),
        5: ("control", [Mapped("[heap]", "0", 70 * MB, 70 * MB, 70 * MB), shared("queue", "6", 4 * MB)]),
    }
    found = account(maps, {"9": 30 * MB})  # committed, though only some of it is mapped
    assert found["te"] == 2 and found["te_private_mb"] == 14 and found["te_private_most_mb"] == 7
    assert found["kv_committed_mb"] == 32 and found["each_te_mb"] == 23
    assert found["weights_once_mb"] == 98 and found["queues_and_rest_mb"] == 4
    assert (found["pool"], found["pool_private_mb"], found["keeper_private_mb"], found["control_private_mb"]) == (1, 1, 3, 70)


def test_this_process_is_seen():
    fd = os.memfd_create("deepserve-test")
    try:
        os.posix_fallocate(fd, 0, 1 << 20)
        assert memfds([os.getpid()])[str(os.fstat(fd).st_ino)] == 1 << 20
    finally:
        os.close(fd)
    held = pss([os.getpid()])
    assert 1 << 20 < held.anonymous < held.pss
    assert pss([-1]) == (0, 0)


def test_how_much_of_a_file_is_in_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert scale_zero.resident(path) > 0.9


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_every_path_is_left_out_between_runs_that_have_all():
    runs = scale_growth.runs_of(Options(2, 64, False, 0, Path()), 0)
    assert [start for weights, start, without in runs if weights == "bf16"] == [1, 8, 32]
    assert {without for _, _, without in runs} == {"", *scale_growth.PATHS}
    assert runs[0] == ("q4_1", 1, "") and sum(run == ("q4_1", 1, "") for run in runs) == 4
    assert {start for _, start, _ in scale_growth.runs_of(Options(1, 8, True, 0, Path()), 0)} == {1}
    later = scale_growth.runs_of(Options(2, 64, False, 0, Path()), 1)
    assert {without for _, _, without in later} == {"", *scale_growth.PATHS} - set(scale_growth.SLOW)


def test_arrivals_are_ten_times_as_many_in_the_burst():
    at = scale_burst.arrivals(5.0, (10.0, 60.0, 30.0), 1)
    assert at == sorted(at) and at == scale_burst.arrivals(5.0, (10.0, 60.0, 30.0), 1)
    before, burst, after = (sum(low <= t < high for t in at) for low, high in ((0, 10), (10, 70), (70, 100)))
    assert before == pytest.approx(50, rel=0.4) and burst == pytest.approx(3000, rel=0.1) and after == pytest.approx(150, rel=0.3)
    assert before + burst + after == len(at)


def test_requests_of_a_burst_are_counted_for_what_became_of_them():
    Sent = scale_burst.Sent
    sent = [Sent(t / 10, 0.1, done=True) for t in range(100)]
    sent += [Sent(10.0, refused=True, error="429: full"), Sent(10.5, error="broken"), Sent(11.0), Sent(12.0, 0.2, done=True)]
    found = scale_burst.summed(sent, 10.0, 20.0, 25.0)
    assert (found["requests"], found["refused"], found["failed"], found["waiting_at_the_end"]) == (104, 1, 1, 1)
    assert found["kept_percent"] == 25 and found["p95_before_s"] == 0.1 and found["p95_burst_s"] == math.inf
    assert found["errors"] == ["broken"]


def test_models_are_the_same_file_under_eight_names(tmp_path):
    shipped = tmp_path / "shipped.gguf"
    shipped.write_bytes(b"weights")
    (tmp_path / "names").mkdir()
    paths = scale_models.copies(shipped, tmp_path / "names")
    assert len({path.name for path in paths}) == 8 and {path.read_bytes() for path in paths} == {b"weights"}


def test_a_counter_is_summed_over_its_labels():
    text = '# TYPE x counter\nx_total{model="a b",te="1"} 3.0\nx_total{model="c"} 4.0\nx_total_created 9.0\ny_total 2.0\n'
    assert scale_respawn.counter(text, "x_total") == 7 and scale_respawn.counter(text, "y_total") == 2
    assert scale_respawn.counter(text, "z_total") == 0


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_part_replaces_its_own_figures_only(tmp_path, monkeypatch):
    class Part:
        @staticmethod
        def measure(options: Options) -> dict:
            return {"te": options.te}

        @staticmethod
        def table(found: dict) -> list[str]:
            return [f"{found['te']} TEs"]

    monkeypatch.setattr(scale, "PARTS", {"growth": Part, "zero": Part})
    path = tmp_path / "scale.json"
    assert scale.main(["--parts", "zero", "--quick", "--out", str(path)]) == 0
    assert scale.main(["--parts", "growth", "--te", "16", "--out", str(path)]) == 0
    report = json.loads(path.read_bytes())
    assert list(report["parts"]) == ["growth", "zero"] and report["machine"]["cores"]
    assert report["parts"]["growth"]["te"] == 16 and report["parts"]["zero"]["te"] == scale.QUICK_TE
    assert report["parts"]["growth"]["command"] == "python -m bench.scale --parts growth --rounds 2 --te 16 --seed 0"
    text = scale.table(report)
    assert "## growth" in text and "16 TEs" in text and str(tmp_path) not in json.dumps(report)


def test_a_part_that_fails_says_so(tmp_path, monkeypatch):
    class Part:
        @staticmethod
        def measure(options: Options) -> dict:
            raise scale.UserError("no TE came up")

    monkeypatch.setattr(scale, "PARTS", {"growth": Part})
    path = tmp_path / "scale.json"
    assert scale.main(["--parts", "growth", "--out", str(path)]) == 1
    assert "Failed: no TE came up" in scale.table(json.loads(path.read_bytes()))
